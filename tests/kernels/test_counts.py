"""What an edited layer costs whatever the machine: allocations and bytes moved, beside the unedited layer's.

Operations are counted in test_patch_fused.py, instructions of the CPU kernels in test_instructions.py, launches of the
Triton kernels in triton_interpreted_edges.py, streams of the CUDA kernels under their emulator.
"""

import pytest
import tiny_models as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastedit as fe

VIEWS = frozenset(
    ("view", "_unsafe_view", "reshape", "t", "transpose", "expand", "slice", "select", "unsqueeze", "detach", "alias",
     "split", "permute", "as_strided", "lift_fresh", "empty", "empty_like")
)  # fmt: skip


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, and new tensors they make; fastedit's own calls are counted as one each."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.bytes = self.allocations = self.operations = 0
        for owner, name in ((fe.ops, "edit"), (fe.ops, "edit_add"), (fe.ops, "edit_add_norm")):
            self._watch(monkeypatch, owner, name)

    def count(self, given, made):
        self.operations += 1
        made = [t for t in made if t is not None]
        self.allocations += len(made)
        self.bytes += sum(t.numel() * t.element_size() for t in (*given, *made))

    def _watch(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            with _disable_current_modes():
                result = real(*args, **kwargs)
            given = list(tensors_in([*args, *kwargs.values()]))
            self.count(given, list(tensors_in(result if isinstance(result, tuple) else [result])))
            return result

        monkeypatch.setattr(owner, name, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] not in VIEWS:
            self.count(list(tensors_in(args)), list(tensors_in(result)))
        return result


def traffic(model, family, monkeypatch):
    with torch.no_grad(), monkeypatch.context() as patches, Traffic(patches) as counted:
        tiny.output(model, family)
    return counted


@pytest.mark.parametrize("site", ["mlp", "attn"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_fused_edit_allocates_and_moves_no_more_than_the_unedited_layer(family, site, monkeypatch):
    model = tiny.build(family)
    unedited = traffic(model, family, monkeypatch)
    with fe.patch(model, fe.ScaleBias(site=site), fused=True) as handle:
        parameters = 4 * handle.num_parameters()
        fused = traffic(model, family, monkeypatch)
    with fe.patch(model, fe.ScaleBias(site=site), fused=False):
        plain = traffic(model, family, monkeypatch)
    layers = tiny.number_of_layers(family)
    assert unedited.allocations > layers and unedited.bytes > 0
    assert fused.allocations <= unedited.allocations
    assert plain.allocations == unedited.allocations + layers
    assert fused.bytes <= unedited.bytes + parameters
    assert plain.bytes > unedited.bytes + parameters


@pytest.mark.parametrize("op, outputs", [("edit", 1), ("edit_add", 1), ("edit_add_norm", 2), ("project", 1)])
def test_an_op_allocates_its_outputs_and_nothing_else(op, outputs):
    made = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t.data_ptr() for t in tensors_in([out]))
            return out

    h, residual, weight = torch.randn(6, 32), torch.randn(6, 32), torch.ones(32)
    scale, read = torch.randn(32), torch.randn(2, 32)
    call = {
        "edit": lambda: fe.ops.edit(h, scale, scale, read, None, read),
        "edit_add": lambda: fe.ops.edit_add(h, residual, scale, scale),
        "edit_add_norm": lambda: fe.ops.edit_add_norm(h, residual, weight, scale, scale),
        "project": lambda: fe.ops.project(h, read),
    }[op]
    with Allocations():
        result = call()
    assert len(made) == outputs
    assert set(made) == {t.data_ptr() for t in tensors_in(result if outputs > 1 else [result])}


def operations(model, family, monkeypatch):
    """Calls that compute something, fastedit's own among them."""
    with torch.no_grad(), monkeypatch.context() as patches, Traffic(patches) as counted:
        tiny.output(model, family)
    return counted.operations


@pytest.mark.parametrize("site", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stack_of_edits_costs_one_edit(family, site, monkeypatch):
    direction = torch.randn(tiny.WIDTH)

    def stack():
        return [
            fe.LoReFT(4, site=site), fe.ScaleBias(1 + direction, direction, site=site),
            fe.Steer(direction, site=site, strength=0.5), fe.Ablate(direction, site=site),
        ]  # fmt: skip

    counted = []
    for edits in (stack()[:1], stack()):
        model = tiny.build(family)
        fe.patch(model, edits)
        tiny.output(model, family)  # folds
        counted.append((operations(model, family, monkeypatch), traffic(model, family, monkeypatch).allocations))
    assert counted[0] == counted[1]
    fe.patch(model, [fe.DiReFT(64, site=site), fe.Ablate(direction, site=site)])  # more ranks than a kernel takes
    tiny.output(model, family)
    assert operations(model, family, monkeypatch) > counted[0][0]
