"""The native module's backends, `cpu` and `cuda`: its functions of tensors, named as in fastedit.kernels.reference.

`try_*` are for calls that may be declined. They return what fastedit.ops returns. They return None, and do nothing, if
autograd, a transform, a tracer or another backend must see the call, or if a kernel cannot take an argument as it is.
`bound` is such a call held ready, with the facts under which it is right.
"""

import types

import torch

from ..kernels.reference.slot_order import slot_order
from ..kernels.reference.value_ascent import ascend

try:
    from .. import _native

    _native.use_torch(torch)
except ImportError as error:  # a pure-Python install, or a torch without DLPack's exchange interface
    _native, _missing = None, error

BACKWARDS = ("edit_backward", "edit_add_norm_backward", "project_backward")
MAX_UNITS = 6144  # of a value net on a GPU: 16 bytes each in the 99 KB of a block on sm_86 and later


NOTHING = ()  # a fact for `holds`: there is nothing, or nothing that is true


def _unserved(*_):
    return None


def _asking(op):
    return _unserved if _native is None else getattr(_native, f"try_{op}")


try_edit, try_edit_add, try_edit_add_norm, try_project = map(_asking, ("edit", "edit_add", "edit_add_norm", "project"))
ASKED = {op: _asking(op) for op in BACKWARDS} | {
    "edit": try_edit, "edit_add": try_edit_add, "edit_add_norm": try_edit_add_norm, "project": try_project,
}  # fmt: skip


def _holds(facts):
    for holder, name, expected in facts:
        found = (holder if isinstance(holder, dict) else vars(holder)).get(name)
        if found if expected is NOTHING else found is not expected:
            return False
    return True


holds = _holds if _native is None else _native.holds  # csrc/tensors.cpp
bound = _unserved if _native is None else _native.bound


def serve(device_type, on):
    """Whether `try_*` calls are answered for tensors on that device."""
    if _native is not None:
        _native.serve(device_type, on)


def why_not(name):
    """None if the backend exists, else the reason why it does not."""
    if _native is None:
        return f"the native module is not built ({_missing}); see `fastedit doctor`"
    if name == "cuda" and not _native.CUDA_ARCHITECTURES:
        return "the native module was built without a CUDA compiler; see `fastedit doctor`"
    return None


_last_order = ()  # (what it was computed from, the slots themselves, order): a batch's layers all ask for the same


def _gpu_order(slot, slots):
    """Rows on a GPU sorted by slot, or None. The module itself sorts rows on the host."""
    global _last_order
    if slot is None:
        return None
    if slot.is_inference() or torch.cuda.is_current_stream_capturing():  # no version to compare; the graph's own memory
        return slot_order(slot, slots)
    key = slot.data_ptr(), slot.numel(), slot.device, slots, torch.cuda.current_stream(slot.device), slot._version
    last = _last_order  # read once: another thread may put its own there
    if not last or last[0] != key:
        _last_order = last = key, slot, slot_order(slot, slots)  # holding `slot`, its address cannot come to mean others
    return last[2]


def _slots(*parameters):
    return next((p.shape[0] for p in parameters if p is not None), 1)


def backend(name):
    """The functions of the backend `cpu` or `cuda`."""
    on_gpu = name == "cuda"

    def edit_backward(*args):
        slot, wanted = args[8], args[12]
        return _native.edit_backward(*args, _order(slot, wanted, args[3:6]))

    def edit_add_norm_backward(*args):
        slot, wanted = args[13], args[19]
        return _native.edit_add_norm_backward(*args, _order(slot, wanted, args[8:11]))

    def _order(slot, wanted, parameters):
        return _gpu_order(slot, _slots(*parameters)) if on_gpu and slot is not None and any(wanted[1:6]) else None

    def moments(hidden, group, groups):
        order = _gpu_order(group, groups) if on_gpu else None
        first, *pairs = _native.moments(hidden, group, groups, order)
        if group is None:
            count = torch.full((1,), hidden.numel() // hidden.shape[-1], dtype=torch.int64, device=hidden.device)
        else:
            first = order[1] if on_gpu else torch.tensor(first, dtype=torch.int32)
            count = first.diff().to(torch.int64)
        return count, *(pair.double().sum(0) for pair in pairs)  # high and low parts

    def value_ascent(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size):
        if not on_gpu:
            return _native.value_ascent(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size)
        flips = _native.value_ascent_flips if weight.shape[0] <= MAX_UNITS else None  # dense products are the vendor's
        return ascend(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size, flips)

    return types.SimpleNamespace(
        __name__=name, any_shape=True, edit=_native.edit, edit_add=_native.edit_add, edit_add_norm=_native.edit_add_norm,
        project=_native.project, project_backward=_native.project_backward, edit_backward=edit_backward,
        edit_add_backward=edit_backward, edit_add_norm_backward=edit_add_norm_backward, moments=moments,
        value_ascent=value_ascent,
    )  # fmt: skip
