"""Who is edited by what: generation under padding, beams and samples, packed sequences, positions, nesting."""

import threading

import pytest
import tiny_models as tiny
import torch
from bank_cases import bank_of, ids, logits, low_rank, red, three

import fastedit as fe

NAMES = ["anna", None, "cleo", "ben"]


def padded(batch=4, length=6):
    """Prompts of different lengths, padded on the left."""
    tokens, mask = ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : row % 3] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def prompted(model, given):
    return logits(model, given["input_ids"], attention_mask=given["attention_mask"])


def generated(model, given, **more):
    torch.manual_seed(0)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | more
    return model.generate(**given, **options)


# --- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_greedy_generation_of_a_mixed_batch_is_each_patched_model_s(family):
    model = tiny.build(family)
    edits = three(tiny.number_of_layers(family))
    bank = bank_of(model, edits)
    given = padded()
    more = {"return_dict_in_generate": True, "output_logits": True}
    with bank.assign(NAMES):
        mixed = generated(model, given, **more)
    for row, name in enumerate(NAMES):
        other = tiny.build(family)
        if name is not None:
            fe.patch(other, edits[name])
        alone = generated(other, given, **more)
        assert torch.equal(alone.sequences[row], mixed.sequences[row])
        found, own = (torch.stack(said.logits)[:, row] for said in (mixed, alone))
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
        unedited = torch.stack(generated(model, given, **more).logits)[0, row]
        assert name is None or (unedited - own[0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_beams_and_samples_belong_to_their_sequence(family, how):
    """Sampling draws the same numbers for the same batch, so rows alike say the same."""
    model = tiny.build(family)
    bank = bank_of(model, three(tiny.number_of_layers(family)))
    given, copies = padded(), how.get("num_return_sequences", 1)
    with bank.assign(NAMES):
        mixed = generated(model, given, **how)
    assert len(mixed) == 4 * copies
    for row, name in enumerate(NAMES):
        with bank.assign([name] * 4):
            alike = generated(model, given, **how)
        mine = slice(row * copies, (row + 1) * copies)
        length = min(alike.shape[1], mixed.shape[1])
        assert torch.equal(alike[mine, :length], mixed[mine, :length])


def test_a_cached_decode_step_has_the_assignment_of_its_time():
    model = tiny.build("llama")
    bank = bank_of(model)
    with torch.no_grad():
        cache = model(input_ids=ids(), use_cache=True).past_key_values
        with bank.assign(NAMES):
            mixed = model(input_ids=ids()[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        with bank.assign(["cleo"] * 4):
            alike = model(input_ids=ids()[:, :1], past_key_values=cache).logits
    assert torch.equal(mixed[2], alike[2]) and not torch.equal(mixed[0], alike[0])


# --- packed sequences ---------------------------------------------------------------------------------------------


def packed(model):
    """Three sequences in one row, and each alone."""
    tokens = ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    segment = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    blocked = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)
    blocked[segment[:, None] != segment[None]] = torch.finfo(torch.float32).min
    together = logits(model, tokens, position_ids=positions, attention_mask=blocked[None, None])[0]
    return tokens, segment, together


@pytest.mark.parametrize("fused", [True, False])
def test_packed_sequences_are_edited_by_token(fused):
    model = tiny.build("llama")
    bank = bank_of(model, fused=fused)
    owners = ["anna", None, "cleo"]
    segment = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    with bank.assign(owners, [0.5, 1, 1], tokens=segment):
        tokens, segment, together = packed(model)
    with bank.assign([[owners[s] for s in segment.tolist()]], [0.5] * 3 + [1] * 6):
        assert torch.equal(packed(model)[2], together)
    untouched = segment.masked_fill(segment == 1, -1)
    with bank.assign(["anna", "ben", "cleo"], [0.5, 1, 1], tokens=untouched[None]):
        assert torch.equal(packed(model)[2], together)
    for number, name in enumerate(owners):
        with bank.assign([name], 0.5 if number == 0 else 1.0):
            alone = logits(model, tokens[:, segment == number])[0]
            torch.testing.assert_close(together[segment == number], alone, rtol=1e-4, atol=1e-4)
    with bank.assign(["cleo"], tokens=torch.zeros(1, 9, dtype=torch.int32)):
        assert torch.equal(packed(model)[2][7:], together[7:])


# --- positions ----------------------------------------------------------------------------------------------------


def test_edits_at_positions_of_their_own_share_a_batch():
    edits = {
        "first": red(1, positions="first 2"), "last": low_rank(3, site="attn", positions="last 1"),
        "answer": [red(2, positions="generated"), low_rank(5, positions="generated")], "all": red(4),
    }  # fmt: skip
    model = tiny.build("llama")
    bank = bank_of(model, edits, positions=True)
    given, names = padded(5), ["first", "last", "answer", None, "all"]
    with bank.assign(names, [1, 2, 1, 1, 1]):
        mixed, said = generated(model, given), prompted(model, given)
    outside = prompted(model, given)
    for row, name in enumerate(names):
        other = tiny.build("llama")
        handle = None if name is None else fe.patch(other, edits[name])
        if name == "last":
            handle.strength = 2.0
        assert torch.equal(generated(other, given)[row], mixed[row])
        torch.testing.assert_close(prompted(other, given)[row], said[row], rtol=1e-4, atol=1e-4)
        with bank.assign([name] * 5, 2 if name == "last" else 1):
            assert torch.equal(prompted(model, given)[row], said[row])
    assert not torch.equal(said[0], outside[0]) and not torch.equal(said[1], outside[1])
    assert torch.equal(said[2:4], outside[2:4]), "a prompt has no generated tokens"
    assert not torch.equal(mixed[2], generated(model, given)[2])


# --- the context --------------------------------------------------------------------------------------------------


def test_assignments_nest_and_can_be_entered_again():
    model = tiny.build("llama")
    bank = bank_of(model)
    outer = bank.assign(["anna"] * 4)
    with outer:
        first = logits(model, ids())
        with bank.assign(["ben"] * 4):
            assert not torch.equal(logits(model, ids()), first)
        with pytest.raises(RuntimeError, match="in force already"), outer:
            pass
        assert torch.equal(logits(model, ids()), first)
    outside = logits(model, ids())
    with outer:
        assert torch.equal(logits(model, ids()), first)
        with pytest.raises(RuntimeError, match="leave it before close"):
            bank.close()
    assert torch.equal(logits(model, ids()), outside) and bank.stats().in_use == 0


def test_threads_have_assignments_of_their_own():
    model = tiny.build("llama")
    bank = bank_of(model)
    expected = {}
    for name in NAMES:
        with bank.assign([name] * 2):
            expected[name] = logits(model, ids(2))
    wrong, meet = [], threading.Barrier(4)

    def serve(name):
        with bank.assign([name] * 2):
            meet.wait()
            for _ in range(10):
                if not torch.equal(logits(model, ids(2)), expected[name]):
                    wrong.append(name)
            meet.wait()

    threads = [threading.Thread(target=serve, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_one_layer_carries_to_the_next_stays_with_its_thread():
    """Two forwards that enter every layer at the same time: a norm computed ahead is not the other one's, nor lost."""
    model = tiny.build("llama")
    bank = bank_of(model)
    expected, found, meet = {}, {}, threading.Barrier(2)
    for name in ("anna", "ben"):
        with bank.assign([name] * 2):
            expected[name] = logits(model, ids(2))
    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(lambda module, args: None if meet.wait(30) >= 0 else args)

    def serve(name):
        with bank.assign([name] * 2):
            found[name] = logits(model, ids(2))

    threads = [threading.Thread(target=serve, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_compiled_forward_refuses_to_guess_among_threads():
    torch._dynamo.reset()
    model = tiny.build("llama", num_hidden_layers=1)
    bank = bank_of(model, {"anna": red(1, count=1), "ben": red(2, count=1)})
    inside, done = threading.Event(), threading.Event()

    def other():
        with bank.assign(["ben"] * 4):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    try:
        with bank.assign(["anna"] * 4), pytest.raises(Exception, match="cannot tell threads apart"):
            logits(torch.compile(model, fullgraph=True, backend="eager"), ids())
    finally:
        done.set()
        thread.join()


def test_what_is_assigned_is_checked():
    model = tiny.build("llama")
    bank = bank_of(model)
    for names, more, message in (
        ([], {}, "given no names"), ("anna", {}, "one name per sequence"), (torch.zeros(2), {}, "one name per sequence"),
        ([1, 2], {}, "name is 1, expected a string"), (["anna", ["ben"]], {}, "lists beside names"),
        ([["anna"], ["ben", None]], {}, "different lengths"), (["anna"], {"strengths": [1, 2]}, "2 strengths for 1 names"),
        (["anna"], {"strengths": float("nan")}, "expected a finite"), (["anna"], {"tokens": torch.ones(2, 2)}, "integers"),
        (["anna"], {"tokens": torch.tensor([[0, 1]])}, "numbers from 0 to 1"),
        ([["anna"]], {"tokens": torch.tensor([[0]])}, "plain list"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            bank.assign(names, **more)
    with bank.assign(["anna"] * 3), pytest.raises(ValueError, match="given 3 names, but the batch has 4"):
        logits(model, ids())
    with bank.assign([["anna"] * 6]), pytest.raises(ValueError, match=r"one name per token for \(1, 6\)"):
        logits(model, ids(1, 7))
    assert bank.stats().in_use == 0
