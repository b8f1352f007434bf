"""Sites that are a module's input, or columns of a fused projection; and modules that hold several sites."""

import torch

from ..families import Input, Part
from .layer_plan import site_width
from .site import Site


def site_at(layer, name):
    """The Site for a site of a layer."""
    place = layer.place(name)
    kinds = {Part: PartSite, Input: InputSite}
    return kinds.get(type(place), Site)(layer, name)


def watch(layer, name, take):
    """Let take(hidden) see what passes a site, with the edits there. Returns a handle to remove it.

    Hidden states that are a module's input are seen before the edits at that site.
    """
    place, module = layer.place(name), layer.at(name)
    if isinstance(place, Input):

        def before(module, args, kwargs):
            take(args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(before, with_kwargs=True)
    pick = None
    if isinstance(place, Part):
        groups, start, stop = place.columns(layer.module, site_width(module, layer))

        def pick(output):
            return output.unflatten(-1, (groups, -1))[..., start:stop].flatten(-2)

    def after(module, args, output):
        output = output[0] if isinstance(output, (tuple, list)) else output
        take(output if pick is None else pick(output))

    return module.register_forward_hook(after)


class InputSite(Site):
    """The first argument of a module."""

    reads_input = True

    def before(self, module, args, kwargs):
        """The module is about to be called: apply the edits to its input."""
        if args and isinstance(args[0], torch.Tensor):
            return (self.apply(args[0]), *args[1:]), kwargs
        if isinstance(kwargs.get("hidden_states"), torch.Tensor):
            return args, {**kwargs, "hidden_states": self.apply(kwargs["hidden_states"])}
        raise TypeError(
            f"site {self.site!r} of layer {self.layer.name}: {type(module).__name__} was called without a tensor as its "
            "first argument or as hidden_states"
        )

    def after(self, module, output):
        return output

    def put_hook(self, module):
        return module.register_forward_pre_hook(self.before, with_kwargs=True)


class PartSite(Site):
    """Columns of a fused projection's output: those from start to stop in each of `groups` equal groups of columns."""

    whole = False

    def __init__(self, layer, site):
        super().__init__(layer, site)
        module = layer.at(site)
        self.columns = layer.place(site).columns(layer.module, site_width(module, layer))

    def _late(self, hidden):
        return edit_parts(hidden, [self])


def edit_parts(hidden, parts):
    """A fused projection's output with some PartSites edited. Every other column keeps its bits.

    This takes one pass over the output beside the edits. The pieces are joined into a new tensor, because others may
    hold the old one.
    """
    grouped = hidden.unflatten(-1, (parts[0].columns[0], -1))
    pieces, done = [], 0
    for part in sorted(parts, key=lambda part: part.columns):
        _, start, stop = part.columns
        edited = part.apply(grouped[..., start:stop].flatten(-2))
        pieces += [grouped[..., done:start], edited.unflatten(-1, (grouped.shape[-2], -1))]
        done = stop
    return torch.cat([*pieces, grouped[..., done:]], -1).flatten(-2)


class Gathered:
    """Several sites of one module, in the order in which a forward pass reaches them (that of sites.SITES)."""

    def __init__(self, sites):
        self.inputs = [site for site in sites if site.reads_input]
        self.parts = [site for site in sites if isinstance(site, PartSite)]
        self.outputs = [site for site in sites if site not in self.inputs and site not in self.parts]
        self.reads_input = bool(self.inputs)

    def before(self, module, args, kwargs):
        for site in self.inputs:
            args, kwargs = site.before(module, args, kwargs)
        return args, kwargs

    def after(self, module, output):
        if self.parts:
            output = edit_parts(output, self.parts)
        for site in self.outputs:
            output = site.after(module, output)
        return output
