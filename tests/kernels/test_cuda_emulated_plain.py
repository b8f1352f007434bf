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


def make_form(width, rank):
    form = {"scale": 1 + 0.3 * torch.randn(width), "bias": torch.randn(width)}
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


def with_ones(form):
    return form | {"coefficient": torch.ones(ROWS)}


def kernels(cuda):
    """What was launched, by its plain name."""
    names = "\n".join(name for name, *_ in cuda.launches())
    shown = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    return shown.replace("fastedit::cuda::", "").replace("(anonymous namespace)::", "").splitlines()


def run_both(cuda, call, form, part):
    """The plain call's outputs, whose kernel is that part's, equal those of the general one."""
    plain = call(form)
    assert part in kernels(cuda)[0], kernels(cuda)[0]
    general = call(with_ones(form))
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
def test_backward_behind_a_norm(cuda, dtype, rank, width, kind, weighted):
    streams = [stream(ROWS, width, dtype) for _ in range(4)]
    weight, rstd, z = torch.rand(width).to(dtype), torch.rand(ROWS), torch.randn(ROWS, rank) if rank else None
    needs = [True, True, True, *[rank > 0] * 3, False, True]

    def call(form):
        return cuda.edit_add_norm_backward(
            *streams, None, weight, None, rstd, form, None, z, False, kind, needs, (weighted, False), dtype, dtype, (ROWS, width)
        )  # fmt: skip

    run_both(cuda, call, make_form(width, rank), f"(BackwardPart){2 if rank else 1}, {whole(rank)}>")


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=["bf16", "f16"])
@pytest.mark.parametrize(
    ("rank", "width", "part"),
    [(0, 264, "false, true>"), (1, 512, "(BackwardPart)3, false>"), (4, 1024, "(BackwardPart)3, true>")],
)
def test_backward(cuda, dtype, rank, width, part):
    grad, hidden, z = stream(ROWS, width, dtype), stream(ROWS, width, dtype), torch.randn(ROWS, rank) if rank else None
    needs = [True, True, True, *[rank > 0] * 3, False]
    run_both(
        cuda,
        lambda f: cuda.edit_backward(grad, hidden, None, f, None, z, needs, dtype, (ROWS, width)),
        make_form(width, rank),
        part,
    )


def test_what_is_not_plain_goes_to_the_general_kernels(cuda):
    """A slot, another dtype, a width that leaves threads without columns, z, LayerNorm."""
    x, form = stream(ROWS, 512, BF16), make_form(512, 4)
    calls = {
        "slots": lambda: cuda.edit(
            x, {n: p[None] for n, p in form.items()} | {"slot": torch.zeros(ROWS, dtype=torch.int32)}
        ),
        "z": lambda: cuda.edit(x, form, want_z=True),
        "fp32": lambda: cuda.edit(x.float(), form),
        "mixed": lambda: cuda.edit_add(x, x.to(F32), form),
        "width": lambda: cuda.edit(x[:, :504].contiguous(), make_form(504, 4)),
        "layer": lambda: cuda.edit_add_norm(x, x, None, None, form, kind=2),
    }
    for name, call in calls.items():
        call()
        assert "(Part)0" in kernels(cuda)[0], (name, kernels(cuda)[0])
