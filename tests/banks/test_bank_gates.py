"""Edits behind gates in a bank: one table more a place, still one op, each row as if all were edited alike."""

import copy

import pytest
import tiny_models as tiny
import torch
from bank_cases import SERVED, bank_of, drawn, ids, logits, low_rank, red

import fastedit as fe
from fastedit import Stack

NAMES = ["dot", "plain", "cosine", None, "soft"]


def gated(edit, seed, **how):
    """Behind a gate that lets some tokens through."""
    return edit.when(fe.Gate(drawn(seed, tiny.WIDTH), **how))


def edits(count=tiny.LAYERS):
    return {
        "dot": gated(red(1, count=count), 20), "plain": [red(2, count=count), low_rank(3, site="attn")],
        "cosine": gated(low_rank(5, rank=2, site="block", strength=0.5), 21, kind="cosine", threshold=0.02),
        "soft": [gated(fe.Steer(drawn(7, tiny.WIDTH), site="mlp"), 22, sharpness=2.0), low_rank(9, site="attn")],
    }  # fmt: skip


def bank_on(model, held=None, **options):
    return bank_of(model, edits() if held is None else held, **{"capacity": 6, "gates": True} | options)


def run(model, family, bank, names, strengths=None):
    with bank.assign(names, strengths):
        return tiny.output(model, family, batch=len(names))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_has_the_bits_of_the_batch_with_its_edit_on_every_row(family, dtype, fused):
    model = tiny.build(family, dtype)
    bank = bank_on(model, edits(tiny.number_of_layers(family)), fused=fused)
    mixed = run(model, family, bank, NAMES)
    outside = tiny.output(model, family, batch=len(NAMES))
    for row, name in enumerate(NAMES):
        alike = outside if name is None else run(model, family, bank, [name] * len(NAMES))
        assert torch.equal(mixed[row], alike[row]), name
        assert name is None or not torch.equal(mixed[row], outside[row]), name


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in ("dot", "cosine", "soft", "plain")] + [("soft", torch.bfloat16)]
)
def test_a_gated_edit_is_that_of_patch(name, dtype):
    """Within the promise of the patched model, whose reference is the patched model in float64. A hard gate is no smooth
    function of the rows: in bfloat16 one may be shut for the one and open for the other.
    """
    base = tiny.build("llama", dtype)
    model = copy.deepcopy(base)
    bank = bank_on(model)
    with bank.assign([name] * 3):
        found = tiny.output(model, "llama", batch=3)
    edit = edits()[name]
    with fe.patch(base, edit, fused=False):
        slow = tiny.output(base, "llama", batch=3)
    true = tiny.exact(copy.deepcopy(base))
    with fe.patch(true, edit, fused=False):
        tiny.assert_promise(found, slow, tiny.output(true, "llama", batch=3))


def test_gates_shut_and_open_rows():
    """At a threshold that nothing reaches an edit is none, at one that all reach it is the edit without a gate."""
    model, never, always = tiny.build("llama"), {"threshold": 1e6}, {"threshold": -1e6}
    held = {"shut": gated(red(1), 20, **never), "open": gated(red(1), 20, **always), "bare": red(1)}
    bank = bank_on(model, held, fused=False)
    with bank.assign(["shut", "open", "bare", None]):
        said = logits(model, ids()[:1].repeat(4, 1))
    assert torch.equal(said[0], said[3]) and torch.equal(said[1], said[2]) and not torch.equal(said[0], said[1])
    plain = bank_of(tiny.build("llama"), {"bare": red(1)}, fused=False)
    with plain.assign(["bare"] * 4):
        assert torch.equal(logits(plain.model, ids()[:1].repeat(4, 1))[2], said[2]), "an edit is the same in both banks"


def test_strengths_dial_what_the_gate_lets_through():
    model = tiny.build("llama")
    bank = bank_on(model)
    with bank.assign(["dot", "dot", "cosine", "soft"], [0.5, 0, 2, 1]):
        mixed = logits(model, ids())
    for row, name, strength in ((0, "dot", 0.5), (2, "cosine", 2), (3, "soft", 1)):
        twin = tiny.build("llama")
        with fe.patch(twin, edits()[name]) as handle:
            handle.strength = strength
            torch.testing.assert_close(logits(twin, ids())[row], mixed[row], rtol=1e-4, atol=1e-4)
    assert torch.equal(mixed[1], logits(model, ids())[1])


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_generation(how):
    model = tiny.build("llama")
    bank = bank_on(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | how
    with bank.assign(NAMES):
        mixed = model.generate(input_ids=ids(5), **options)
    for row, name in enumerate(NAMES):
        other = tiny.build("llama")
        if name is not None:
            fe.patch(other, edits()[name])
        alone = other.generate(input_ids=ids(5), **options)
        length = min(alone.shape[1], mixed.shape[1])
        assert torch.equal(alone[row, :length], mixed[row, :length]), name


def test_a_folder_a_handle_and_an_edit_give_the_same(tmp_path):
    model, source = tiny.build("llama"), tiny.build("llama")
    edit = gated(red(1), 20, kind="cosine", threshold=[0.01, 0.02, 0.03][: tiny.LAYERS], sharpness=4.0)
    handle = fe.patch(source, edit)
    handle.save(tmp_path / "edit")
    bank = bank_on(model, {"edit": edit, "handle": handle, "folder": tmp_path / "edit"})
    with bank.assign(["edit", "handle", "folder"]) as held:
        slots = held.slots.tolist()
    for layer in range(tiny.LAYERS):
        for table in (*bank.tables.tensors(f"layers.{layer}", "mlp")[:2], *bank.tables.gate(f"layers.{layer}", "mlp")):
            assert torch.equal(table[slots[0]], table[slots[1]]) and torch.equal(table[slots[0]], table[slots[2]])
    assert bank.tables.gate("layers.1", "mlp")[1][slots[0]].tolist() == pytest.approx([0.02, 4.0, 1.0])


def test_a_slot_holds_no_gate_of_the_edit_before(tmp_path):
    model = tiny.build("llama")
    bank = fe.Bank(model, 1, sites=("mlp", "attn", "block"), rank=2, gates=True, host=0, folder=tmp_path)
    for name, edit in edits().items():
        bank.add(name, edit)
    roomy = bank_on(tiny.build("llama"), rank=2)
    for name in ("dot", "plain", "soft", "cosine", "plain", "dot"):
        with bank.assign([name] * 2), roomy.assign([name] * 2):
            assert torch.equal(logits(model, ids(2)), logits(roomy.model, ids(2))), name


def test_positions_beside_gates():
    model, held = tiny.build("llama"), {"first": gated(red(1, positions="first 3"), 20), "all": gated(red(1), 20)}
    bank = bank_on(model, held, positions=True)
    with bank.assign(["first", "all", None]):
        mixed = logits(model, ids(3))
    for row, name in enumerate(("first", "all")):
        other = tiny.build("llama")
        fe.patch(other, held[name])
        torch.testing.assert_close(mixed[row], logits(other, ids(3))[row], rtol=1e-4, atol=1e-4)


def test_stacks_of_gated_edits_at_places_of_their_own():
    model = tiny.build("llama")
    bank = bank_on(model)
    with bank.assign([Stack("dot", "cosine"), Stack("cosine", "plain"), "plain"], [[1, 0.5], 1, 1]):
        mixed = logits(model, ids(3))
    halved = copy.copy(edits()["cosine"])
    halved.strength *= 0.5
    for row, listed in ((0, [edits()["dot"], halved]), (1, [edits()["cosine"], *edits()["plain"]])):
        other = tiny.build("llama")
        fe.patch(other, listed)
        torch.testing.assert_close(mixed[row], logits(other, ids(3))[row], rtol=1e-4, atol=1e-4)
    refused = r"cannot hold '\w+' beside '(dot|soft)', whose edit at site 'mlp' of layer layers\.0"
    for names in (("dot", "plain"), ("plain", "dot"), ("soft", "dot"), ("dot", "dot")):
        with pytest.raises(ValueError, match=refused):
            bank.assign([Stack(*names)])
    assert bank.stats().in_use == 0


def test_compiled_and_with_gradients():
    torch._dynamo.reset()
    model = tiny.build("llama", num_hidden_layers=1)
    bank = bank_on(model, edits(1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with bank.assign(NAMES):
        expected = logits(model, ids(5))
        torch.testing.assert_close(logits(compiled, ids(5)), expected, rtol=1e-4, atol=1e-4)
        embedded = model.get_input_embeddings()(ids(5)).detach().requires_grad_()
        said = model(inputs_embeds=embedded).logits
        torch.testing.assert_close(said.detach(), expected, rtol=1e-4, atol=1e-4)
        said.sum().backward()
    assert embedded.grad.isfinite().all() and (embedded.grad.abs().amax((1, 2)) > 0).all()


def test_only_a_bank_with_gates_has_tables_for_them():
    with_gates, without = (bank_of(tiny.build("llama"), {}, gates=gates) for gates in (True, False))
    more = with_gates.stats().device_bytes - without.stats().device_bytes
    assert more == 4 * len(with_gates.tables.places) * with_gates.capacity * (tiny.WIDTH + 3)
    assert not any(name.startswith(("gate", "rule")) for name, _ in without.tables.named_buffers())


@pytest.mark.parametrize(
    "rule, message",
    [
        (fe.Gate(drawn(1, tiny.WIDTH), decide="prompt"), r"decided on the prompt .* patch it separately, or decide yourself"),
        (fe.Gate(drawn(1, tiny.WIDTH), layer=0), "measures at layer 0, not what the edit is given"),
        (fe.Gate(drawn(1, tiny.WIDTH), kind="cast"), "of kind 'cast'"),
        (fe.Gate(drawn(1, tiny.WIDTH)) & fe.Gate(drawn(2, tiny.WIDTH)), "several gates are combined"),
        (~fe.Gate(drawn(1, tiny.WIDTH)), "several gates are combined"),
    ],
)
def test_other_gates_are_refused(rule, message):
    bank = bank_on(tiny.build("llama"))
    edit = fe.Steer(drawn(3, tiny.WIDTH), site="mlp").when(rule)
    with pytest.raises(ValueError, match=message):
        bank.add("new", edit)
    with fe.patch(tiny.build("llama"), edit) as handle, pytest.raises(ValueError, match=message):
        bank.add("new", handle)
    assert bank.stats().entries == 4


def test_a_gated_edit_is_alone_at_its_place_and_needs_gates():
    bank, bare = bank_on(tiny.build("llama")), fe.Bank(tiny.build("llama"), 2, **SERVED)
    one = gated(red(1), 20)
    with pytest.raises(ValueError, match=r"2 edits of one name are at site 'mlp' of layer layers\.0, one of them behind"):
        bank.add("two", [red(2), one])
    with pytest.raises(ValueError, match="behind a gate: make the bank with gates=True"):
        bare.add("one", one)
    assert not len(bare) and "two" not in bank
