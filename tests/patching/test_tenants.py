"""Many tenants trained in one batch: each as if it were alone."""

import copy

import numpy as np
import pytest
import tiny_models as tiny
import torch
from fastedit.kernels import reference
from patch_cases import handles, scrambled

import fastedit as fe
from fastedit.dispatch import why_not
from fastedit.patching.merge import MergeError

WHO = [0, 2, 1, 0, 2, None]
EDITS = {
    "RED": fe.RED,
    "LoReFT": lambda: fe.LoReFT(3),
    "DiReFT on mlp": lambda: fe.DiReFT(2, site="mlp"),
    "a stack": lambda: [fe.RED(), fe.NoReFT(2)],
    "LoReFT at both ends": lambda: fe.LoReFT(3, positions="first 2 + last 3"),
    "RED on the FFN input": lambda: fe.ScaleBias(site="ffn_in", positions="last 4"),
}


def tokens(rows=6):
    return torch.randint(3, tiny.VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(2))


def loss_of(model, ids):
    """The sum over sequences of each one's own mean: what a tenant adds does not depend on who else is there."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return each.mean(1).sum()


def patched(edits, **options):
    model = tiny.build("llama")
    return model, fe.patch(model, edits(), freeze=True, **options)


def train(model, handle, ids, who=None, steps=5):
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    for _ in range(steps):
        if who is None:
            loss_of(model, ids).backward()
        else:
            with handle.assign(who):
                loss = loss_of(model, ids)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", EDITS)
def test_a_tenant_trains_in_the_batch_as_it_does_alone(name, fused):
    """To fp32 rounding: sums over a tenant's rows are cut into other blocks among other tenants' rows, a matrix product of
    the model may give a row other last bits there, and AdamW's division by a small second moment spreads both.
    """
    model, handle = patched(EDITS[name], tenants=3, fused=fused)
    ids = tokens()
    train(model, handle, ids, WHO)
    start = patched(EDITS[name])[1].named_tensors()
    for tenant in range(3):
        alone, own = patched(EDITS[name], fused=fused)
        train(alone, own, ids[[i for i, who in enumerate(WHO) if who == tenant]])
        got, expected = handle.named_tensors(tenant=tenant), own.named_tensors()
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
            assert (tensor - start[key]).abs().max() > 1e-3
    tensors = [handle.named_tensors(tenant=t) for t in range(3)]
    assert any((tensors[0][k] - tensors[1][k]).abs().max() > 1e-3 for k in tensors[0])


def test_untouched_sequences_have_the_unedited_model_s_bits():
    model, handle = patched(EDITS["a stack"], tenants=3, fused=False)
    scrambled(handle)
    ids, bare = tokens(4), tiny.build("llama")
    with torch.no_grad():
        with handle.assign([None, 1, -1, 0]):
            mixed = model(input_ids=ids).logits
        with handle.assign([None] * 4):
            none = model(input_ids=ids).logits
        assert torch.equal(none, bare(input_ids=ids).logits)
    torch.testing.assert_close(mixed[[0, 2]], none[[0, 2]], rtol=1e-5, atol=1e-5)
    assert (mixed[[1, 3]] - none[[1, 3]]).abs().amax((1, 2)).min() > 1e-2


def test_a_tenant_s_edits_are_ordinary_ones(tmp_path):
    model, handle = patched(lambda: [fe.RED(), fe.LoReFT(2)], tenants=3)
    ids = tokens()
    train(model, handle, ids, WHO, steps=2)
    handle.save(tmp_path, tenant=2)
    by_object, by_file = tiny.build("llama"), tiny.build("llama")
    patched_on = fe.patch(by_object, handle.tenant(2))
    loaded = fe.load(by_file, tmp_path)
    assert [type(e) for e in loaded.edits] == [fe.RED, fe.LoReFT] == [type(e) for e in patched_on.edits]
    expected = handle.named_tensors(tenant=2)
    for other in (patched_on, loaded):
        found = other.named_tensors()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    with torch.no_grad(), handle.assign([2] * len(ids)):
        edited = model(input_ids=ids).logits
    torch.testing.assert_close(by_file(input_ids=ids).logits, edited, rtol=1e-5, atol=1e-5)
    assert torch.equal(by_object(input_ids=ids).logits, by_file(input_ids=ids).logits)


def test_the_slots_are_spread_once_a_batch():
    model, handle = patched(EDITS["LoReFT"], tenants=3)
    with handle.assign(WHO) as assignment:
        loss_of(model, tokens()).backward()
    assert len(assignment.slots) == 1


@pytest.mark.skipif(why_not("cpu") is not None, reason="the native module is not built")
def test_slots_changed_in_place_are_sorted_again():
    h, scale = torch.randn(6, 8), torch.ones(2, 8, requires_grad=True)
    slot = torch.zeros(6, dtype=torch.int32)
    for owner in (0, 1):
        slot.fill_(owner)
        fe.ops.edit(h, scale, slot=slot).sum().backward()
        assert (scale.grad[owner] != 0).all() and not scale.grad[1 - owner].any()
        scale.grad = None


def test_beams_belong_to_their_sequence_s_tenant():
    model, handle = patched(EDITS["RED"], tenants=2)
    scrambled(handle)
    ids, how = tokens(2), {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with handle.assign([0, 1]):
        mixed = model.generate(ids, **how)
        with pytest.raises(ValueError, match="given 2 tenants, but the batch has 6"), torch.no_grad():
            model(input_ids=ids.repeat_interleave(3, 0))
    for tenant in range(2):
        with handle.assign([tenant] * 2):
            alike = model.generate(ids, **how)
        length = min(alike.shape[1], mixed.shape[1])
        assert torch.equal(alike[tenant, :length], mixed[tenant, :length])


def test_assignments_nest_and_a_copy_has_its_own():
    model, handle = patched(EDITS["RED"], tenants=2)
    scrambled(handle)
    twin = copy.deepcopy(model)
    (other,) = handles(twin)
    ids = tokens(1)
    with torch.no_grad(), handle.assign([0]):
        first = model(input_ids=ids).logits
        with handle.assign([1]):
            assert not torch.equal(model(input_ids=ids).logits, first)
        assert torch.equal(model(input_ids=ids).logits, first)
        with pytest.raises(RuntimeError, match=r"inside `with handle.assign"):
            twin(input_ids=ids)
        with other.assign([0]):
            assert torch.equal(twin(input_ids=ids).logits, first)


def test_a_checkpointed_step_recomputes_under_its_assignment():
    plain, expected = patched(EDITS["LoReFT"], tenants=3, fused=False)
    model, handle = patched(EDITS["LoReFT"], tenants=3, fused=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with expected.assign(WHO):
        loss_of(plain.train(), tokens()).backward()
    with handle.assign(WHO):
        loss_of(model, tokens()).backward()
    for a, b in zip(expected.parameters(), handle.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    handle._tree.zero_grad()
    with handle.assign(WHO):
        loss = loss_of(model, tokens())
    with handle.assign(WHO[::-1]):  # of another step; this one has its forward's
        loss.backward()
    for a, b in zip(expected.parameters(), handle.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_compiled_forwards_follow_the_assignment():
    torch._dynamo.reset()
    model, handle = patched(EDITS["LoReFT"], tenants=3)
    scrambled(handle)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for who in (WHO, WHO[::-1]):
        with handle.assign(who):
            expected = loss_of(model, tokens())
            torch.testing.assert_close(loss_of(compiled, tokens()), expected, rtol=1e-5, atol=1e-5)


# --- refused ---------------------------------------------------------------------------------------------------


def test_what_tenants_cannot_do_is_refused(tmp_path):
    model, handle = patched(EDITS["RED"], tenants=2)
    with pytest.raises(RuntimeError, match="holds 2 tenants: run the model"):
        model(input_ids=tokens())
    with pytest.raises(ValueError, match="no tenant 2: this handle holds tenants 0 to 1"):
        handle.assign([0, 2])
    with pytest.raises(ValueError, match="no tenant True"):
        handle.assign([True])
    with pytest.raises(ValueError, match="given no tenants"):
        handle.assign([])
    with handle.assign([0, 1, 0, 1]), pytest.raises(ValueError, match="given 4 tenants, but the batch has 6"):
        model(input_ids=tokens())
    with pytest.raises(ValueError, match="a saved edit is one tenant's"):
        handle.save(tmp_path / "all")
    with pytest.raises(ValueError, match="no tenant 5"):
        handle.save(tmp_path / "other", tenant=5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(MergeError, match="weights can hold one edit"):
        handle.merge()
    with pytest.raises(ValueError, match="patch with tenants="):
        patched(EDITS["RED"])[1].assign([0])


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_a_wrong_number_of_tenants_is_refused_before_anything_changes(count):
    model = tiny.build("llama")
    before = tiny.state(model)
    with pytest.raises(ValueError, match="expected a whole number of tenants"):
        fe.patch(model, fe.RED(), tenants=count)
    tiny.assert_same_state(model, before)


def test_the_reference_knows_slots():
    h, scale = torch.randn(4, 6), torch.randn(2, 6)
    slot = torch.tensor([0, -1, 1, 1], dtype=torch.int32)
    out, _ = reference.edit(h, scale, None, None, None, None, slot, None)
    torch.testing.assert_close(out, torch.stack([h[0] * scale[0], h[1], h[2] * scale[1], h[3] * scale[1]]))


def test_gates_and_probes_are_refused():
    condition = torch.ones(tiny.WIDTH)
    for edit in (fe.Steer(condition).when(fe.Gate(condition)), fe.Probe(condition)):
        model = tiny.build("llama")
        with pytest.raises(ValueError, match="without tenants="):
            fe.patch(model, edit, tenants=2)
        assert not fe.patching.handle.handles(model)


def test_tenants_in_an_array_and_what_is_no_list():
    model, handle = patched(fe.RED, tenants=2)
    with handle.assign(np.array([0, 1])), torch.no_grad():
        model(input_ids=tokens(2))
    for wrong in (0, "01", None):
        with pytest.raises(TypeError, match="one tenant per sequence"):
            handle.assign(wrong)
