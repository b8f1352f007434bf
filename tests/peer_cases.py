"""What the tests of adoption from the neighbours of `make peers` share."""

import importlib.util

import pytest
import tiny_models as tiny
import torch

LAYER = {"llama": "model.layers[{}]", "gpt2": "transformer.h[{}]"}
DTYPES = (torch.float32, torch.bfloat16)


def needs(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: make peers, then .venv-peers/bin/python -m pytest")
    return importlib.import_module(name)


def vectors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(tiny.WIDTH, generator=g) * 0.5 for layer in range(tiny.LAYERS)}


def compare(call, adopt, exact_call, path="fused"):
    """What the neighbour says before, during and after adoption; the handle, removed."""
    eager, reference = call(), exact_call()
    handle = tiny.quiet(adopt)
    assert not handle.left
    tiny.assert_promise(call(), eager, reference)
    assert {row["path"] for row in handle.report().rows} == {path}
    handle.strength = 0.0
    assert not torch.allclose(call(), eager)
    handle.remove()
    assert torch.equal(call(), eager)
    return handle


def exactly(family, forms, **site):
    """The exact output of the plain model, with {layer: Form} at a site."""
    from fastedit.edits.form import Form

    wide = [
        (site.get("site", "block"), layer, Form(*(None if t is None else t.double() for t in form.tensors())))
        for layer, form in forms.items()
    ]
    return lambda model: tiny.output(tiny.hook_reference(tiny.exact(model), family, wide), family)
