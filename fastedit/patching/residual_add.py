"""The residual add of a layer, with the edits and the norm that ride on it."""

import torch
from torch.nn.modules import module as nn_module

from ..arguments import NORM_KINDS
from .native_add import add

_NOTHING = (None,) * 5
_NONE = (_NOTHING, None, None)
_PLAIN = (torch.nn.Parameter, torch.Tensor)  # not sharded, fake or otherwise wrapped


class Norm:
    """A norm module whose arithmetic the kernel can do: kind "rms", "gemma" or "layer"."""

    def __init__(self, module, kind, eps):
        self.module, self.kind, self.eps = module, kind, eps
        self.code = NORM_KINDS[kind]

    def parameters(self):
        """(weight, norm_bias)"""
        held = self.module._parameters
        return held["weight"], held.get("bias")

    def fits(self, x, residual):
        """Whether the module may be skipped in this call, for the norm of residual + x."""
        module = self.module
        if (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            or module._backward_pre_hooks or "forward" in module.__dict__
        ):  # fmt: skip
            return False
        if not torch.compiler.is_compiling() and (
            nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
            or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks
        ):  # fmt: skip
            return False
        dtype = _sum_dtype(x, residual)
        for parameter in self.parameters():
            if parameter is not None and (
                parameter.dtype is not dtype or parameter.device != x.device
                or type(parameter) not in _PLAIN or not parameter.is_contiguous()
            ):  # fmt: skip
                return False
        # autocast runs layer_norm in fp32, whatever the dtype it is given
        return self.kind != "layer" or dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type)


class Add:
    """residual' = residual + E(x), then E'(·) of the sum. `x` and `sum` are sites, or None.

    `run` is fastedit.patching.native_add.add. The proof replaces it by its definition.
    """

    run = staticmethod(add)

    def __init__(self, x=None, sum=None):
        self.x, self.sum = x, sum

    def __call__(self, x, residual):
        """residual'"""
        return self._finish(residual, *self._prepare(x, residual))

    def _finish(self, residual, x, tensors, strength, looks, on_sum, rest):
        if tensors is _NOTHING:
            out = residual + x
        else:
            out = self.run(x, residual, tensors, strength, on_sum, looks=looks)
        for stage in rest:
            out = stage.apply(out)
        return out

    def with_norm(self, x, residual, norm, want_residual=True):
        """(residual', norm(residual')), for a norm that fits. None for a residual' that nothing reads."""
        x, tensors, strength, looks, on_sum, rest = self._prepare(x, residual)
        if rest:
            out = self._finish(residual, x, tensors, strength, looks, on_sum, rest)
            return out, norm.module(out)
        return self.run(x, residual, tensors, strength, on_sum, norm, want_residual, looks)

    def _prepare(self, x, residual):
        """What is left for the add: (x, tensors, strength, looks, on_sum, stages after it). The last stage rides."""
        site = self.x
        if site is not None and not site.ride.now(x.dtype):
            site = None  # its own module has applied it
        last, after = self.sum, ()
        if last is not None and last.ride.now(_sum_dtype(x, residual)):
            if last.stages[0].on_sum:
                x = x if site is None else site.apply(x)
                return x, *_carried(last.stages[0], x), True, last.stages[1:]
            after = last.stages
        if site is None:
            return x, *_NONE, False, after
        stages = site.stages
        if not stages[-1].on_x:
            return site.apply(x), *_NONE, False, after
        if len(stages) > 1:
            for stage in stages[:-1]:
                x = stage.apply(x)
        return x, *_carried(stages[-1], x), False, after


def _carried(stage, x):
    """(tensors, strength, looks) of a stage that rides."""
    given = stage.arguments(x)
    return _NONE if given is None else (*given, stage.looks)


def _sum_dtype(x, residual):
    return x.dtype if x.dtype is residual.dtype else torch.promote_types(x.dtype, residual.dtype)
