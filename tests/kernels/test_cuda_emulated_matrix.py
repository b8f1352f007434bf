"""The matrix of edits and edge cases (training/test_matrix.py) on the CUDA sources under the emulator (tests/cuda_emulator)."""

import types

import emulated_cases as emulated
import pytest
from emulated_cases import cuda, plain_schedule
from test_matrix import CASES, DTYPES, KINDS, check

from fastedit import dispatch
from fastedit.ops import running

__all__ = ["cuda", "plain_schedule"]

pytestmark = [emulated.pytestmark, pytest.mark.usefixtures("one_thread")]

SITES = ("k", "attn", "ffn_in", "mlp", "block")  # an edit alone, an edit's add, another width, the norm that follows


def form(tensors, gate=None, rule=None):
    return dict(zip(emulated.FORM, tensors, strict=True)) | {"gate": gate, "rule": rule}


def backend_of(cuda):
    """The emulated kernels as a backend: its functions take the reference's arguments."""

    def edit(hidden, *rest):
        *tensors, want_z, gate, rule = defaults(rest, 7, False, None, None)
        return cuda.edit(hidden, form(tensors, gate, rule), want_z)

    def edit_add(x, residual, *rest):
        *tensors, on_sum, want_z, gate, rule = defaults(rest, 7, False, False, None, None)
        return cuda.edit_add(x, residual, form(tensors, gate, rule), on_sum, want_z)

    def edit_add_norm(x, residual, weight, norm_bias, *rest):
        *tensors, on_sum, kind, eps, want_z, want_out, _, gate, rule = defaults(
            rest, 7, False, 0, 1e-6, False, True, True, None, None
        )
        return cuda.edit_add_norm(
            x, residual, weight, norm_bias, form(tensors, gate, rule), on_sum, kind, eps, want_z, want_out
        )

    def edit_backward(grad, hidden, residual, *rest):
        *tensors, grad_z, z, needs, dtype = rest
        like = next(t for t in (grad, hidden) if t is not None)
        return cuda.edit_backward(grad, hidden, residual, form(tensors), grad_z, z, needs, dtype, like.shape)

    def edit_add_norm_backward(grad_residual, grad_normed, out, x, residual, weight, mean, rstd, *rest):
        *tensors, grad_z, z, on_sum, kind, needs, needs_norm, x_dtype, residual_dtype = rest
        return cuda.edit_add_norm_backward(
            grad_residual, grad_normed, out, x, residual, weight, mean, rstd, form(tensors), grad_z, z, on_sum, kind,
            needs, needs_norm, x_dtype, residual_dtype, out.shape,
        )  # fmt: skip

    def project_backward(grad_z, hidden, read, needs, dtype):
        return cuda.project_backward(grad_z, hidden, read, needs, dtype, read.shape[-1])

    ops = (cuda.project, project_backward, edit, edit_add, edit_add_norm, edit_backward, edit_add_norm_backward)
    return types.SimpleNamespace(__name__="emulated", any_shape=False, **{op.__name__: op for op in ops})


def defaults(rest, fixed, *values):
    given = rest[fixed:]
    return *rest[:fixed], *given, *values[len(given) :]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_formulas(cuda, kind, case, dtype, site, fused, monkeypatch):
    dispatch.select.cache_clear()  # the native module's own kernels are not asked then
    served = backend_of(cuda)
    monkeypatch.setattr(running, "select", lambda *_: served)
    check(kind, case, DTYPES[dtype], site, fused)
    assert cuda.last_op or case == "no rows"
