"""The wrapper modules of RED's authors (arXiv 2402.15179): a module around a linear map.

Its child `delta_vector` holds activation_scaling and activation_bias, each (1, width).
"""

from ..edits.form import Form
from .found import IN_MODULE, Found, Refusal, try_wrapper, values
from .switches import ClassSwitch, passing

PARTS = {"activation_scaling": "scale", "activation_bias": "bias"}


def find(model):
    return [_found(path, m) for path, m in model.named_modules() if "delta_vector" in m._modules]


def _found(path, module):
    inner = [name for name, child in module._modules.items() if name != "delta_vector" and child is not None]
    switch = ClassSwitch(module, passing, *inner[:1])
    found = Found(f"RED wrapper at {path}", module, IN_MODULE, switch)

    def forms():
        if len(inner) != 1:
            raise Refusal(f"it holds the modules {inner}, expected one linear map beside delta_vector")
        switch.check()
        form = Form(**_vectors(dict(module._modules["delta_vector"].named_parameters())))
        try_wrapper(module, inner[0], (form,))
        yield form

    return found.read(forms)


def _vectors(parts):
    if not parts or not parts.keys() <= PARTS.keys():
        raise Refusal(f"its delta_vector holds {sorted(parts)}, expected {' and '.join(PARTS)}")
    for name, tensor in parts.items():
        if tensor.numel() != tensor.shape[-1]:
            raise Refusal(f"{name} has shape {tuple(tensor.shape)}, expected (1, width)")
    return {PARTS[name]: values(tensor, -1) for name, tensor in parts.items()}
