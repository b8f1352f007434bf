"""The kernels of the commonest calls (kernels/cuda/plain.h) are launched for those calls, and give the general ones' bits.

A coefficient of 1 for every row says the same to the general kernels. The emulator is emulated_cases.py's.
"""

import subprocess

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, HALF, cuda, plain_schedule, pytestmark, stream

__all__ = ["cuda", "plain_schedule", "pytestmark"]
ROWS = 7


def make_form(width, rank, reft=False):
    form = {} if reft else {"scale": 1 + 0.3 * torch.randn(width), "bias": torch.randn(width)}
    if rank:
        form |= {
            "read": torch.randn(rank, width) / width**0.5,
            "offset": torch.randn(rank),
            "write": torch.randn(rank, width),
        }
    return form


def whole(rank):
    """The last template argument: the rank is a multiple of four."""
    return "true" if rank and rank % 4 == 0 else "false"


def ranks(rank, four=False):
    """The last template argument of the backward's: LoReFT's without a norm knows a rank of four."""
    return f"(Ranks){0 if rank % 4 or not rank else 2 if four and rank == 4 else 1}>"


def needs_of(rank, reft):
    """d_hidden, and d_scale to d_write."""
    return [True, not reft, not reft, *[rank > 0] * 3, False]


def with_ones(form, rows=ROWS):
    return form | {"coefficient": torch.ones(rows)}


def kernels(cuda):
    """What was launched, by its plain name."""
    names = "\n".join(name for name, *_ in cuda.launches())
    shown = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    return shown.replace("fastedit::cuda::", "").replace("(anonymous namespace)::", "").splitlines()


def run_both(cuda, call, form, part, rows=ROWS):
    """The plain call's outputs, whose kernel is that part's, equal those of the general one."""
    plain = call(form)
    assert part in kernels(cuda)[0], kernels(cuda)[0]
    general = call(with_ones(form, rows))
    assert part not in kernels(cuda)[0], kernels(cuda)[0]
    plain, general = (r if isinstance(r, tuple) else (r,) for r in (plain, general))
    assert sum(t is not None for t in plain) >= 1
    assert all(emulated.same_bits(a, b) for a, b in zip(plain, general, strict=True))


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=["bf16", "f16"])
@pytest.mark.parametrize(("rank", "width"), [(0, 256), (0, 4608), (1, 512), (4, 1024), (5, 512), (8, 512)])
@pytest.mark.parametrize("on_sum", [False, True])
def test_forward(cuda, dtype, rank, width, on_sum):
    x, residual, weight = stream(ROWS, width, dtype), stream(ROWS, width, dtype), torch.rand(width).to(dtype)
    form = make_form(width, rank)
    for kind in (0, 1):
        run_both(
            cuda,
            lambda f, k=kind: cuda.edit_add_norm(x, residual, weight, None, f, on_sum, k),
            form,
            f"(Part){4 + on_sum}, {whole(rank)}>",
        )
    if rank:
        run_both(cuda, lambda f: cuda.edit_add(x, residual, f, on_sum)[0], form, f"(Part){2 + on_sum}, {whole(rank)}>")
        if not on_sum:
            run_both(cuda, lambda f: cuda.edit(x, f)[0], form, f"(Part)1, {whole(rank)}>")


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=["bf16", "f16"])
@pytest.mark.parametrize(("rank", "width"), [(0, 256), (0, 3072), (1, 512), (4, 1024), (8, 256)])
@pytest.mark.parametrize(("kind", "weighted"), [(0, True), (1, False)])
@pytest.mark.parametrize("reft", [False, True])
def test_backward_behind_a_norm(cuda, dtype, rank, width, kind, weighted, reft):
    if reft and not rank:
        pytest.skip("LoReFT has a rank")
    streams = [stream(ROWS, width, dtype) for _ in range(4)]
    weight, rstd, z = torch.rand(width).to(dtype), torch.rand(ROWS), torch.randn(ROWS, rank) if rank else None
    needs = [*needs_of(rank, reft), True]

    def call(form):
        return cuda.edit_add_norm_backward(
            *streams, None, weight, None, rstd, form, None, z, False, kind, needs, (weighted, False), dtype, dtype, (ROWS, width)
        )  # fmt: skip

    part = 4 if reft else 2 if rank else 1
    run_both(cuda, call, make_form(width, rank, reft), f"(BackwardPart){part}, {ranks(rank)}")


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=["bf16", "f16"])
@pytest.mark.parametrize(("rank", "width", "reft"), [(0, 264, False), (1, 512, False), (4, 1024, False), (1, 512, True),
                                                     (4, 4096, True), (8, 512, True)])  # fmt: skip
@pytest.mark.parametrize("rows", [ROWS, 8])
def test_backward(cuda, dtype, rank, width, reft, rows):
    grad, hidden, z = stream(rows, width, dtype), stream(rows, width, dtype), torch.randn(rows, rank) if rank else None
    part = f"(BackwardPart){5 if reft else 3}, {ranks(rank, reft)}" if rank else "false, true>"
    run_both(
        cuda,
        lambda f: cuda.edit_backward(grad, hidden, None, f, None, z, needs_of(rank, reft), dtype, (rows, width)),
        make_form(width, rank, reft),
        part,
        rows,
    )


def test_a_training_forward_keeps_z_and_is_plain(cuda):
    x, form = stream(ROWS, 512, BF16), make_form(512, 4, reft=True)
    run_both(cuda, lambda f: cuda.edit(x, f, want_z=True), form, "(Part)1, true>")


def test_what_is_not_plain_goes_to_the_general_kernels(cuda):
    """A slot, another dtype, a width that leaves threads without columns, LayerNorm."""
    x, form = stream(ROWS, 512, BF16), make_form(512, 4)
    calls = {
        "slots": lambda: cuda.edit(
            x, {n: p[None] for n, p in form.items()} | {"slot": torch.zeros(ROWS, dtype=torch.int32)}
        ),
        "fp32": lambda: cuda.edit(x.float(), form),
        "mixed": lambda: cuda.edit_add(x, x.to(F32), form),
        "width": lambda: cuda.edit(x[:, :504].contiguous(), make_form(504, 4)),
        "layer": lambda: cuda.edit_add_norm(x, x, None, None, form, kind=2),
    }
    for name, call in calls.items():
        call()
        assert "(Part)0" in kernels(cuda)[0], (name, kernels(cuda)[0])
