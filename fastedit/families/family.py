"""What a family's table entry says, and how modules are found from it. patching/fused_layer.py reads the recipes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from ..edits.sites import SITES


class AddOf(NamedTuple):
    """One add of a recipe's owner."""

    inner: str  # the submodule whose output is added
    site: str | None  # None: no edit rides on its output
    ends_block: bool  # its sum is the residual stream leaving the layer
    dropout: str | None  # path of the dropout between site and add
    outputs: int  # how many things the inner module returns


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

    def adds(self):
        (attn, mlp), (attn_dropout, mlp_dropout) = self.inners, self.dropouts
        return AddOf(attn, "attn", False, attn_dropout, 2), AddOf(mlp, "mlp", True, mlp_dropout, 1)


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

    @property
    def norms(self):
        """Names of the owner's norms, first the one at its entry if it has one there."""
        return (self.norm,)

    def adds(self):
        return (AddOf(self.inner, self.site, self.block, self.dropout, self.outputs),)


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

    @property
    def norms(self):
        """Names of the owner's norms, first the one at its entry if it has one there."""
        return (self.norm,)

    def adds(self):
        return (AddOf(self.inner, self.site, False, self.dropout, 1),)


@dataclass(frozen=True)
class Input:
    """A site that is the first argument of a module, not its output."""

    path: str


@dataclass(frozen=True)
class Part:
    """A site that is one output of a fused projection. Its number is 0 for q, 1 for k, 2 for v.

    layout(holder, columns): how the projection in module `holder` orders its `columns`, as (groups, widths of q, k and
    v in each group).
    """

    path: str
    number: int
    layout: Callable

    def columns(self, layer, total):
        """(groups, start, stop): the columns of this site in each of `groups` equal groups of columns."""
        holder = submodule(layer, self.path.rpartition(".")[0])
        groups, widths = self.layout(holder, total)
        if groups * sum(widths) != total or min(groups, *widths) < 1:
            raise ValueError(
                f"{type(holder).__name__}.{self.path.rpartition('.')[2]} has {total} outputs, expected {groups} × "
                f"{widths} for q, k and v: this layout is not known; edit 'attn' instead"
            )
        start = sum(widths[: self.number])
        return groups, start, start + widths[self.number]


def fused_qkv(path, layout):
    """The sites q, k and v of a fused projection."""
    return {site: Part(path, number, layout) for number, site in enumerate("qkv")}


@dataclass(frozen=True, eq=False)
class Family:
    """Where things are in one layer of a family. Paths are relative to the layer; "" is the layer itself.

    sites: site → path of the module whose output it is, or an Input, or a Part. A layer must have `mlp`, `attn` and
        `block` to belong to the family. It may lack the others.
    fused: recipes for the adds that can carry an edit, used if the proof (patching/proof.py) allows. Of several for one
        owner, the first that is proved is used.
    plain: site → why no recipe carries it.
    final: paths, from the module that holds the stack, of what ends it after the last layer. The first that exists
        counts; if none does, the last layer ends the stack. None: not known.
    biases: site → (config flag, the linears that the flag gives a bias): how a merged bias is reloaded.
    requires, lacks: further paths, or plain attributes, that must and must not exist.
    """

    name: str
    sites: dict
    fused: tuple = ()
    plain: dict = field(default_factory=dict)
    final: tuple | None = ()
    biases: dict = field(default_factory=dict)
    requires: tuple = ()
    lacks: tuple = ()

    def matches(self, layer):
        return not self.missing(layer) and not any(_has(layer, path) for path in self.lacks)

    def missing(self, layer):
        """The paths that a layer of the family has, and this one has not."""
        needed = (*(self.sites[site] for site in ("mlp", "attn", "block")), *self.requires)
        return [path for path in needed if not _has(layer, path)]


def _has(layer, path):
    return path in layer.__dict__ or submodule(layer, path) is not None


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a model, as found. name: "layers.3", "decoder.0". index: over all stacks.

    first: whether it is its stack's first, whose input is `embed`. final: the module whose output is `final`, of
    the last layer of the last stack; None of others. width: of the residual stream, by the model's config; embedded: of what
    the model embeds tokens in; handed: of what the layer hands on, where that was seen (probe.py). None: not known.
    """

    name: str
    index: int
    module: nn.Module
    family: Family
    first: bool = False
    final: nn.Module | None = None
    width: int | None = None
    embedded: int | None = None
    handed: int | None = None

    def at(self, site):
        """The module whose output, or input, the site is. None if this layer has no such site."""
        if site == "final":
            return self.final
        place = self.place(site)
        if place is None:
            return None
        return submodule(self.module, place if isinstance(place, str) else place.path)

    def place(self, site):
        """A path, an Input or a Part: what the site is of the module `at(site)`. None without such a site."""
        if site == "embed":
            return Input("") if self.first else None
        return self.family.sites.get(site)

    def sites(self):
        """The names of the sites that exist."""
        return [site for site in SITES if self.at(site) is not None]

    def between(self, owner, site):
        """The modules whose outputs are between the site and an add in `owner`'s forward.

        For a site inside `owner` these are the site's module and those that hold it. For a site that holds `owner` they
        are `owner` and those that hold it.
        """
        found = [module for _, _, module in self.links(owner, site)]
        return tuple(m for m in found if not isinstance(m, nn.ModuleList))

    def ends(self):
        """The widths of the linear maps into the residual stream that are known."""
        return {outputs_of(m) for m in (self.at("attn"), self.at("mlp")) if m is not None} - {None}

    def links(self, owner, site):
        """((holder, name, module), …) of the modules on the way between a site and `owner`, from outside."""
        path = self.family.sites[site]
        inner, outer = (owner, path) if _inside(owner, path) else (path, owner)
        parts = inner.split(".") if inner else []
        start = len(outer.split(".")) if outer else 0
        way = [submodule(self.module, ".".join(parts[:n])) for n in range(start, len(parts) + 1)]
        names = [next((k for k, m in holder._modules.items() if m is inner), None) for holder, inner in pairwise(way)]
        return tuple(zip(way, names, way[1:], strict=False))


def _inside(inner, outer):
    return inner != outer and (not outer or inner.startswith(outer + "."))


def outputs_of(module):
    """How many outputs a linear map has, or None."""
    sizes = (getattr(module, name, None) for name in ("out_features", "nf"))
    return next((size for size in sizes if isinstance(size, int)), None)


def submodule(module, path):
    """The module at a dotted path, or None. A number indexes a ModuleList and may count from the end."""
    for part in path.split(".") if path else ():
        if isinstance(module, nn.ModuleList) and part.lstrip("-").isdigit():
            index = int(part)
            module = module[index] if -len(module) <= index < len(module) else None
        else:
            module = module._modules.get(part) if isinstance(module, nn.Module) else None
        if module is None:
            return None
    return module
