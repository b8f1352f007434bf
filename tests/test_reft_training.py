"""LoReFT: a basis that stays orthonormal under any optimiser, wrapper and way of running a step."""

import copy
import pickle
import warnings

import pytest
import tiny_models as tiny
import torch
from patch_cases import handles
from torch.nn.utils import parametrizations

import fastedit as fe
from fastedit.orthonormal import TOLERANCE, retracted, tangent

STEP = 1e-2


def off(basis):
    """How far rows are from orthonormal, in float64."""
    wide = basis.double()
    return (wide @ wide.mT - torch.eye(wide.shape[-2], dtype=torch.float64)).abs().max().item()


def bases(handle):
    """The parameters themselves, as an optimiser holds them: nothing is settled by looking."""
    return [m._parameters["write"] for _, _, m in handle._each()]


def loss_of(model, **changes):
    given = tiny.inputs("llama", **changes)
    return model(**given, labels=given["input_ids"], use_cache=False).loss


def patched(edit=None, **options):
    model = tiny.build("llama")
    return model, fe.patch(model, edit or fe.LoReFT(4), freeze=True, **options)


def train(model, handle, steps, optimizer=None, forward=None):
    optimizer = optimizer or torch.optim.AdamW(handle.parameters(), lr=STEP)
    losses = []
    for _ in range(steps):
        loss = loss_of(model if forward is None else forward)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- the manifold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, width", [(1, 1), (1, 8), (4, 32), (64, 64), (16, 129)])
def test_retraction_is_gram_schmidt_and_leaves_a_basis_alone(rank, width):
    moved = torch.randn(3, rank, width) * 2
    basis = retracted(moved)
    assert off(basis) <= TOLERANCE
    triangle = basis.double() @ moved.double().mT  # row i of `moved` is spanned by rows 0 to i of the basis
    assert (triangle.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert triangle.mT.triu(1).abs().max() < 1e-5 * moved.abs().max() * width**0.5 if rank > 1 else True
    assert torch.equal(retracted(basis), basis)


def test_dependent_rows_are_refused():
    rows = torch.randn(3, 8)
    rows[2] = rows[0] - rows[1]
    rows[1] = rows[0]
    with pytest.raises(ValueError, match="linearly dependent rows"):
        retracted(rows[None])


@pytest.mark.parametrize("lead", [(), (5,)])
def test_the_tangent_part_is_the_projection(lead):
    basis = retracted(torch.randn(*lead, 3, 16)).double()
    grad = torch.randn(*lead, 3, 16, dtype=torch.float64)
    along = tangent(basis, grad)
    assert (along @ basis.mT + basis @ along.mT).abs().max() < 1e-6  # fp32 bases
    torch.testing.assert_close(tangent(basis, along), along, rtol=1e-6, atol=1e-6)
    assert ((grad - along) * along).sum().abs() < 1e-5


# --- training ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """Thousands of calls on a few rows: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("optimiser, steps", [("AdamW", 1000), ("SGD", 100), ("Adam foreach", 100)])
def test_the_basis_stays_orthonormal_over_a_thousand_steps(optimiser, steps, one_thread):
    edit = fe.LoReFT(4)
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24))
    model.layers = torch.nn.ModuleList([_Block(24), _Block(24)])
    handle = fe.patch(model, edit, freeze=True)
    kinds = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=STEP, weight_decay=0.1),
        "SGD": lambda p: torch.optim.SGD(p, lr=STEP, momentum=0.9),
        "Adam foreach": lambda p: torch.optim.Adam(p, lr=STEP, foreach=True),
    }
    optimizer = kinds[optimiser](list(handle.parameters()))
    start, worst, moved = [b.detach().clone() for b in bases(handle)], 0.0, 0.0
    target = torch.linalg.qr(torch.randn(24, 24)).Q
    for _ in range(steps):
        h = torch.randn(16, 24)
        out = model.layers[1](model.layers[0](h))
        (out - h @ target).square().mean().backward()
        worst = max(worst, *(off(b) for b in bases(handle)))  # what this step's forward has used
        optimizer.step()
        moved = max(moved, *(off(b) for b in bases(handle)))  # before the next one brings it back
        optimizer.zero_grad()
    assert worst <= 1e-6 < moved
    assert all((a - b).abs().max() > 0.01 for a, b in zip(start, bases(handle), strict=True))


class _Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = torch.nn.Linear(width, width)

    def forward(self, h):
        return h + self.mlp(h)


def test_it_learns_as_well_as_the_parametrization_that_rebuilds_the_basis(one_thread):
    """A target that is itself of LoReFT's form; the losses that AdamW reaches from the same start."""
    torch.manual_seed(1)
    width, rank = 32, 4
    true = torch.linalg.qr(torch.randn(width, rank)).Q.T
    w, c = torch.randn(rank, width) / width**0.5, torch.randn(rank)

    def answer(h):
        return h + (h @ (w - true).T + c) @ true

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([_Block(width)])
    torch.nn.init.zeros_(model.layers[0].mlp.weight)
    torch.nn.init.zeros_(model.layers[0].mlp.bias)
    handle = fe.patch(model, fe.LoReFT(rank), freeze=True)
    (start,) = (t for n, t in handle.named_tensors().items() if n.endswith("write"))

    slow = torch.nn.Linear(width, rank)
    rotate = torch.nn.Linear(width, rank, bias=False)
    parametrizations.orthogonal(rotate, orthogonal_map="householder")
    rotate.weight = start.clone()
    with torch.no_grad():
        slow.weight.copy_(start)
        slow.bias.zero_()

    def peer(h):
        return h + (slow(h) - rotate(h)) @ rotate.weight

    reached = []
    for forward, parameters in (
        (model.layers[0], list(handle.parameters())),
        (peer, [*slow.parameters(), *rotate.parameters()]),
    ):
        generator = torch.Generator().manual_seed(2)
        optimizer = torch.optim.AdamW(parameters, lr=STEP, weight_decay=0.0)
        losses = []
        for _ in range(150):
            h = torch.randn(64, width, generator=generator)
            loss = (forward(h) - answer(h)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        reached.append(sum(losses[-10:]) / 10)
        first = losses[0]
    ours, theirs = reached
    assert theirs < 0.5 * first  # the problem can be learnt
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_the_definition_s_on_the_manifold(fused):
    model, handle = patched(fused=fused)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.05 * torch.randn_like(p))
    loss_of(model).backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    named = {n: t.double().clone() for n, t in handle.named_tensors().items()}
    slow = tiny.exact(_unpatched(model))
    leaves = {n: t.requires_grad_() for n, t in named.items()}
    for layer in range(tiny.LAYERS):
        w, c, r = (leaves[f"0.layers.{layer}.block.{n}"] for n in ("source", "offset", "write"))
        tiny.site_module(slow, "llama", "block", layer).register_forward_hook(
            lambda module, args, out, w=w, c=c, r=r: out + (out @ w.T + c - out @ r.T) @ r
        )
    loss_of(slow).backward()
    for name, leaf in leaves.items():
        expected = tangent(leaf.detach(), leaf.grad) if name.endswith("write") else leaf.grad
        scale = expected.abs().max()
        assert (got[f"fastedit.{handle.name}.{name}"].double() - expected).abs().max() <= 2e-5 * scale, name


def _unpatched(model):
    other = copy.deepcopy(model)
    for handle in handles(other):
        handle.remove()
    return other


def test_the_gradient_along_the_basis_is_tangent():
    model, handle = patched()
    loss_of(model).backward()
    for basis in bases(handle):
        assert basis.grad.abs().max() > 0
        across = basis.grad @ basis.detach().mT
        assert (across + across.mT).abs().max() <= 1e-6 * basis.grad.norm()


# --- ways of running a step ------------------------------------------------------------------------------------


def test_accumulated_gradients_are_their_sum_at_one_basis():
    model, handle = patched()
    train(model, handle, 2)
    batches = [{"batch": 2, "length": n} for n in (5, 7)]
    separate = []
    for batch in batches:
        loss_of(model, **batch).backward()
        separate.append([p.grad.clone() for p in handle.parameters()])
        model.zero_grad()
    before = [b.detach().clone() for b in bases(handle)]
    for batch in batches:
        loss_of(model, **batch).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, bases(handle), strict=True))
    for p, one, two in zip(handle.parameters(), *separate, strict=True):
        assert torch.equal(p.grad, one + two)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_at_the_same_basis(reentrant):
    plain, handle = patched(fused=False)
    expected = train(plain.train(), handle, 3)
    model, other = patched(fused=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert train(model.train(), other, 3) == expected
    for a, b in zip(handle.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_step_trains_the_same_without_a_break():
    torch._dynamo.reset()
    eager, handle = patched()
    expected = train(eager, handle, 3)
    model, other = patched()
    got = train(model, other, 3, forward=torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert got == pytest.approx(expected, rel=1e-5)
    for a, b in zip(handle.named_tensors().values(), other.named_tensors().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert max(off(b) for b in bases(other)) <= 1e-6


def test_training_resumed_from_a_checkpoint_has_the_same_bits():
    model, handle = patched()
    optimizer = torch.optim.AdamW(handle.parameters(), lr=STEP)
    train(model, handle, 3, optimizer)
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert max(off(t) for n, t in state.items() if n.endswith("write")) <= TOLERANCE
    expected = train(model, handle, 3, optimizer)

    again, other = patched()
    again.load_state_dict(state)
    optimizer = torch.optim.AdamW(other.parameters(), lr=STEP)
    optimizer.load_state_dict(moments)
    assert train(again, other, 3, optimizer) == expected
    assert all(torch.equal(a, b) for a, b in zip(handle.parameters(), other.parameters(), strict=True))


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
    from fastedit import masters

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
    from fastedit.turning import turned, turned_back

    masters = {"plane": torch.randn(*lead, 2, 7).double(), "angle": torch.randn(*lead, 1).double()}
    leaves = {n: t.clone().requires_grad_() for n, t in masters.items()}
    _, _, read, _, write = turned(leaves)
    d_read, d_write = torch.randn_like(read), torch.randn_like(write)
    torch.autograd.backward([read, write], [d_read, d_write])
    got = turned_back(masters, (None, None, d_read, None, d_write))
    for name, leaf in leaves.items():
        torch.testing.assert_close(got[name], leaf.grad)
