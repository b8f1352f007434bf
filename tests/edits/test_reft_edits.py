"""What trains by representation finetuning: looked at, saved and copied; its kernels' gradients; rotations that train."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from patch_cases import handles
from test_reft_training import bases, loss_of, off, patched, train

import fastedit as fe
from fastedit.patching.orthonormal_basis import TOLERANCE

# --- looking, saving, copying ------------------------------------------------------------------------------------


def stepped():
    """A model whose optimiser has just moved the basis off the manifold: no forward since."""
    model, handle = patched()
    train(model, handle, 2)
    assert max(off(b) for b in bases(handle)) > 1e-4
    return model, handle


@pytest.mark.parametrize("look", ["named_tensors", "state_dict", "eval", "inference_mode", "stack"])
def test_whoever_looks_first_sees_an_orthonormal_basis(look):
    model, handle = stepped()
    if look == "named_tensors":
        seen = [t for n, t in handle.named_tensors().items() if n.endswith("write")]
    elif look == "state_dict":
        seen = [t for n, t in model.state_dict().items() if n.endswith("write")]
    elif look == "stack":
        fe.patch(model, fe.Steer(torch.randn(tiny.WIDTH)))
        tiny.output(model, "llama")
        seen = bases(handle)
    else:
        with torch.inference_mode(look == "inference_mode"), torch.no_grad():
            model(**tiny.inputs("llama"))
        seen = bases(handle)
    assert max(off(t) for t in seen) <= TOLERANCE
    loss_of(model).backward()  # and can be trained on


def test_a_saved_edit_holds_the_basis_and_loads_as_it_was(tmp_path):
    model, handle = stepped()
    handle.save(tmp_path)
    expected = tiny.output(model, "llama")
    other = tiny.build("llama")
    loaded = fe.load(other, tmp_path, freeze=True)
    assert [type(e) for e in loaded.edits] == [fe.LoReFT]
    assert torch.equal(tiny.output(other, "llama"), expected)
    for a, b in zip(handle.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    assert train(model, handle, 2) == train(other, loaded, 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_trains_on_its_own(how):
    model, handle = stepped()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    (other,) = handles(twin)
    assert torch.equal(tiny.output(model, "llama"), tiny.output(twin, "llama"))
    before = [p.detach().clone() for p in handle.parameters()]
    train(twin, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))
    assert max(off(t) for n, t in other.named_tensors().items() if n.endswith("write")) <= TOLERANCE


def test_all_layers_are_retracted_at_once(monkeypatch):
    from fastedit.patching import masters

    model, _ = stepped()
    calls = []
    real = masters.retracted
    monkeypatch.setattr(masters, "retracted", lambda bases: calls.append(bases.shape) or real(bases))
    loss_of(model).backward()
    loss_of(model).backward()
    tiny.output(model, "llama")
    assert calls == [(tiny.LAYERS, 4, tiny.WIDTH)]


def test_loreft_starts_as_the_identity_and_merges(tmp_path):
    model = tiny.build("llama")
    before = tiny.output(model, "llama")
    with fe.patch(model, fe.LoReFT(4), fused=False):
        assert torch.equal(tiny.output(model, "llama"), before)
    handle = fe.patch(model, fe.LoReFT(4, site="mlp"), freeze=True)
    train(model, handle, 3)
    edited = tiny.output(model, "llama")
    handle.merge()
    torch.testing.assert_close(tiny.output(model, "llama"), edited, rtol=1e-4, atol=1e-4)
    handle.unmerge()
    assert torch.equal(tiny.output(model, "llama"), edited)


def test_a_rank_beyond_the_width_is_refused():
    model = tiny.build("llama")
    before = tiny.state(model)
    with pytest.raises(ValueError, match=f"rank {tiny.WIDTH + 1}.*no more than {tiny.WIDTH} orthonormal rows"):
        fe.patch(model, fe.LoReFT(tiny.WIDTH + 1))
    tiny.assert_same_state(model, before)


def test_a_dial_scales_a_trained_edit():
    model, handle = patched()
    train(model, handle, 2)
    handle.strength = 0.0
    torch.testing.assert_close(tiny.output(model, "llama"), tiny.output(tiny.build("llama"), "llama"), rtol=1e-5, atol=1e-5)


# --- the gradient of read from the edit's output -------------------------------------------------------------------


def low_rank(dtype, rows=300, width=48, rank=4):
    h, residual = torch.randn(rows, width), torch.randn(rows, width)
    read, offset, write = torch.randn(rank, width) / width**0.5, torch.randn(rank), torch.randn(rank, width) / 5
    return h.to(dtype), residual.to(dtype), read, offset, write


def gradients(op, tensors, grads, grad_z, strength):
    """d_read of an op whose rows are the sum of its first two tensors."""
    x, residual, *form = (t.clone().requires_grad_() for t in tensors)
    out, z = op(x, residual, *form, strength)
    torch.autograd.backward([out, z], [grads.to(out.dtype), grad_z.to(z.dtype)])
    return form[0].grad


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["edit", "edit_add", "edit_add_norm"])
def test_the_gradient_of_read_keeps_the_promise_without_the_edit_s_input(op, dtype, strength):
    tensors = low_rank(dtype)
    weight = torch.ones(48)
    grads, grad_z = torch.randn(300, 48).to(dtype), torch.randn(300, 4)
    options = {"strength": strength, "return_projection": True}

    def definition(x, residual, read, offset, write, strength):
        h = (x if op == "edit" else x + residual).to(torch.promote_types(x.dtype, read.dtype))
        z = h @ read.T + offset
        out = (h + (1.0 if strength is None else strength) * (z @ write)).to(x.dtype)
        if op == "edit_add_norm":
            wide = out.to(h.dtype)
            out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return out, z

    def ours(x, residual, read, offset, write, strength):
        form = {"read": read, "offset": offset, "write": write}
        if op == "edit":
            return fe.ops.edit(x, **form, **options)
        if op == "edit_add":
            return fe.ops.edit_add(x, residual, **form, on="sum", **options)
        return fe.ops.edit_add_norm(x, residual, weight.to(dtype), **form, on="sum", **options)[1:]

    exact = gradients(definition, [t.double() for t in tensors], grads, grad_z, strength)
    eager = gradients(definition, tensors, grads, grad_z, strength)
    tiny.assert_promise(gradients(ours, tensors, grads, grad_z, strength), eager, exact)


def kept_bytes(edit):
    """What a step's graph holds, parameters and model weights apart."""
    model, _ = patched(edit)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = loss_of(model)
    return sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in owned), loss


def test_a_trained_low_rank_edit_keeps_no_rows_of_its_own():
    """Beside an edit that trains a bias alone, which needs none: z, and R's and W − R's few numbers."""
    (bias, _), (loreft, _) = kept_bytes(fe.ScaleBias(scale=False, site="block")), kept_bytes(fe.LoReFT(4))
    rows = 2 * 7
    allowed = tiny.LAYERS * 4 * (rows * 4 + 4 * 4 * tiny.WIDTH)
    assert loreft - bias <= allowed < tiny.LAYERS * 4 * (rows * tiny.WIDTH) + allowed


# --- a rotation whose plane and angle train ---------------------------------------------------------------------


def rotation(angle=0.4):
    plane = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(4))
    return {kind: fe.Rotate(plane, angle, trainable=kind) for kind in (False, True)}


def test_a_rotation_that_trains_is_the_frozen_one_until_it_does(tmp_path):
    expected = tiny.build("llama")
    fe.patch(expected, rotation()[False])
    model, handle = patched(rotation()[True])
    torch.testing.assert_close(tiny.output(model, "llama"), tiny.output(expected, "llama"), rtol=1e-5, atol=1e-5)
    assert {n.rpartition(".")[2] for n in handle.named_tensors()} == {"plane", "angle"}
    losses = train(model, handle, 20)
    assert losses[-1] < losses[0]
    found = handle.named_tensors()
    assert all(off(t) <= TOLERANCE for n, t in found.items() if n.endswith("plane"))
    assert all((t - 0.4).abs() > 1e-3 for n, t in found.items() if n.endswith("angle"))
    handle.save(tmp_path)
    other = tiny.build("llama")
    fe.load(other, tmp_path)
    assert torch.equal(tiny.output(other, "llama"), tiny.output(model, "llama"))


@pytest.mark.parametrize("lead", [(), (3,)])
def test_gradients_of_a_rotation_are_autograd_s(lead):
    from fastedit.edits.plane_rotation import turned, turned_back

    masters = {"plane": torch.randn(*lead, 2, 7).double(), "angle": torch.randn(*lead, 1).double()}
    leaves = {n: t.clone().requires_grad_() for n, t in masters.items()}
    _, _, read, _, write = turned(leaves)
    d_read, d_write = torch.randn_like(read), torch.randn_like(write)
    torch.autograd.backward([read, write], [d_read, d_write])
    got = turned_back(masters, (None, None, d_read, None, d_write))
    for name, leaf in leaves.items():
        torch.testing.assert_close(got[name], leaf.grad)
