"""Row plans on a model: the owners of its stacks of layers, and its modules that generate, are swapped for classes that
plan."""

import inspect

import torch

from ..families.own_class import base_of
from .class_swap import PLANNED, swap, swap_back, swappable
from .rows.row_plan import INPUTS


class Planned:
    """What a module swapped for PLANNED reads.

    Its stack, and the Root to look at, if it owns layers with edits. The model's Rows, if it generates.
    """

    def __init__(self, stack=None, rows=None, root=None):
        self.stack, self.rows, self.root = stack, rows, root


def check_layout(layer, site):
    """Refuse a site whose hidden states are known not to be (batch, tokens, width), for edits that must know the rows.

    A layer that knows its layout gives it by `layout(site)`: "batch first", or in words what it is.

    Raises:
        ValueError: another layout.
    """
    layout = getattr(layer, "layout", None)
    found = "batch first" if layout is None else layout(site)
    if found != "batch first":
        raise ValueError(
            f"site {site!r} of layer {layer.name} has hidden states that are {found}, expected (batch, tokens, width): "
            "positions, gates on the prompt, probes and tenants cannot tell whose row is whose there; use positions='all', "
            "or another site"
        )


def install(model, stacks, rows, owners, root):
    """Swap the owners of layers with edits, and modules that generate if a plan or an assignment must know of it.

    Returns the [module] to give to `uninstall`.
    """
    generating = [m for m in model.modules() if hasattr(type(m), "prepare_inputs_for_generation")]
    rows.answers = bool(generating) and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    states = {id(m): (m, Planned(rows=rows)) for m in generating if stacks or root.owned}
    for owner in owners:
        states.setdefault(id(owner), (owner, Planned()))[1].root = root
    for stack in stacks:
        states[id(stack.owner)][1].stack = stack
    done = []
    for module, state in states.values():
        if not swappable(module):
            if not stacks:
                continue  # its `generate` is not seen: a sequence is one row; what is replaced in it is seen by `report`
            uninstall(done)
            raise ValueError(
                f"positions need {type(module).__name__}.forward, which was replaced on the instance; put that back, or "
                "use positions='all'"
            )
        swap(module, PLANNED, state)
        done.append(module)
    return done


def uninstall(modules):
    for module in modules:
        swap_back(module)


def owner_of(model, layer):
    """The innermost module around a layer whose forward is given the tokens, else the one that holds the layers.

    None for a layer that is no longer in the model.
    """
    path = next((path for path, module in model.named_modules() if module is layer), None)
    if path is None:
        return None
    around, module = [model], model
    for part in path.split(".")[:-1] if path else ():
        module = module._modules[part]
        if not isinstance(module, torch.nn.ModuleList):
            around.append(module)
    knowing = [m for m in around if set(INPUTS) & set(inspect.signature(base_of(m).forward).parameters)]
    return (knowing or around)[-1]
