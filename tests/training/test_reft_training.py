"""LoReFT: a basis that stays orthonormal under any optimiser, wrapper and way of running a step."""

import copy
import warnings

import pytest
import tiny_models as tiny
import torch
from safetensors import safe_open
from torch.nn.utils import parametrizations
from transformers import TrainingArguments

import fastedit as fe
from fastedit.patching.orthonormal_basis import TOLERANCE, retracted, tangent
from fastedit.recipes import EditTrainer

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


def test_the_trainer_trains_it_as_a_loop_does_and_its_checkpoints_resume(tmp_path):
    row = {name: tensor[0] for name, tensor in tiny.inputs("llama").items()}
    data = [{**row, "labels": row["input_ids"]}] * 8

    def trained(folder, **more):
        _model, handle = patched()
        options = TrainingArguments(
            output_dir=folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=STEP, seed=1,
            lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        EditTrainer(handle=handle, args=options, train_dataset=data).train(**more)
        return handle

    handle = trained(tmp_path)
    assert max(off(t) for n, t in handle.named_tensors().items() if n.endswith("write")) <= TOLERANCE
    with safe_open(tmp_path / "checkpoint-2" / "edit.safetensors", "pt") as file:
        saved = [file.get_tensor(name) for name in handle.named_tensors() if name.endswith("write")]
    assert len(saved) == tiny.LAYERS and max(map(off, saved)) <= TOLERANCE
    resumed = trained(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(handle.parameters(), resumed.parameters(), strict=True))
    start = patched()[1]
    assert not any(torch.equal(a, b) for a, b in zip(bases(handle), bases(start), strict=True))


def test_steps_that_raise_no_version_are_seen():
    """fused=True moves parameters behind their version counters: of a basis, and of a stack that is folded for eval."""
    found = []
    for fused in (True, False):
        model, handle = patched([fe.LoReFT(4), fe.NoReFT(2, seed=1), fe.RED(site="block")])
        optimizer = torch.optim.AdamW(handle.parameters(), lr=STEP, fused=fused, foreach=not fused)
        losses = []
        for _ in range(4):
            losses += train(model, handle, 1, optimizer)
            with torch.no_grad():
                losses.append(loss_of(model).item())
        assert len(set(losses)) == 5, "a step was not seen"  # what eval says is what the next step starts from
        found.append(losses)
        assert max(off(t) for n, t in handle.named_tensors().items() if n.startswith("0.") and n.endswith("write")) <= TOLERANCE
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_anothers_step_between_forward_and_backward_changes_nothing():
    model, handle = patched([fe.LoReFT(4)])
    other = torch.nn.Parameter(torch.ones(3))
    loss = loss_of(model)
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=0.1).step()
    handle.named_tensors()
    loss_of(model)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in handle.parameters())
