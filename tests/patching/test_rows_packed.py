"""Packed rows: each sequence is edited as it is in a row of its own."""

import copy

import pytest
import torch
from row_models import VECTOR, build, last_layer, site_of

import fastedit as fe
from fastedit.patching.rows.packing import packing_of

FAMILIES = ("llama", "gpt2", "gemma3_text")
LENGTHS = (4, 3, 5)
PARTS = [torch.randint(3, 60, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
PACKED = torch.cat(PARTS, 1)
RESTARTING = torch.cat([torch.arange(n) for n in LENGTHS])[None]
ENDS = torch.tensor([0, 4, 7, 12], dtype=torch.int32)
NUMBERS = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5])
SAID = {
    "position_ids": {"position_ids": RESTARTING},
    "cu_seq_lens_q": {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 5, "max_length_k": 5},
    "seq_idx": {"seq_idx": NUMBERS.int()},
    "all of them": {"position_ids": RESTARTING, "cu_seq_lens_q": ENDS, "seq_idx": NUMBERS.int()},
}


def edited_at(model, positions, gate=None):
    edit = fe.Steer(VECTOR, site=site_of(model), layers=[last_layer(model).index], positions=positions)
    return fe.patch(model, edit if gate is None else edit.when(gate))


def of_site(model, run):
    """(what reaches the edited site, what leaves it) in a forward."""
    seen = []
    module = last_layer(model).at(site_of(model))
    hook = module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        run()
    hook.remove()
    return seen[-1].clone()


def edited_tokens(family, positions, gate=None, lengths=None, **given):
    """(tokens,) of the packed row: the share of VECTOR that the site's output gained."""
    plain, model = build(family), build(family)
    handle = edited_at(model, positions, gate)
    if lengths is not None:
        handle.prompt(lengths)
    before = of_site(plain, lambda: plain(PACKED, use_cache=False, **given))
    after = of_site(model, lambda: model(PACKED, use_cache=False, **given))
    return ((after - before) @ VECTOR.double() / (VECTOR.double() @ VECTOR.double()))[0]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_each_sequence(family, said):
    expected = {
        "first 2": [1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0], "last 1": [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1],
        "first 1 + last 2": [1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1], "generated": [0] * 12,
    }  # fmt: skip
    for positions in expected if said == "position_ids" else ("first 1 + last 2",):
        share = edited_tokens(family, positions, **SAID[said])
        torch.testing.assert_close(share.float(), torch.tensor(expected[positions]).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_each_prompt_ends_is_said_by_sequence(family):
    share = edited_tokens(family, "generated", lengths=torch.tensor([3, 1, 2]), **SAID["position_ids"])
    expected = torch.tensor([0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1]).float()
    torch.testing.assert_close(share.float(), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="was given 2 lengths, but this forward packs 3 sequences"):
        edited_tokens(family, "generated", lengths=torch.tensor([3, 1]), **SAID["position_ids"])


@pytest.mark.parametrize("decide", ["prompt", "prompt mean"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_gate_decides_for_each_sequence(family, decide):
    """As it decides where each has a row of its own. GPT-2's and Llama's attention keep packed sequences apart here."""
    plain = build(family)
    arriving = of_site(plain, lambda: plain(PACKED, use_cache=False, **SAID["position_ids"]))[0]
    condition = VECTOR[torch.arange(31, -1, -1)]
    rows = arriving.split(LENGTHS)
    scores = torch.stack([(part[-1] if decide == "prompt" else part.mean(0)) @ condition.double() for part in rows])
    middle = float(scores.sort().values[:2].mean())
    gate = fe.Gate(condition, threshold=middle, decide=decide)
    share = edited_tokens(family, None, gate, **SAID["position_ids"])
    expected = torch.cat([torch.full((n,), float(s > middle)) for n, s in zip(LENGTHS, scores, strict=True)])
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(share.float(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_gradients_are_those_of_the_rows_apart(family):
    """Attention keeps packed sequences apart, so a packed step is the sum of the steps of each."""
    grads = []
    for packed in (True, False):
        model = build(family)
        edit = fe.ScaleBias(site="block", layers=[last_layer(model).index], positions="first 1 + last 1")
        handle = fe.patch(model, edit, freeze=True)
        runs = [(PACKED, {"position_ids": RESTARTING})] if packed else [(part, {}) for part in PARTS]
        for ids, given in runs:
            model(ids, use_cache=False, **given).logits.square().sum().backward()
        grads.append([p.grad for p in handle.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_two_packed_rows_and_a_compiler():
    model = build("llama", num_hidden_layers=1)
    edited_at(model, "last 1")
    ids = torch.cat([PACKED, PACKED.flip(1)])
    places = torch.cat([RESTARTING, torch.cat([torch.arange(n) for n in (6, 6)])[None]])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        eager = of_site(model, lambda: model(ids, position_ids=places, use_cache=False))
        seen = compiled(ids, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(seen, model(ids, position_ids=places, use_cache=False).logits)
    plain = build("llama", num_hidden_layers=1)
    before = of_site(plain, lambda: plain(ids, position_ids=places, use_cache=False))
    moved = ((eager - before).abs().sum(-1) > 1e-3).int()
    assert moved.tolist() == [[0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]]


def test_masks_that_number_sequences_and_padding_between():
    mask = torch.tensor([[0, 1, 1, 0, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
    packing = packing_of({}, mask, (2, 8), "cpu", True)
    assert packing.sequences() == 3 and packing.several()
    real = mask > 0
    assert packing.index[real].tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert packing.length[real].tolist() == [2, 2, 3, 3, 3] + [6] * 6
    assert packing_of({}, (mask > 0).long(), (2, 8), "cpu", True) is None, "0 and 1 are padding, in the middle, too"
    places = torch.tensor([[0, 0, 1, 0, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 0, 0]])
    both = packing_of({"position_ids": places}, (mask > 0).long(), (2, 8), "cpu", True)
    assert torch.equal(both.index[real], packing.index[real])


WRONG = [
    ({"position_ids": RESTARTING, "cu_seq_lens_q": torch.tensor([0, 5, 12])}, "do not agree"),
    ({"cu_seq_lens_q": torch.tensor([0, 5, 11])}, "cumulative lengths from 0 to the batch's 1 × 12"),
    ({"cu_seqlens": torch.tensor([2, 12])}, "cumulative lengths"),
    ({"position_ids": RESTARTING + 1}, "neither continue by one nor begin again at 0"),
    ({"position_ids": 2 * torch.arange(12)[None]}, "neither continue by one"),
    ({"seq_idx": torch.zeros(1, 5, dtype=torch.int32)}, "seq_idx has shape"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=lambda v: v[:12] if isinstance(v, str) else None)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_starts_that_cannot_be_known_are_refused(family, given, message):
    model = build(family)
    edited_at(model, "first 1")
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model.base_model(PACKED, use_cache=False, **given)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_tenants_of_a_pack_are_refused(family):
    model = build(family)
    handle = fe.patch(model, fe.ScaleBias(site="block", layers=[0]), tenants=2)
    with handle.assign([1]):
        model(PACKED, use_cache=False)
        with pytest.raises(ValueError, match="tenants are one per row, but the rows of this forward are packed, with 3"):
            model(PACKED, use_cache=False, **SAID["position_ids"])


def test_a_packed_decision_is_not_the_next_forwards():
    model = build("llama")
    edited_at(model, None, fe.Gate(VECTOR, decide="prompt"))
    with torch.no_grad():
        cache = model(PACKED, use_cache=True, **SAID["position_ids"]).cache
        with pytest.raises(RuntimeError, match="has not seen this cache's prompt"):
            model(PACKED[:, :1], cache=copy.copy(cache))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_probe_reads_a_pack_by_token(family):
    model = build(family)
    layer = last_layer(model).index
    handle = fe.patch(model, fe.Probe(VECTOR, site="block", layers=[layer]))
    rows = of_site(model, lambda: model(PACKED, use_cache=False, **SAID["position_ids"]))
    read = handle.readings[0][0, ..., 0]
    assert read.shape == PACKED.shape
    torch.testing.assert_close(read.double(), rows @ VECTOR.double(), rtol=1e-4, atol=1e-4)
