"""Handles: the model comes back bit for bit, copies, masters, names, and what is refused before anything changes."""

import copy
import io
import re

import pytest
import tiny_models as tiny
import torch
from patch_cases import everything, scrambled

import fastedit as fe
from fastedit.patching import installation
from fastedit.patching.handle import handles

PATHS = (True, False)


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_removal_gives_every_bit_back(family, fused):
    model = tiny.build(family)
    seen = []
    for module in model.modules():  # other people's hooks, everywhere
        module.register_forward_hook(lambda m, a, o: seen.append(type(m)))
    before, said = tiny.state(model), tiny.output(model, family)
    first = fe.patch(model, everything(), freeze=True, fused=fused)
    second = scrambled(fe.patch(model, fe.ScaleBias(site="block"), fused=fused))
    assert not torch.equal(tiny.output(model, family), said)
    first.remove()
    assert [handle.name for handle in handles(model)] == [second.name]
    second.remove()
    tiny.assert_same_state(model, before)
    seen.clear()
    assert torch.equal(tiny.output(model, family), said) and seen
    second.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        second.strength = 1.0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_copies_and_pickles_are_models_of_their_own(family):
    model = tiny.build(family)
    scrambled(fe.patch(model, everything()))
    said = tiny.output(model, family)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(tiny.output(other, family), said)
        assert [type(m).__qualname__ for m in other.modules()] == [
            type(m).__qualname__ for m in model.modules()
        ]
        (handle,) = handles(other)
        handle.strength = 0.0
        assert torch.equal(tiny.output(model, family), said), "the copy's dial turned the original's"
        assert not torch.equal(tiny.output(other, family), said)
        handle.remove()
        assert not any(key.startswith("fastedit") for key in other.state_dict())
        assert torch.equal(tiny.output(model, family), said)


@pytest.mark.parametrize("change", [
    lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.float16),
    lambda m: m.to("cpu", torch.bfloat16),
])  # fmt: skip
def test_masters_stay_fp32(change):
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, [fe.RED(), fe.Steer(torch.randn(tiny.WIDTH))]))
    before = {k: t.clone() for k, t in handle.named_tensors().items()}
    change(model)
    after = handle.named_tensors()
    assert all(t.dtype is torch.float32 and torch.equal(t, before[k]) for k, t in after.items())
    assert next(model.model.parameters()).dtype is not torch.float32
    assert tiny.output(model, "llama").isfinite().all()


def test_masters_follow_their_model_to_its_device():
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.RED(), fe.Steer(torch.randn(tiny.WIDTH))])
    model.to("meta")
    assert all(t.is_meta and t.dtype is torch.float32 for t in handle.named_tensors().values())
    assert model(torch.zeros(2, 3, dtype=torch.long, device="meta")).logits.is_meta
    model.to_empty(device="cpu")
    assert all(t.device.type == "cpu" and t.dtype is torch.float32 for t in handle.named_tensors().values())


@pytest.mark.parametrize("edit, error, says", [
    (lambda: fe.ScaleBias(torch.ones(16), site="mlp", layers=2), ValueError,
     "width 16, but site 'mlp' of layer layers.2 is 32 wide"),
    (lambda: fe.Steer(torch.randn(4, 32)), ValueError, "holds 4 layers, but the model has 3"),
    (lambda: fe.Steer({7: torch.randn(32)}), ValueError, "no layer 7: the model has 3 layers"),
    (lambda: fe.RED(layers=[0, -4]), ValueError, "no layer -4"),
    (lambda: fe.RED(layers="decoder"), ValueError, "no layer 'decoder'"),
    (lambda: "RED", TypeError, "expected an Edit"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_changes(edit, error, says):
    model = tiny.build("llama")
    before = tiny.state(model)
    with pytest.raises(error, match=says):
        fe.patch(model, [fe.RED(), edit()], freeze=True)
    tiny.assert_same_state(model, before)


@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_failure_half_way_is_undone(number, monkeypatch):
    model = tiny.build("llama")
    first = scrambled(fe.patch(model, fe.RED()))
    before, said, calls = tiny.state(model), tiny.output(model, "llama"), []

    def failing(*args, real=installation.swap):
        calls.append(args)
        if len(calls) == number:
            raise MemoryError("no room")
        return real(*args)

    monkeypatch.setattr(installation, "swap", failing)
    with pytest.raises(MemoryError):
        fe.patch(model, everything(), freeze=True)
    tiny.assert_same_state(model, before)
    assert handles(model) == [first] and torch.equal(tiny.output(model, "llama"), said)


def test_a_model_with_nothing_to_patch_says_what_was_looked_for():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="looked for a ModuleList"):
        fe.patch(model, fe.RED())
    assert not hasattr(model, "fastedit")


def test_a_foreign_attribute_and_a_patched_submodule_are_in_the_way():
    model = tiny.build("llama")
    model.fastedit = 3
    with pytest.raises(ValueError, match="already has an attribute"):
        fe.patch(model, fe.RED())
    del model.fastedit
    inner = fe.patch(model.model, fe.RED())
    with pytest.raises(ValueError, match="'model' is already patched"):
        fe.patch(model, fe.RED())
    inner.remove()
    fe.patch(model, fe.RED()).remove()


def test_freeze_leaves_the_edits_and_a_task_head():
    model = tiny.build("bert")
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        model.bert.pooler.dense.bias.fill_(0.1)  # one of zeros is newly initialised, and trains along
    before = tiny.state(model)
    first, second = fe.patch(model, fe.RED(), freeze=True), fe.patch(model, fe.RED(), freeze=True)
    trainable = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"fastedit", "classifier"}
    first.remove()
    assert not model.bert.encoder.layer[0].output.dense.weight.requires_grad
    second.remove()
    tiny.assert_same_state(model, before)


def test_without_freeze_nothing_is_frozen():
    model = tiny.build("bert")
    fe.patch(model, fe.RED())
    assert all(p.requires_grad for p in model.parameters())


def test_tensors_are_loaded_whole_or_not_at_all():
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, [fe.RED(), fe.DiReFT(2)]))
    own = {k: t.clone() for k, t in handle.named_tensors().items()}
    assert next(iter(own)) == "0.layers.0.mlp.scale" and "1.layers.2.block.offset" in own
    name = "1.layers.2.block.offset"
    for changed, error in (
        ({k: t for k, t in own.items() if k != name}, KeyError), ({**own, "2.x": own[name]}, KeyError),
        ({**own, name: torch.zeros(3)}, ValueError),
        ({**own, name: torch.zeros(2, dtype=torch.int64)}, TypeError),
        ({**own, name: torch.tensor([0.0, float("nan")])}, ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match=r"2\.x|offset"):
            handle.load_tensors(
                {k: t + 1 if t.is_floating_point() and k != name else t for k, t in changed.items()}
            )
        assert all(torch.equal(t, own[k]) for k, t in handle.named_tensors().items())


def test_names_in_the_state_dict_are_those_of_the_tensors():
    model = tiny.build("t5")
    handle = fe.patch(model, [fe.RED(), fe.Steer(torch.ones(tiny.WIDTH), layers=[1, -1])])
    names = set(handle.named_tensors())
    assert {
        "0.encoder.1.mlp.scale",
        "0.decoder.0.mlp.bias",
        "1.encoder.1.block.bias",
        "1.decoder.1.block.bias",
    } <= names
    assert {k for k in model.state_dict() if k.startswith("fastedit.")} == {
        "fastedit._extra_state", *(f"fastedit.{handle.name}.{n}" for n in names)
    }  # fmt: skip
    assert handle.num_parameters() == sum(t.numel() for t in handle.named_tensors().values())
    assert len(list(handle.parameters())) == 2 * 4


def test_a_saved_state_dict_loads_into_a_patched_model():
    model, other = tiny.build("llama"), tiny.build("llama")
    scrambled(fe.patch(model, everything()))
    fe.patch(other, everything())
    other.load_state_dict(model.state_dict())
    assert torch.equal(tiny.output(other, "llama"), tiny.output(model, "llama"))


def test_tensors_put_in_by_functional_call_are_those_that_count():
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, everything()))
    said = tiny.output(model, "llama")
    other = {k: t + 0.5 for k, t in handle.named_tensors().items()}
    given = {f"fastedit.{handle.name}.{k}": t for k, t in other.items()}
    with torch.no_grad():
        swapped = torch.func.functional_call(model, given, kwargs=tiny.inputs("llama")).logits
    assert torch.equal(tiny.output(model, "llama"), said)
    handle.load_tensors(other)
    assert torch.equal(tiny.output(model, "llama"), swapped) and not torch.equal(swapped, said)


def test_the_report_names_everything():
    model = tiny.build("bert")
    handle = fe.patch(model, [fe.RED(), fe.Steer(torch.ones(tiny.WIDTH))])
    lines = list(handle.report().lines())
    assert lines[0][:4] == ("layers.0–2", "mlp", "RED", "fused") and lines[0][5:] == ("192", "768")
    assert lines[1][:3] == ("layers.0–2", "block", "Steer") and "ends in a norm" in lines[1][3]
    assert "backend" in str(handle.report())


def test_plain_path_refuses_hidden_states_of_another_width():
    """A width that is not the edit's must never reach it."""
    from fastedit.patching import residual_add as adds

    scale, bias = torch.ones(64), torch.zeros(64)
    with torch.no_grad():
        assert torch.equal(adds.edit(torch.ones(3, 64), (scale, bias, None, None, None), None), torch.ones(3, 64))
        with pytest.raises(ValueError, match="64"):
            adds.edit(torch.ones(3, 48), (scale, bias, None, None, None), None)
        with pytest.raises(ValueError, match="64"):
            adds.edit(torch.ones(3, 128), (None, None, torch.ones(2, 64), None, torch.ones(2, 64)), None)
        with pytest.raises(ValueError, match="64"):
            adds.add(torch.ones(3, 128), torch.ones(3, 128), (None, bias, None, None, None), None, False)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((None, fe.RED()), "model is None, expected a torch.nn.Module"),
        (("gpt2", fe.RED()), "model is 'gpt2'"),
        ((..., fe.RED), "expected an Edit such as"),
    ],
)
def test_what_is_no_model_or_edit_is_said(arguments, says):
    model = tiny.build("llama")
    with pytest.raises(TypeError, match=re.escape(says)):
        fe.patch(*(model if argument is ... else argument for argument in arguments))
    with pytest.raises(TypeError, match="freeze is 'no', expected True or False"):
        fe.patch(model, fe.RED(), freeze="no")
    assert "fastedit" not in model._modules


def test_values_that_are_no_numbers_are_said():
    for value in (None, "abc"):
        with pytest.raises(TypeError, match="expected a tensor"):
            fe.Steer(value)
    with fe.patch(tiny.build("llama"), fe.Steer(torch.ones(tiny.WIDTH), positions="mask")) as handle:
        for strength in ("2", True, None, 1j):
            with pytest.raises(TypeError, match="expected a number"):
                handle.strength = strength
        for call in (handle.mask, handle.prompt):
            with pytest.raises(TypeError, match="expected a tensor"):
                call("a")
        handle.mask(torch.ones(2, 7))
        with pytest.raises(ValueError, match="2 rows, but this forward has 4 sequences"):
            handle.model(torch.ones(4, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="site is one of the model"):
        fe.patch(tiny.build("llama"), fe.Steer(torch.ones(tiny.LAYERS, tiny.WIDTH), site="embed"))


def test_a_refused_strength_changes_nothing():
    """One that fp32 does not hold, of any edit of the handle: dials, outputs and a merge are as before."""
    model = tiny.build("llama")
    width = model.config.hidden_size
    edits = [fe.Steer(torch.ones(width), layers=[0]), fe.Steer(torch.ones(width), site="mlp", layers=[1], strength=1e20)]
    handle = fe.patch(model, edits)
    handle.strength = 1e-20
    dials = [masters.dial.clone() for _, _, masters in handle._each()]
    for value in (1e39, 1e19, -1e25):
        with pytest.raises(ValueError, match="beyond what fp32 holds"):
            handle.strength = value
        assert handle.strength == 1e-20
        assert all(torch.equal(masters.dial, dial) for (_, _, masters), dial in zip(handle._each(), dials, strict=True))
    handle.remove()
