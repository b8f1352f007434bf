"""The fused forwards, one per recipe of families/family.py: the layer's own forward with its adds replaced.

A fused forward runs on a module whose class was swapped (patching/class_swap.py). It finds what it needs in a state
object beside the module's attributes. Without a state it is the layer's own forward.
"""

import inspect
from threading import get_ident as _ident

import torch
from torch.compiler import is_compiling

from ..families import PostNorm, PreNormLayer, PreNormSublayer, submodule
from .residual_add import Add, Norm

STATE = "_fastedit"


class State:
    """What the fused forward of one module uses.

    adds: {name of the inner module: Add}. norms: {name: Norm, or None if the module must be called}.
    entry: the Norm that a predecessor may have computed already. successor: the State for which this one may do so.
    apart: the dtype in which the sum is not what the successor reads. block: the `block` Site, if the module's own
    forward may have to leave it to us.
    """

    def __init__(self, module, adds, norms, entry=None, apart=None):
        self.module, self.adds, self.norms = module, adds, norms
        self.entry, self.apart = entry, apart
        self.successor = self.block = None
        self.own = ()  # the Sites that are the output of `module` itself
        self.carried = {}  # by thread: (hidden, version, normed) that the predecessor has left


    def traced(self, output):
        """The output of the layer's own forward, which a compiler sees in place of the fused one: sites apply their edits
        after their modules, and the compiler fuses. What the fused one looks up would cost a guard each."""
        for site in self.own:
            output = site.after(self.module, output)
        return output


# --- across layers ------------------------------------------------------------------------------------------


def _may_carry(module):
    """A normed tensor may cross from one module to the next: never under checkpointing, whose recomputation
    would not find it."""
    if module.training and getattr(module, "gradient_checkpointing", False):
        return False
    if (
        torch.is_grad_enabled()
    ):  # saved-tensor hooks: a checkpoint, or offloading; a graph task: a recomputation
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is None and (
            torch._C._current_graph_task_id() == -1
        )
    return not torch.is_inference_mode_enabled()  # inference tensors have no version to check


def entry_norm(state, hidden, norm):
    """norm(hidden), from the predecessor if this is the tensor it was computed from, unchanged."""
    carried = state.carried.pop(_ident(), None) if state.carried else None
    if carried is not None:
        source, version, normed = carried
        if source is hidden and hidden._version == version and _may_carry(state.module):
            return normed
    return norm(hidden)


def leave(state, add, x, residual):
    """The module's last add, with the successor's first norm if that can be carried over."""
    successor = state.successor
    if successor is None or not (_may_carry(state.module) and _may_carry(successor.module)):
        return add(x, residual)
    if residual.dtype is state.apart:
        return add(x, residual)
    hidden, normed = add(x, residual, successor.entry)
    if normed is not None:
        successor.carried[_ident()] = (hidden, hidden._version, normed)
    return hidden


def arguments_of(base):
    """The names that base.forward takes after self and the hidden states."""
    parameters = list(inspect.signature(base.forward).parameters.values())[2:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


# --- the forwards -------------------------------------------------------------------------------------------


def pre_norm_layer(recipe, base):
    attn_norm, mlp_norm = recipe.norms
    attn_name, mlp_name = recipe.inners
    names, cross, by_keyword = arguments_of(base), recipe.cross, recipe.by_keyword

    def forward(self, hidden_states, *args, **kwargs):
        state = self.__dict__.get(STATE)
        if state is None or len(args) > len(names):
            return base.forward(self, hidden_states, *args, **kwargs)
        if is_compiling():
            return state.traced(base.forward(self, hidden_states, *args, **kwargs))
        if args:
            kwargs.update(zip(names, args, strict=False))
        if cross and kwargs.get(cross[0]) is not None:
            return base.forward(self, hidden_states, **kwargs)  # which raises: there is no cross-attention
        for name in cross:
            kwargs.pop(name, None)
        modules = self._modules
        normed = entry_norm(state, hidden_states, modules[attn_norm])
        if by_keyword:
            attended = modules[attn_name](hidden_states=normed, **kwargs)
        else:
            attended = modules[attn_name](normed, **kwargs)
        attended = attended[0]
        add, norm = state.adds[attn_name], state.norms[mlp_norm]
        hidden, normed = (add(attended, hidden_states), None) if norm is None else add(attended, hidden_states, norm)
        if normed is None:
            normed = modules[mlp_norm](hidden)
        x = modules[mlp_name](normed)
        return leave(state, state.adds[mlp_name], x if isinstance(x, torch.Tensor) else x[0], hidden)

    return forward


def pre_norm_sublayer(recipe, base):
    names, renamed = arguments_of(base), dict(recipe.renamed)

    def forward(self, hidden_states, *args, **kwargs):
        state = self.__dict__.get(STATE)
        if state is None or len(args) > len(names):
            return base.forward(self, hidden_states, *args, **kwargs)
        if is_compiling():
            return state.traced(base.forward(self, hidden_states, *args, **kwargs))
        if args:
            kwargs.update(zip(names, args, strict=False))
        for name, inner_name in renamed.items():
            if name in kwargs:
                kwargs[inner_name] = kwargs.pop(name)
        modules = self._modules
        normed = entry_norm(state, hidden_states, modules[recipe.norm])
        x = modules[recipe.inner](normed, **kwargs)
        rest = ()
        if recipe.outputs > 1:
            x, *rest = x
        dropout = modules[recipe.dropout]
        if dropout.training or dropout._forward_hooks:
            x = dropout(x)
        hidden = leave(state, state.adds[recipe.inner], x, hidden_states)
        return (hidden, *rest) if recipe.outputs > 1 else hidden

    return forward


def post_norm(recipe, base):
    def forward(self, hidden_states, input_tensor):
        state = self.__dict__.get(STATE)
        if state is None:
            return base.forward(self, hidden_states, input_tensor)
        if is_compiling():
            return state.traced(base.forward(self, hidden_states, input_tensor))
        modules = self._modules
        x = modules[recipe.inner](hidden_states)
        dropout = modules[recipe.dropout]
        if dropout.training or dropout._forward_hooks:
            x = dropout(x)
        add, norm = state.adds[recipe.inner], state.norms[recipe.norm]
        out, normed = (add(x, input_tensor), None) if norm is None else add(x, input_tensor, norm, want_residual=False)
        return modules[recipe.norm](out) if normed is None else normed

    return forward


FORWARDS = {PreNormLayer: pre_norm_layer, PreNormSublayer: pre_norm_sublayer, PostNorm: post_norm}


# --- what each recipe's owner holds -------------------------------------------------------------------------


def build_state(recipe, owner, sites, norms, ride, add=Add):
    """The State of `owner` for sites {name: Site}, norms {name: (kind, eps) or None}.

    ride(site, dropout, apart) says when an add of this owner carries a site.
    """
    adds, apart = {}, getattr(recipe, "apart", None)
    for one in recipe.adds():
        x, total = sites.get(one.site), sites.get("block") if one.ends_block else None
        if x is not None:
            x.ride = ride(one.site, None if one.dropout is None else submodule(owner, one.dropout), None)
        if total is not None:
            total.ride = ride("block", None, apart)
        adds[one.inner] = add(x, total)
    served = served_norms(recipe, owner, norms)
    entry = None if isinstance(recipe, PostNorm) else served[recipe.norms[0]]
    return State(owner, adds, served, entry, apart)


def served_norms(recipe, owner, norms):
    """{name: Norm, or None if the module must be called}"""
    return {
        name: None if norms[name] is None
        else Norm(owner._modules[name], *norms[name], ((owner._modules, name, owner._modules[name]),))
        for name in recipe.norms
    }  # fmt: skip
