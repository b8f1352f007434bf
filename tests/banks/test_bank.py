"""Many edits in one batch: each sequence as if the whole batch were edited alike, and nothing moves when one is added."""

import copy

import pytest
import tiny_models as tiny
import torch
from bank_cases import SERVED, bank_of, drawn, ids, logits, low_rank, red, three
from torch._dynamo.testing import CompileCounterWithBackend

import fastedit as fe
from fastedit.edits.form import at_strength, fold_all

NAMES = ["anna", None, "cleo", "ben", "anna"]
FAMILIES = ("llama", "gpt2", "bert", "t5")


def run(model, family, bank, names):
    with bank.assign(names):
        return tiny.output(model, family, batch=len(names))


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_bits_of_the_batch_with_its_edit_on_every_row(family, dtype, fused):
    model = tiny.build(family, dtype)
    bank = bank_of(model, three(tiny.number_of_layers(family)), fused=fused)
    mixed = run(model, family, bank, NAMES)
    outside = tiny.output(model, family, batch=len(NAMES))
    for name in {*NAMES}:
        alike = outside if name is None else run(model, family, bank, [name] * len(NAMES))
        mine = [i for i, own in enumerate(NAMES) if own == name]
        assert torch.equal(mixed[mine], alike[mine])
        assert name is None or not torch.equal(alike[mine], outside[mine])
    assert torch.equal(run(model, family, bank, [None] * len(NAMES)), outside)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bank_s_edit_has_the_bits_of_the_patched_one(family, fused):
    """One edit a site, at strength 1: what is folded has other last bits than what is applied in turn."""
    layers = tiny.number_of_layers(family)
    model, other = tiny.build(family), tiny.build(family)
    edits = [red(1, count=layers), fe.Clamp(drawn(4, tiny.WIDTH), 0.5, site="attn"), low_rank(5, site="block", layers=[1])]
    bank = bank_of(model, {"one": edits}, fused=fused)
    fe.patch(other, edits, fused=fused)
    assert torch.equal(run(model, family, bank, ["one"] * 3), tiny.output(other, family, batch=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_a_mixed_batch_is_what_hooks_compute(fused, dtype):
    base = tiny.build("llama", dtype)
    model = copy.deepcopy(base)
    bank = bank_of(model, fused=fused)
    mixed = run(model, "llama", bank, NAMES)
    for name, edits in three().items():
        stacks = {}
        with fe.patch(copy.deepcopy(base), edits) as handle:
            for edit, layer, masters in handle._each():
                form = type(masters.form())(*(None if t is None else t.double() for t in masters.form().tensors()))
                stacks.setdefault((edit.site, layer.index), []).append(at_strength(form, edit.strength))
        placed = [(site, layer, fold_all(forms)) for (site, layer), forms in stacks.items()]
        slow = tiny.output(tiny.hook_reference(base, "llama", placed), "llama", batch=5)
        true = tiny.output(tiny.hook_reference(tiny.exact(base), "llama", placed), "llama", batch=5)
        mine = [i for i, own in enumerate(NAMES) if own == name]
        tiny.assert_promise(mixed[mine], slow[mine], true[mine])


def test_rows_of_no_edit_have_the_unedited_model_s_bits():
    bare, model = tiny.build("llama"), tiny.build("llama")
    bank = bank_of(model, fused=False)
    with bank.assign(NAMES[:4]):
        assert torch.equal(logits(model, ids())[1], logits(bare, ids())[1])
    assert torch.equal(logits(model, ids()), logits(bare, ids()))


def test_strengths_are_a_sequence_s_own():
    model = tiny.build("llama")
    bank = bank_of(model, {"one": red(1), "zero": red(2)})
    outside = logits(model, ids())
    with bank.assign(["one", "one", "zero", None], [1.0, 0.25, 0, 3.0]):
        mixed = logits(model, ids())
    for strength, row in ((1.0, 0), (0.25, 1)):
        with bank.assign(["one"] * 4, strength):
            assert torch.equal(logits(model, ids())[row], mixed[row])
    assert torch.equal(mixed[2:], outside[2:])
    twin = tiny.build("llama")
    with fe.patch(twin, red(1)) as handle:
        handle.strength = 0.25
        torch.testing.assert_close(mixed[1], logits(twin, ids())[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(mixed[1], mixed[0])


def test_an_edit_s_own_strength_and_a_handle_s_are_folded_in():
    model = tiny.build("llama")
    bank = fe.Bank(model, 3)
    bank.add("half", red(1, strength=0.5))
    with fe.patch(model, red(1)) as handle:
        handle.strength = 0.5
        edited = logits(model, ids())
        bank.add("handle", handle)
    with bank.assign(["half", "handle", "half", "handle"]):
        said = logits(model, ids())
    torch.testing.assert_close(said, edited, rtol=1e-5, atol=1e-5)
    assert bank.tables.tensors("layers.0", "mlp")[0][0].equal(bank.tables.tensors("layers.0", "mlp")[0][1])


def test_a_folder_a_handle_and_an_edit_give_the_same(tmp_path):
    model, source = tiny.build("llama"), tiny.build("llama")
    handle = fe.patch(source, [fe.RED(), fe.LoReFT(2)])
    handle.load_tensors({k: t + 0.2 * torch.randn_like(t) for k, t in handle.named_tensors().items()})
    handle.strength = 1.5
    handle.save(tmp_path / "edit")
    bank = fe.Bank(model, 3, sites=("mlp", "block"), rank=2)
    bank.add("handle", handle)
    bank.add("folder", tmp_path / "edit")
    bank.add("string", str(tmp_path / "edit"))
    with bank.assign(["handle", "folder", "string", "folder"]):
        said = logits(model, ids()[:1].repeat(4, 1))
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])
    torch.testing.assert_close(said[:1], logits(source, ids()[:1]), rtol=1e-4, atol=1e-4)


def test_a_tenant_of_a_training_batch_can_be_added():
    source, model = tiny.build("llama"), tiny.build("llama")
    handle = fe.patch(source, fe.RED(), tenants=2)
    handle.load_tensors({k: t + torch.randn_like(t) for k, t in handle.named_tensors().items()})
    bank = fe.Bank(model, 2)
    with pytest.raises(ValueError, match="the edit of one tenant, such as handle"):
        bank.add("all", handle)
    bank.add("second", handle.tenant(1))
    with bank.assign(["second"] * 4), handle.assign([1] * 4):
        assert torch.equal(logits(model, ids()), logits(source, ids()))


def test_a_bank_beside_handles_and_banks():
    model = tiny.build("llama")
    handle = fe.patch(model, fe.Steer(drawn(8, tiny.WIDTH), site="mlp"))
    steered = logits(model, ids())
    first, second = bank_of(model, {"a": red(1)}), bank_of(model, {"a": red(2), "b": red(3)})
    with first.assign(["a"] * 4), second.assign([None, "b"] * 2):
        both = logits(model, ids())
    with first.assign(["a"] * 4):
        assert torch.equal(logits(model, ids())[::2], both[::2])
    handle.remove()
    first.close()
    assert fe.patching.handle.handles(model) == [] and fe.banks.bank.banks(model) == [second]
    handle = fe.patch(model, fe.Steer(drawn(8, tiny.WIDTH), site="mlp"))
    assert torch.equal(logits(model, ids()), steered)
    second.close()
    assert torch.equal(logits(model, ids()), steered)


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_given_back_bit_for_bit(family):
    model = tiny.build(family)
    before = tiny.state(model)
    trainable = [n for n, _ in model.named_parameters()]
    bank = bank_of(model, three(tiny.number_of_layers(family)))
    assert list(model.state_dict()) == list(before["bits"]) and [n for n, _ in model.named_parameters()] == trainable
    run(model, family, bank, NAMES)
    bank.close()
    tiny.assert_same_state(model, before)
    bank.close()
    with pytest.raises(RuntimeError, match="bank was closed"):
        bank.add("again", red(1))
    with bank_of(model, three(tiny.number_of_layers(family))) as bank:
        pass
    tiny.assert_same_state(model, before)


def test_tables_stay_fp32_and_follow_the_model():
    model = tiny.build("llama")
    bank = bank_of(model).model.to(torch.bfloat16) and fe.banks.bank.banks(model)[0]
    assert {t.dtype for t in bank.tables.buffers()} == {torch.float32}
    assert bank.tables.tensors("layers.1", "mlp")[0].data_ptr() == bank.tables.scale0[3 * 0 + 1].data_ptr()
    run(model, "llama", bank, NAMES)


def test_a_copied_model_has_a_bank_of_its_own():
    model = tiny.build("llama")
    bank = bank_of(model)
    twin = copy.deepcopy(model)
    (other,) = fe.banks.bank.banks(twin)
    said = run(model, "llama", bank, NAMES)
    assert torch.equal(run(twin, "llama", other, NAMES), said)
    other.replace("anna", red(8))
    other.add("new", red(9))
    assert torch.equal(run(model, "llama", bank, NAMES), said) and "new" not in bank
    assert not torch.equal(run(twin, "llama", other, NAMES)[0], said[0])


def test_nothing_moves_and_nothing_is_compiled_again_when_an_edit_is_added():
    torch._dynamo.reset()
    model = tiny.build("llama", num_hidden_layers=1)
    edits = three(1) | {"cleo": red(3, count=1)}
    bank = bank_of(model, {"anna": edits["anna"]})
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    addresses = [t.data_ptr() for t in bank.tables.buffers()]
    frames = []
    for names, strengths in (
        (["anna"] * 4, None), (["anna", None, "ben", "ben"], None), (["cleo", "ben", None, "anna"], [1, 0.5, 2, 0]),
    ):  # fmt: skip
        for name in names:
            if name is not None and name not in bank:
                bank.add(name, edits[name])
        with bank.assign(names, strengths):
            torch.testing.assert_close(logits(compiled, ids()), logits(model, ids()), rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1]
    assert addresses == [t.data_ptr() for t in bank.tables.buffers()]
    torch.testing.assert_close(logits(compiled, ids()), logits(model, ids()), rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_an_assignment():
    model = tiny.build("llama")
    bank = bank_of(model)
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
    with bank.assign(["anna", None, "cleo", "ben"]):
        model(inputs_embeds=embedded).logits.sum().backward()
    assert (embedded.grad.abs().amax((1, 2)) > 0).all() and not any(t.requires_grad for t in bank.tables.buffers())


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edits, message",
    [
        (fe.Steer(torch.ones(tiny.WIDTH), site="ffn_in", layers=[0]), "width"),
        (fe.ScaleBias(torch.ones(48), site="ffn_in"), "site 'ffn_in' of layer layers.0, which this bank does not serve"),
        (low_rank(1, rank=4), "rank 4 .*made for rank 3"),
        ([low_rank(1), low_rank(2)], "rank 4 .*add up"),
        (fe.Probe(torch.ones(tiny.WIDTH)), "Probe reads"),
        (fe.Steer(torch.ones(tiny.WIDTH)).when(fe.Gate(torch.ones(tiny.WIDTH))), "behind a gate"),
        (fe.Steer(torch.ones(tiny.WIDTH), keep_norm=True), "keep_norm"),
        (fe.Steer(torch.ones(tiny.WIDTH), positions="first 2"), "positions=True"),
        ([fe.RED(), fe.Steer(torch.ones(tiny.WIDTH), positions="prompt")], "share their positions"),
        ([], "edits is empty"),
        (torch.ones(3), "expected an Edit"),
        ([fe.RED(), 3], "expected an Edit"),
    ],
)
def test_what_a_bank_cannot_hold_is_refused_before_anything_changes(edits, message):
    bank = bank_of(tiny.build("llama"))
    before = [t.clone() for t in bank.tables.buffers()]
    with pytest.raises((ValueError, TypeError), match=message):
        bank.add("new", edits)
    assert bank.names == ["anna", "ben", "cleo"]
    with pytest.raises((ValueError, TypeError), match=message):
        bank.replace("anna", edits)
    assert all(torch.equal(a, b) for a, b in zip(before, bank.tables.buffers(), strict=True))
    assert bank.stats().resident == 3 and len(bank.tables.free) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"capacity": 0}, "capacity is 0"), ({"capacity": True}, "capacity is True"), ({"rank": 65}, "rank is 65"),
        ({"sites": ()}, "sites is empty"), ({"sites": "nowhere"}, "no site 'nowhere'"), ({"layers": [9]}, "no layer 9"),
        ({"host": 10}, "give folder="), ({"host": -1, "folder": "x"}, "host is -1"),
    ],
)  # fmt: skip
def test_a_bank_that_makes_no_sense_is_refused_before_the_model_changes(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny.build("llama")
    before = tiny.state(model)
    with pytest.raises(ValueError, match=message):
        fe.Bank(model, **{"capacity": 2} | SERVED | options)
    tiny.assert_same_state(model, before)
    assert not list(tmp_path.iterdir())


def test_names_are_checked():
    bank = bank_of(tiny.build("llama"))
    with pytest.raises(ValueError, match="already: replace"):
        bank.add("anna", red(1))
    with pytest.raises(TypeError, match="name is 3, expected a string"):
        bank.add(3, red(1))
    for call in (bank.remove, bank.pin, bank.unpin, lambda n: bank.replace(n, red(1)), lambda n: bank.assign([n])):
        with pytest.raises(KeyError, match="no edit named 'zoe'; it holds 3: 'anna', 'ben', 'cleo'"):
            call("zoe")
