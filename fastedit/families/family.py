"""What a family's table entry says, and how modules are found from it. The recipes are read by fused.py."""

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class PreNormLayer:
    """norm → attention → add → norm → FFN → add, all in the layer's own forward."""

    norms: tuple  # (attention's, FFN's)
    inners: tuple  # (attention, FFN)
    by_keyword: bool  # the attention is called with hidden_states=, and with all that the layer is given
    dropouts: tuple = (None, None)  # paths of the dropouts that end the inners
    cross: tuple = ()  # arguments for a cross-attention, which the layer must not have
    without: str | None = None
    owner = ""
    sites = ("attn", "mlp", "block")


@dataclass(frozen=True)
class PreNormSublayer:
    """norm → inner → dropout → add, in a module of its own (T5)."""

    owner: str
    site: str
    norm: str
    inner: str
    dropout: str
    renamed: tuple = ()  # (argument, the inner's name for it)
    after: str | None = None  # the module whose sum this one reads; None for what enters the layer
    outputs: int = 1  # of the inner; further ones are returned behind the sum
    block: bool = False  # this sum is the residual stream leaving the layer
    apart: torch.dtype | None = None  # a dtype in which the layer treats the sum further before it is read

    @property
    def sites(self):
        return (self.site, "block") if self.block else (self.site,)


@dataclass(frozen=True)
class PostNorm:
    """norm(dropout(inner(x)) + residual), in a module of its own (BERT)."""

    owner: str
    site: str
    inner: str
    norm: str
    dropout: str

    @property
    def sites(self):
        return (self.site,)


@dataclass(frozen=True, eq=False)
class Family:
    """Where things are in one layer of a family; paths are relative to the layer, "" is the layer itself.

    sites: site → path of the module whose output is the site.
    fused: recipes for the adds that can carry an edit, used where the proof (proof.py) allows.
    biases: site → (config flag, the linears that the flag gives a bias): how a merged bias is reloaded.
    requires: further paths that must exist.
    """

    name: str
    sites: dict
    fused: tuple = ()
    biases: dict = field(default_factory=dict)
    requires: tuple = ()

    def matches(self, layer):
        return all(submodule(layer, path) is not None for path in (*self.sites.values(), *self.requires))


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a model, found. name: "layers.3", "decoder.0"; index: over all stacks."""

    name: str
    index: int
    module: nn.Module
    family: Family

    def at(self, site):
        """The module whose output is the site, or None where this layer has no such site."""
        path = self.family.sites.get(site)
        return None if path is None else submodule(self.module, path)

    def between(self, owner, site):
        """The modules whose outputs lie between the site and an add in `owner`'s forward.

        For a site inside `owner` these are the site's module and those that hold it; for one that holds
        `owner`, `owner` and those that hold it.
        """
        path = self.family.sites[site]
        inner, outer = (owner, path) if _inside(owner, path) else (path, owner)
        parts = inner.split(".") if inner else []
        start = len(outer.split(".")) if outer else 0
        found = [submodule(self.module, ".".join(parts[: n + 1])) for n in range(start, len(parts))]
        return tuple(m for m in found if not isinstance(m, nn.ModuleList))


def _inside(inner, outer):
    return inner != outer and (not outer or inner.startswith(outer + "."))


def submodule(module, path):
    """The module at a dotted path, or None. A number indexes a ModuleList, also from the end."""
    for part in path.split(".") if path else ():
        if isinstance(module, nn.ModuleList) and part.lstrip("-").isdigit():
            index = int(part)
            module = module[index] if -len(module) <= index < len(module) else None
        else:
            module = module._modules.get(part) if isinstance(module, nn.Module) else None
        if module is None:
            return None
    return module
