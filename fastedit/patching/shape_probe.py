"""What the layers of a model pass on. Read once, when a model is patched, from a forward of two sequences of five
tokens.

The forward runs on tensors without data (meta) if the model's code allows, else on the model itself. It runs no hooks.
The random state and each module's mode are restored.
"""

import contextlib
import inspect

import torch

from ..families.own_class import base_of
from .eval_mode import evaluating

BATCH, TOKENS = 2, 5


def check(layer, site, width, shapes, by_token, reads):
    """Check that an edit at a site of a layer acts on what it should.

    Args:
        width: of the edit. shapes: what the layer passed on, one shape per call (output_shapes). () if that is not
            known.
        by_token: whether the edit must know which token a row is (positions, gates, probes, tenants, banks).
        reads: whether something is read here (a probe, a gate), not only edited.

    Raises:
        ValueError: the layer passes on no tensor, or one of another width, or one not laid out as (batch, tokens,
            width); or something is read at a layer that runs more than once per forward.
    """
    kind = type(layer.module).__name__
    if reads and len(shapes) > 1:
        raise ValueError(
            f"layer {layer.name} ({kind}) runs {len(shapes)} times in a forward, as its weights are shared: an edit acts in "
            "each run, but which of them a probe, a gate or a capture means is not known"
        )
    for shape in shapes:
        if site == "block" and (shape is None or shape[-1] != width):
            found = "something else" if shape is None else f"hidden states of shape {shape}"
            raise ValueError(
                f"site 'block' of layer {layer.name}: expected hidden states {width} wide, but {kind} passes on {found}; "
                "edit 'attn' or 'mlp' there instead"
            )
        if by_token and shape is not None and shape[:-1] != (BATCH, TOKENS):
            raise ValueError(
                f"layer {layer.name}: {kind} passes on hidden states of shape {shape} for {BATCH} sequences of {TOKENS} tokens, "
                f"expected ({BATCH}, {TOKENS}, {width}): which row is which token is not known, so positions, gates, probes, "
                "tenants and banks are refused here. An edit of all tokens acts on every row"
            )


def output_shapes(model, layers):
    """{layer index: [shape of what the layer passes on, one per call]} in a forward of BATCH sequences of TOKENS
    tokens.

    A shape is None where it is no tensor, nor a tuple that starts with one; of a tuple with names (Reformer's two streams) it
    is not known which one is meant.
    """
    names = _names(model)
    if names is None:
        return None
    for device in ("meta", None):
        found = _run(model, layers, names, device)
        if found is not None:
            return found
    return None


def _names(model):
    """The arguments to call with, by the kind of the model. None if it takes no token ids."""
    takes = inspect.signature(base_of(model).forward).parameters
    if "input_ids" not in takes:
        return None
    return tuple(name for name in ("input_ids", "decoder_input_ids") if name in takes)


def _run(model, layers, names, device):
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    if device is None and any(t.is_meta for t in held.values()):
        return None
    if device == "meta" and any("_hf_hook" in m.__dict__ for m in model.modules()):
        return None  # accelerate would bring the weights back
    where = device or next(iter(held.values())).device
    ids = torch.ones(BATCH, TOKENS, dtype=torch.long, device=where)
    found = {layer.index: [] for layer in layers}
    with bare(model):
        hooks = [layer.module.register_forward_hook(_keeper(found[layer.index])) for layer in layers]
        try:
            given = dict.fromkeys(names, ids)
            if device is None:
                model(**given)
            else:
                torch.func.functional_call(model, {n: t.to(device) for n, t in held.items()}, kwargs=given)
        except Exception:
            if not all(found.values()):
                return None
        finally:
            for hook in hooks:
                hook.remove()
    return found if any(found.values()) else None


def _devices(held):
    return sorted({t.device.index or 0 for t in held.values() if t.device.type == "cuda"})


def _keeper(shapes):
    def keep(module, args, output):
        output = output[0] if type(output) in (tuple, list) and output else output
        shapes.append(tuple(output.shape) if isinstance(output, torch.Tensor) else None)

    return keep


@contextlib.contextmanager
def bare(model):
    """The model in eval mode, without gradients and without anyone's hooks; what its modules keep of a forward (recurrent
    states, say) and the random state are as they were afterwards."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    with _hookless(model), evaluating(model), torch.random.fork_rng(devices=_devices(held)), torch.no_grad():
        yield


@contextlib.contextmanager
def _hookless(model):
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        for module, held in before:
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                if held[name]:
                    module.__dict__[name] = type(held[name])()
        yield
    finally:
        for module, held in before:
            module.__dict__.clear()
            module.__dict__.update(held)
