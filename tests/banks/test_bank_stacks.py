"""Stacks of a bank's names on one sequence: one slot a combination, made when first in use, gone with its parts."""

import copy
import threading

import pytest
import tiny_models as tiny
import torch
from bank_cases import bank_of, drawn, ids, logits, low_rank, red, three

import fastedit as fe
from fastedit import Stack
from fastedit.edits.form import at_strength

PAIR, TURNED, ALL = Stack("anna", "ben"), Stack("ben", "anna"), Stack("cleo", "anna", "ben")
NAMES = [PAIR, None, "anna", TURNED, ALL]


def run(model, family, bank, names, strengths=None):
    with bank.assign(names, strengths):
        return tiny.output(model, family, batch=len(names))


def said(model, bank, *names):
    with bank.assign(names):
        return logits(model, ids(len(names)))


def reds(capacity, count=4, **options):
    model = tiny.build("llama")
    edits = {f"e{n}": red(n) for n in range(count)}
    return model, bank_of(model, edits, capacity, sites=("mlp",), rank=0, **options)


def expected(*edits, rows=2):
    model = tiny.build("llama")
    fe.patch(model, list(edits))
    return logits(model, ids(rows))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_has_the_bits_of_the_batch_with_its_stack_on_every_row(family, dtype, fused):
    model = tiny.build(family, dtype)
    bank = bank_of(model, three(tiny.number_of_layers(family)), capacity=5, fused=fused)
    mixed = run(model, family, bank, NAMES)
    outside = tiny.output(model, family, batch=len(NAMES))
    alike = {name: outside if name is None else run(model, family, bank, [name] * len(NAMES)) for name in NAMES}
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed[row], alike[name][row]), name
    others = [alike[name] for name in NAMES] + [run(model, family, bank, ["ben"] * len(NAMES))]
    assert not any(torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_its_parts_one_after_the_other(dtype):
    """Against hooks in turn, in the model's dtype and in float64; and what `patch` says of the same list."""
    base = tiny.build("llama", dtype)
    model, patched, edits = copy.deepcopy(base), copy.deepcopy(base), three()
    bank = bank_of(model, capacity=5)
    mixed = run(model, "llama", bank, NAMES)
    for row, name in ((0, PAIR), (3, TURNED), (4, ALL)):
        listed = [edit for part in name.names for edit in (edits[part] if type(edits[part]) is list else [edits[part]])]
        with fe.patch(patched, listed) as handle:
            direct = tiny.output(patched, "llama", batch=5)
            forms = [(edit, layer, masters.form(), edit.strength) for edit, layer, masters in handle._each()]
        placed = [(e.site, layer.index, at_strength(_doubled(form), strength)) for e, layer, form, strength in forms]
        slow = tiny.output(tiny.hook_reference(base, "llama", placed), "llama", batch=5)
        true = tiny.output(tiny.hook_reference(tiny.exact(base), "llama", placed), "llama", batch=5)
        tiny.assert_promise(mixed[row], slow[row], true[row])
        tiny.assert_promise(direct[row], slow[row], true[row])


def _doubled(form):
    return type(form)(*(None if t is None else t.double() for t in form.tensors()))


def test_a_number_dials_the_stack_and_a_list_its_parts():
    model = tiny.build("llama")
    bank = bank_of(model, {"a": red(1), "b": [low_rank(5), red(2)]}, capacity=5, sites=("mlp", "block"))
    outside, pair = logits(model, ids(5)), Stack("a", "b")
    names, strengths = [pair, pair, pair, "a", pair], [1, 0.5, [0.5, 2], [0.5], [0, 0]]
    with pytest.raises(TypeError, match=r"a strength is \[0.5\], expected a number; a list of them is for a Stack"):
        bank.assign(names, strengths)
    strengths[3] = 0.5
    with bank.assign(names, strengths):
        mixed = logits(model, ids(5))
    for row, name in enumerate(names):
        with bank.assign([name] * 5, [strengths[row]] * 5):
            assert torch.equal(logits(model, ids(5))[row], mixed[row])
    assert bank.stats().stacks == 3, "a dialled stack shares the slot of the stack; each list of dials has its own"
    folded = fe.Bank(tiny.build("llama"), 1, sites=("mlp", "block"), rank=2)
    folded.add("both", [red(1), low_rank(5), red(2)])
    with folded.assign(["both"] * 5, 0.5):
        close(mixed[1], logits(folded.model, ids(5))[1])
    with folded.assign(["both"] * 5, 1.0):
        assert not torch.allclose(mixed[1], logits(folded.model, ids(5))[1], atol=1e-2)
    parts = bank_of(tiny.build("llama"), {"a": red(1, strength=0.5)}, capacity=1)
    twice = bank_of(parts.model, {"b": [low_rank(5), red(2)]}, capacity=1)
    with parts.assign(["a"] * 5), twice.assign(["b"] * 5, 2):
        close(mixed[2], logits(parts.model, ids(5))[2])
    assert torch.equal(mixed[4], outside[4])


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_under_stacks(how):
    model = tiny.build("llama")
    bank = bank_of(model, capacity=5)
    names, copies = NAMES[:4], how.get("num_return_sequences", 1)

    def generated(names):
        torch.manual_seed(0)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | how
        with bank.assign(names):
            return model.generate(input_ids=ids(), **options)

    mixed = generated(names)
    for row, name in enumerate(names):
        alike, mine = generated([name] * 4), slice(row * copies, (row + 1) * copies)
        length = min(alike.shape[1], mixed.shape[1])
        assert torch.equal(alike[mine, :length], mixed[mine, :length])
    if not how:
        other = tiny.build("llama")
        fe.patch(other, [red(1), *three()["ben"]])
        alone = other.generate(input_ids=ids(), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(alone[0], mixed[0]) and not torch.equal(generated(["anna"] * 4)[0], mixed[0])


def test_tokens_of_a_packed_row_may_be_under_stacks():
    model = tiny.build("llama")
    bank = bank_of(model, capacity=5)
    owners, segment = [PAIR, None, "cleo"], [0, 0, 0, 1, 1, 2, 2]
    with bank.assign(owners, [[1, 0.5], 1, 1], tokens=torch.tensor([segment])):
        packed = logits(model, ids(1))
    with bank.assign([[owners[s] for s in segment]], [[1, 0.5]] * 3 + [1] * 4):
        assert torch.equal(logits(model, ids(1)), packed)
    with bank.assign([PAIR], [[1, 0.5]]):
        assert torch.equal(logits(model, ids(1))[0, :3], packed[0, :3])
    with bank.assign([PAIR]):
        assert not torch.equal(logits(model, ids(1))[0, :3], packed[0, :3])


def test_parts_at_the_same_positions():
    edits = {"a": red(1, positions="first 2"), "b": low_rank(3, site="attn", positions="first 2"), "c": red(4)}
    model = tiny.build("llama")
    bank = bank_of(model, edits, capacity=3, positions=True)
    names = [Stack("a", "b"), "c"]
    close(said(model, bank, *names)[0], expected(edits["a"], edits["b"])[0])
    assert torch.equal(said(model, bank, *names)[0], said(model, bank, *names[:1] * 2)[0])
    with pytest.raises(ValueError, match="same tokens, but these do not: 'a' on first 2, 'c' on all"):
        bank.assign([Stack("a", "c")])


# --- slots --------------------------------------------------------------------------------------------------------


def test_a_combination_takes_one_slot_and_its_parts_none():
    model, bank = reds(capacity=2)
    pair, other = Stack("e0", "e1"), Stack("e1", "e0", "e2")
    close(said(model, bank, pair, other), torch.stack([
        expected(red(0), red(1))[0], expected(red(1), red(0), red(2))[1],
    ]))  # fmt: skip
    assert bank.resident == [] and bank.stats().stacks == 2 and bank.stats().loads == 2
    before = bank.stats()
    said(model, bank, other, pair)
    assert bank.stats().hits == before.hits + 2 and bank.stats().loads == before.loads
    with pytest.raises(fe.BankFullError, match="3 different edits in one batch, and the bank has a capacity of 2"):
        said(model, bank, pair, other, "e0")
    with bank.assign([pair]):
        bank.pin("e3")
        with pytest.raises(fe.BankFullError, match=r"no slot for Stack\('e1', 'e0', 'e2'\)"), bank.assign([other]):
            pass
        assert bank.resident == ["e3"] and bank.stats().stacks == 1
    bank.prefetch([other])
    assert bank.stats().stacks == 1 and "e3" in bank.resident
    bank.prefetch(["e0"])
    assert bank.stats().stacks == 0 and not bank._books.combinations, "evicted: nothing of it is kept"
    assert bank.stats().in_use == 0


def test_the_least_recently_used_makes_room_be_it_an_edit_or_a_stack():
    model, bank = reds(capacity=2, count=2)
    said(model, bank, "e1")
    said(model, bank, Stack("e0", "e1"))
    assert bank.resident == ["e1"] and bank.stats().stacks == 1
    said(model, bank, "e1")
    said(model, bank, "e0")
    assert bank.resident == ["e1", "e0"] and bank.stats().stacks == 0


def test_a_replaced_part_changes_later_assignments_and_not_those_entered():
    model, bank = reds(capacity=3, count=2)
    pair, alone = Stack("e0", "e1"), Stack("e0")
    asked = bank.assign([pair, alone])
    with asked:
        before = logits(model, ids(2))
        bank.replace("e0", red(7))
        assert torch.equal(logits(model, ids(2)), before)
    with asked:
        after = logits(model, ids(2))
    close(after, torch.stack([expected(red(7), red(1))[0], expected(red(7))[1]]))
    assert not torch.allclose(before, after, atol=1e-2)
    assert len(bank.tables.free) + bank.stats().resident + bank.stats().stacks == 3
    with asked:
        bank.remove("e1")
        assert torch.equal(logits(model, ids(2)), after)
        bank.add("e1", red(9))
    close(said(model, bank, pair, alone)[0], expected(red(7), red(9))[0])
    bank.remove("e1")
    assert bank.stats().stacks == 1, "an idle stack goes with its part"
    with pytest.raises(KeyError, match="no edit named 'e1'"):
        bank.assign([pair])
    with pytest.raises(KeyError, match="no edit named 'e1'"), asked:
        pass
    assert bank.stats().in_use == 0


def test_a_replacement_that_no_longer_fits_is_refused_on_entering():
    model = tiny.build("llama")
    bank = bank_of(model, {"a": low_rank(1, rank=2), "b": low_rank(2, rank=1)}, capacity=3)
    asked = bank.assign([Stack("a", "b")])
    bank.replace("b", low_rank(3, rank=2))
    with pytest.raises(ValueError, match=r"Stack\('a', 'b'\) has rank 4 at site 'block' of layer layers\.0"), asked:
        pass
    assert bank.stats().in_use == 0 and bank.stats().stacks == 0 and len(bank.tables.free) == 1


def test_parts_in_files(tmp_path):
    model, bank = reds(capacity=1, count=3, host=0, folder=tmp_path)
    assert bank.stats().on_host == 0
    close(said(model, bank, Stack("e0", "e2"), Stack("e0", "e2")), expected(red(0), red(2)))
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match="cannot be read"):
        said(model, bank, Stack("e1", "e0"))
    assert len(bank.tables.free) == 1 and not bank._books.combinations and bank.stats().in_use == 0
    assert not any(entry.folding for entry in bank._books.entries.values())


def test_a_part_of_lower_rank_elsewhere_keeps_its_rank():
    """A host copy is padded to the largest rank of a width; what counts for a stack is each place's own."""
    model = tiny.build("llama")
    edits = {"a": [low_rank(1, rank=3, layers=[0]), low_rank(4, rank=1, layers=[1])], "b": low_rank(7, rank=2, layers=[1])}
    bank = bank_of(model, edits, capacity=2)
    close(said(model, bank, Stack("a", "b"), Stack("b", "a"))[0], expected(*edits["a"], edits["b"])[0])
    with pytest.raises(ValueError, match=r"has rank 5 at site 'block' of layer layers\.1"):
        bank.assign([Stack("a", "b", "b")])


def test_a_copied_bank_makes_its_stacks_anew():
    model, bank = reds(capacity=2)
    before = said(model, bank, Stack("e0", "e1"), Stack("e2", "e3"))
    twin = copy.deepcopy(model)
    (other,) = fe.banks.bank.banks(twin)
    assert len(other.tables.free) == 2 and other.stats().stacks == 0
    assert torch.equal(said(twin, other, Stack("e0", "e1"), Stack("e2", "e3")), before)
    bank.close()
    other.close()


def test_threads_replace_and_remove_parts_while_stacks_are_in_use(tmp_path):
    """A stack is always of whole edits, its steady part as it is and the other one of those that it has had."""
    model, bank = reds(capacity=4, count=2, host=768, folder=tmp_path)
    bank.add("turn", red(2))
    allowed = [expected(red(0), red(n))[0] for n in (2, 3)]
    wrong, stop = [], threading.Event()

    def watched(work):
        def run():
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                wrong.append(repr(error))
                stop.set()

        return threading.Thread(target=run)

    def turn():
        bank.replace("turn", red(3))
        bank.replace("turn", red(2))

    def churn():
        bank.add("x", red(30))
        with bank.assign([Stack("x", "e1")]):
            bank.remove("x")

    def serve():
        found = said(model, bank, Stack("e0", "turn"), None)[0]
        if not any(torch.allclose(found, one, rtol=1e-4, atol=1e-4) for one in allowed):
            wrong.append("a torn stack")

    threads = [watched(work) for work in (turn, churn, serve, serve)]
    for thread in threads:
        thread.start()
    stop.wait(3)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not wrong
    stats, books = bank.stats(), bank._books
    assert stats.in_use == 0 and len(bank.tables.free) + stats.resident + stats.stacks == bank.capacity
    assert stats.stacks == len(books.combinations) and not any(entry.folding for entry in books.entries.values())


# --- refused ------------------------------------------------------------------------------------------------------


def test_what_is_no_stack_is_refused():
    bank = bank_of(tiny.build("llama"))
    for names, message in (
        ((), "given no names"), ((3,), "given 3, expected the names"), ((None, "a"), "given None"),
        ((["anna", "ben"],), r"takes the names themselves: Stack\('anna', 'ben'\)"), ((PAIR,), "expected the names of edits"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            Stack(*names)
    for names, strengths, message in (
        ([PAIR], [[1, 2, 3]], "3 strengths for the 2 parts of Stack"), ([PAIR], [0.5, 1], "2 strengths for 1 names"),
        ([PAIR], [[1, float("inf")]], "expected a finite number"), (["anna", ["ben", "cleo"]], None, r"is fastedit.Stack\("),
        (PAIR, None, "expected a list with one name per sequence"), ([Stack("low", "low")], None, "has rank 4 at site 'attn'"),
    ):  # fmt: skip
        if "low" not in bank:
            bank.add("low", low_rank(1, site="attn"))
        with pytest.raises((TypeError, ValueError), match=message):
            bank.assign(names, strengths)
    with bank.assign([["anna", "ben"]] * 2), pytest.raises(ValueError, match=r"one name per token.*is fastedit.Stack\("):
        logits(bank.model, ids(2))
    for call in (bank.add, bank.replace):
        with pytest.raises(TypeError, match="expected a string"):
            call(PAIR, red(1))
    assert bank.stats().in_use == 0 and Stack("anna", "ben") == PAIR and PAIR not in (TURNED, "anna")


def test_the_identity_of_a_stack_is_that_of_no_edit():
    model = tiny.build("llama")
    bank = bank_of(model, {"none": fe.RED(), "also": fe.ScaleBias(torch.ones(tiny.WIDTH), site="attn")}, fused=False)
    assert torch.equal(said(model, bank, Stack("none", "also"), None), logits(model, ids(2)))


def test_drawn_stacks_are_what_a_bank_holds_under_one_name():
    """Any order of up to four of five edits: the slot of a stack has the numbers of the same list added as one edit."""
    edits = [red(1), low_rank(5, site="mlp"), fe.Steer(drawn(3, tiny.WIDTH), site="mlp"), red(4), low_rank(8, rank=1, site="mlp")]
    bank = bank_of(tiny.build("llama"), {str(n): edit for n, edit in enumerate(edits)}, capacity=2, rank=12)
    for seed in range(12):
        order = torch.randint(5, (1 + seed % 4,), generator=torch.Generator().manual_seed(seed)).tolist()
        stack = Stack(*map(str, order))
        bank.add("listed", [edits[n] for n in order])
        with bank.assign([stack, "listed"]) as held:
            first, second = held.slots.tolist()
            for layer in range(tiny.LAYERS):
                for table in bank.tables.tensors(f"layers.{layer}", "mlp"):
                    torch.testing.assert_close(table[first], table[second], rtol=1e-5, atol=1e-6)
        bank.remove("listed")
