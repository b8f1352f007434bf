"""Handles with gates: strength, compiled decoding, saved files, removal, and what is refused."""

import copy

import pytest
import tiny_models as tiny
import torch
from gate_cases import LEAVES, gate, generated, patched, prompts, vector
from transformers import CompileConfig

import fastedit as fe
from fastedit.edits.gates import rule_of
from fastedit.patching.handle import handles
from fastedit.patching.merge import MergeError
from fastedit.patching.rows.gate_sensors import Sensor


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_strength_turns_without_a_new_trace(mode):
    model = tiny.build("llama", num_hidden_layers=2)  # the gate's own and one that it gates
    rule = gate("elsewhere or not here")
    handle = fe.patch(model, [fe.Steer(vector(8)).when(rule), fe.Ablate(vector(9), keep_norm=True).when(gate("cast"))])
    ids, mask = prompts()
    call = model if mode == "eager" else torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        call(**given)
        seen = []
        for strength in (0.3, 2.0, 0.0):
            handle.strength = strength
            with torch.compiler.set_stance("fail_on_recompile" if mode == "compiled" else "default"):
                got = call(**given).logits
            torch.testing.assert_close(got, model(**given).logits, rtol=1e-4, atol=1e-4)
            seen.append(got)
    handle.remove()
    torch.testing.assert_close(seen[-1][mask.bool()], model(**given).logits[mask.bool()], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


@pytest.mark.parametrize("name", ["cosine", "soft cosine, prompt", "elsewhere or not here"])
def test_compiled_decoding_with_a_static_cache_is_one_graph(name):
    model = tiny.build("llama", num_hidden_layers=2)
    handle = fe.patch(model, fe.Steer(vector(8), layers=[1]).when(gate(name)))
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    ids, mask = prompts()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for order, strength in (([0, 1, 2, 3], 1.0), ([2, 0, 3, 1], 1.0), ([2, 0, 3, 1], 2.0)):
        handle.strength = strength
        eager = generated(model, ids[order], mask[order])
        static = generated(model, ids[order], mask[order], cache_implementation="static", compile_config=config)
        for got, expected in zip(static[1], eager[1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_decisions_stay_where_they_are_for_a_captured_graph():
    model = tiny.build("llama")
    fe.patch(model, fe.Steer(vector(8)).when(gate("soft cosine, prompt")))
    ids, mask = prompts()
    generated(model, ids, mask)
    sensors = [module for module in model.fastedit.modules() if isinstance(module, Sensor)]
    before = [(sensor.kept.data_ptr(), sensor.kept.clone()) for sensor in sensors]
    generated(model, ids.flip(0), mask.flip(0))
    for sensor, (address, value) in zip(sensors, before, strict=True):
        assert sensor.kept.data_ptr() == address and not torch.equal(sensor.kept, value)


@pytest.mark.parametrize("name", LEAVES)
def test_saved_gates_come_back(name, tmp_path):
    model, handle, _ = patched("llama", name, keep_norm=name == "cast")
    ids, mask = prompts()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
    handle.save(tmp_path / "edit")
    config = handle.config()
    state = tiny.state(model)["bits"]
    handle.remove()
    again = fe.load(model, tmp_path / "edit")
    assert again.config() == config and list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert str(rule_of(gate(name).spec())) == str(gate(name))


def test_removal_copies_and_pickles():
    model = tiny.build("llama")
    before = tiny.state(model)
    first = fe.patch(model, fe.Steer(vector(1), layers=[2]).when(gate("elsewhere, prompt")))
    second = fe.patch(model, fe.RED())
    ids, mask = prompts()
    copied = copy.deepcopy(model)
    assert torch.equal(generated(copied, ids, mask)[0], generated(model, ids, mask)[0])
    handles(copied)[0].remove()
    first.remove()
    assert not model.fastedit.stacks and "layers.0" in model.fastedit.installed
    assert torch.equal(tiny.output(copied, "llama"), tiny.output(model, "llama"))
    second.remove()
    tiny.assert_same_state(model, before)


def test_the_model_may_become_bf16_but_not_the_gate():
    model, handle, _ = patched("llama", "elsewhere or not here")
    model.to(torch.bfloat16)
    assert {t.dtype for t in handle.named_tensors().values()} == {torch.float32}
    ids, mask = prompts()
    model(input_ids=ids, attention_mask=mask)


def test_gates_do_not_merge_and_do_not_fold():
    model = tiny.build("llama")
    with fe.patch(model, [fe.Steer(vector(1), site="mlp").when(gate("dot")), fe.Steer(vector(2), site="mlp")]) as handle:
        assert [len(site.stages) for site in model.fastedit.sites.values()] == [2, 2, 2]
        with pytest.raises(MergeError, match="a gated edit on some"):
            handle.merge()
    normed = fe.Steer(vector(1), site="mlp", keep_norm=True)
    with fe.patch(model, normed) as handle, pytest.raises(MergeError, match="norm of each row"):
        handle.merge()
    watching = fe.patch(model, fe.Steer(vector(1), layers=2).when(fe.Gate(vector(2), layer=0, site="mlp")))
    with fe.patch(model, fe.Steer(vector(1), site="mlp")) as handle, pytest.raises(MergeError, match="gates come first"):
        handle.merge()
    watching.remove()


def test_a_gate_twice_is_both():
    a, b = fe.Gate(vector(1)), fe.Gate(vector(2))
    assert fe.Steer(vector(3)).when(a).when(b).gate.spec() == (a & b).spec()
    plain = fe.Steer(vector(3))
    assert plain.when(a) is not plain and plain.gate is None


WRONG = [
    (lambda: fe.Gate(vector(1), kind="angle"), ValueError, "kind is 'angle', expected one of 'dot', 'cosine', 'cast'"),
    (lambda: fe.Gate(vector(1), decide="once"), ValueError, "decide is 'once'"),
    (lambda: fe.Gate(vector(1), sharpness=0), ValueError, "sharpness is 0"),
    (lambda: fe.Gate(vector(1), threshold="high"), ValueError, "threshold is 'high'"),
    (lambda: fe.Gate(vector(1), threshold=float("nan")), ValueError, "threshold is nan"),
    (lambda: fe.Gate(vector(1), threshold=[]), ValueError, "threshold is empty"),
    (lambda: fe.Gate(torch.zeros(32), kind="cosine"), ValueError, "all zero"),
    (lambda: fe.Gate(torch.ones(2, 3, 32)), ValueError, "condition has shape"),
    (lambda: fe.Gate(vector(1), layer=True), TypeError, "layer is True"),
    (lambda: fe.Gate(vector(1), site="mlp"), ValueError, "site is given without layer"),
    (lambda: fe.Gate(vector(1), layer=1, site="nowhere"), ValueError, "there is no site 'nowhere'"),
    (lambda: fe.Steer(vector(1)).when(0.5), TypeError, "found float"),
    (lambda: fe.Gate(vector(1)) & 1, TypeError, "found int"),
    (lambda: fe.Steer(vector(1), keep_norm=1), TypeError, "keep_norm is 1"),
    (lambda: rule_of({"xor": []}), ValueError, "unknown key 'xor'"),
    (lambda: rule_of({"and": [{"kind": "dot"}]}), ValueError, "two gates"),
    (lambda: rule_of({"kind": "angle"}), ValueError, "kind is 'angle'"),
    (lambda: rule_of([]), ValueError, "expected an object"),
]


@pytest.mark.parametrize("make, error, message", WRONG)
def test_wrong_gates(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("where, message", [
    ({"layer": 2}, "comes after site 'block' of layer layers.1"), ({"layer": 9}, "there is no layer 9"),
    ({"layer": "layers"}, "names 3"), ({}, "the gate's condition has width 31"),
    ({"layer": 0}, "the gate's condition has width 31"),
])  # fmt: skip
def test_gates_that_do_not_fit_change_nothing(where, message):
    model = tiny.build("llama")
    before = tiny.state(model)
    condition = vector(1, 31) if "31" in message else vector(1)
    with pytest.raises(ValueError, match=message):
        fe.patch(model, fe.Steer(vector(1), layers=[1, 2]).when(fe.Gate(condition, **where)))
    tiny.assert_same_state(model, before)


def test_a_later_site_of_the_same_layer_and_another_stack_are_refused():
    with pytest.raises(ValueError, match=r"comes after site 'mlp' of layer layers\.1"):
        fe.patch(tiny.build("llama"), fe.Steer(vector(1), site="mlp", layers=1).when(fe.Gate(vector(1), layer=1, site="block")))
    with pytest.raises(ValueError, match="another stack's tokens"):
        fe.patch(tiny.build("t5"), fe.Steer(vector(1), layers=2).when(fe.Gate(vector(1), layer=0)))
