"""fastedit: the plain path, the fused path, merged into the weights, and compiled."""

import torch

from ..registry import INFERENCE, KINDS, TRAINING, WORKS, variant
from ..sizes import blocks
from .compiling import compiled


def edits(values, kind="NoReFT"):
    import fastedit as fe

    if values.kind == "red":
        return fe.RED(values.stacked("scale"), values.stacked("bias"))
    if values.kind == "steer":
        return fe.Steer(values.stacked("bias"))
    if values.kind == "ablate":
        return fe.Ablate(values.stacked("read"))
    if values.trainable:
        return getattr(fe, kind)(values.forms[0].rank, site=values.site)
    return fe.LowRank(values.stacked("read"), values.stacked("offset"), values.stacked("write"))


def patched(model, values, fused, kind="NoReFT"):
    """(model, handle) with the study's values on it; what trains under `lowrank4` is an edit of that kind."""
    import fastedit as fe

    handle = fe.patch(model, edits(values, kind), fused=fused)
    if values.kind == "lowrank4" and values.trainable:
        tensors = {"source": values.sources(), "offset": values.stacked("offset"), "write": values.stacked("write")}
        handle.load_tensors({
            name: tensors[name.rpartition(".")[2]][number]
            for number in range(len(blocks(model)))
            for name in handle.named_tensors()
            if f".{number}.{values.site}." in name
        })  # fmt: skip
    for parameter in handle.parameters():
        parameter.requires_grad_(values.trainable)
    return model, handle


def _why_plain(handle):
    """A note where the fused path does not serve."""
    reasons = {row["path"] for row in handle.report().rows} - {"fused"}
    return "; ".join(sorted(reasons))


@variant("fastedit plain", kinds=KINDS, works=WORKS)
def plain(model, values):
    return patched(model, values, fused=False)[0]


@variant("fastedit", kinds=KINDS, works=WORKS)
def fused(model, values):
    model, handle = patched(model, values, fused=True)
    return model, _why_plain(handle)


@variant("fastedit LoReFT", kinds=("lowrank4",), works=TRAINING, note="R kept orthonormal")
def loreft(model, values):
    model, handle = patched(model, values, fused=True, kind="LoReFT")
    return model, _why_plain(handle)


@variant("fastedit compiled", kinds=KINDS, works=WORKS, compiled=True)
def fused_compiled(model, values):
    model, handle = patched(model, values, fused=True)
    return compiled(model), _why_plain(handle)


@variant("fastedit merged", kinds=("red",), works=INFERENCE, own_weights=True)
def merged(model, values):
    model, handle = patched(model, values, fused=True)
    handle.merge(fp32=True)  # where the model's own dtype would round the edit away
    return model, "" if model.dtype == torch.float32 else "edited maps in fp32"
