"""The fused forwards of layers made of steps (families/steps.py), beside those of fused_layer.py."""

from torch.compiler import is_compiling
from torch.nn.functional import dropout as functional_dropout

from ..families import ParallelLayer, ResidualLayer, submodule
from . import fused_layer as fused
from .fused_layer import STATE, State, arguments_of, entry_norm, leave, served_norms
from .residual_add import Add


class _Dropout:
    """What a Ride asks of a dropout, for a dropout that is a probability of its owner, or for a module without one."""

    def __init__(self, owner, name, module):
        self.owner, self.name, self.module = owner, name, module

    @property
    def _forward_hooks(self):
        return () if self.module is None else self.module._forward_hooks

    @property
    def training(self):
        return self.owner.training

    @property
    def p(self):
        return 0.0 if self.module is not None else _probability(self.owner, self.name)


def _probability(owner, name):
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def _dropout_of(owner, name):
    """What a Ride may ask about the dropout of that name. None if there is none."""
    if name is None:
        return None
    module = submodule(owner, name)
    return module if hasattr(module, "p") else _Dropout(owner, name, module)


def _dropped(owner, name, x):
    """x after the owner's own dropout. A dropout inside an inner module has run already."""
    if name is None:
        return x
    module = owner._modules.get(name)
    if module is not None:
        return module(x) if module.training or module._forward_hooks else x
    if not owner.training or ("." in name and submodule(owner, name) is not None):
        return x
    p = _probability(owner, name)
    return functional_dropout(x, p=p, training=True) if p else x


def _run(owner, chain, x):
    """x through a chain of submodules and dropout probabilities."""
    for name in chain:
        module = owner._modules.get(name)
        x = _dropped(owner, name, x) if module is None else module(x)
    return x


def _attend(step, module, x, kwargs):
    """The outputs of an attention, called as the layer calls it."""
    if step.only:
        given = {name: kwargs[name] for name in step.only if name in kwargs}
    else:
        given = {name: value for name, value in kwargs.items() if name not in step.drops}
    for name, inner_name in step.renamed:
        if name in given:
            given[inner_name] = given.pop(name)
    if step.keyword:
        return module(hidden_states=x, **given)
    if step.positional is not None and step.positional in given:
        return module(x, given.pop(step.positional), **given)
    return module(x, **given)


def residual_layer(recipe, base):
    names, steps, apart = arguments_of(base), recipe.steps, recipe.apart

    def forward(self, hidden_states, *args, **kwargs):
        state = self.__dict__.get(STATE)
        if state is None or len(args) > len(names):
            return base.forward(self, hidden_states, *args, **kwargs)
        if is_compiling():
            return state.traced(base.forward(self, hidden_states, *args, **kwargs))
        if apart is not None and hidden_states.dtype is apart:
            out = base.forward(self, hidden_states, *args, **kwargs)
            return out if state.block is None else state.block.apply(out)
        if args:
            kwargs.update(zip(names, args, strict=False))
        modules, hidden, normed, rest = self._modules, hidden_states, None, ()
        taken = [step for step in steps if step.only_with is None or kwargs.get(step.only_with) is not None]
        for number, step in enumerate(taken, 1):
            if recipe.flat and step is steps[-1]:
                hidden = hidden.reshape(-1, hidden.shape[-1])
                normed = None if normed is None else normed.reshape(hidden.shape)
            if step.before is None:
                normed = hidden
            elif normed is None:
                norm = modules[step.before]
                normed = entry_norm(state, hidden, norm) if number == 1 else norm(hidden)
            if step.attention:
                x, *more = _attend(step, modules[step.inner], normed, kwargs)
                rest = rest or more
            else:
                x = _run(self, step.chain, normed)
                x = x if step.chain[1:] or not isinstance(x, tuple) else x[0]
            x = x if step.behind is None else modules[step.behind](x)
            x = _dropped(self, step.dropout, x)
            x = x if step.multiplier is None else x * getattr(self, step.multiplier)
            if recipe.flat and step is steps[-1]:
                x, hidden = x.view(hidden_states.shape), hidden.view(hidden_states.shape)
            following = taken[number].before if number < len(taken) else None
            hidden, normed = _sum(state, step, x, hidden, following, step is steps[-1])
        return (hidden, *rest) if recipe.more else hidden

    return forward


def _sum(state, step, x, hidden, following, last):
    """(what the step leaves behind, the next step's norm of it or None)"""
    add, modules = state.adds[step.chain[-1]], state.module._modules
    if step.after is not None:
        norm = state.norms[step.after]
        out, normed = (add(x, hidden), None) if norm is None else add(x, hidden, norm, want_residual=False)
        return modules[step.after](out) if normed is None else normed, None
    if last:
        return leave(state, add, x, hidden), None
    norm = None if following is None else state.norms[following]
    return (add(x, hidden), None) if norm is None else add(x, hidden, norm)


def parallel_layer(recipe, base):
    names, (attn_name, mlp_name) = arguments_of(base), recipe.inners
    attn_dropout, mlp_dropout = recipe.dropouts
    attn_norm, mlp_norm = recipe.norms[0], recipe.norms[-1]

    def forward(self, hidden_states, *args, **kwargs):
        state = self.__dict__.get(STATE)
        if state is None or len(args) > len(names):
            return base.forward(self, hidden_states, *args, **kwargs)
        if is_compiling():
            return state.traced(base.forward(self, hidden_states, *args, **kwargs))
        if args:
            kwargs.update(zip(names, args, strict=False))
        if recipe.only:
            kwargs = {name: kwargs[name] for name in recipe.only if name in kwargs}
        modules = self._modules
        normed = entry_norm(state, hidden_states, modules[attn_norm])
        attended, *rest = modules[attn_name](normed, **kwargs)
        attended = _dropped(self, attn_dropout, attended)
        x = modules[mlp_name](normed if mlp_norm == attn_norm else modules[mlp_norm](hidden_states))
        x = _dropped(self, mlp_dropout, x)
        x = state.adds[attn_name](attended, x) if attn_name in state.adds else state.adds[mlp_name](x, attended)
        hidden = leave(state, state.adds["sum"], _dropped(self, recipe.sum_dropout, x), hidden_states)
        return (hidden, *rest) if recipe.more else hidden

    return forward


FORWARDS = {**fused.FORWARDS, ResidualLayer: residual_layer, ParallelLayer: parallel_layer}


def build_state(recipe, owner, sites, norms, ride, add=Add):
    """fused_layer.build_state, for every recipe. Sites that no add carries keep ride None."""
    if isinstance(recipe, ResidualLayer):
        return _residual_state(recipe, owner, sites, norms, ride, add)
    if isinstance(recipe, ParallelLayer):
        return _parallel_state(recipe, owner, sites, norms, ride, add)
    return fused.build_state(recipe, owner, sites, norms, ride, add)


def _residual_state(recipe, owner, sites, norms, ride, add):
    adds, block = {}, None
    for one in recipe.adds():
        x = sites.get(one.site)
        if x is not None:
            x.ride = ride(one.site, _dropout_of(owner, one.dropout), recipe.apart)
        if one.ends_block and "block" in sites:
            block = sites["block"]
            block.ride = ride("block", None, None)
        adds[one.inner] = add(x, block if one.ends_block else None)
    served = served_norms(recipe, owner, norms)
    state = State(owner, adds, served, served.get(recipe.entry), recipe.apart)
    state.block = block
    return state


def _parallel_state(recipe, owner, sites, norms, ride, add):
    """One of attn and mlp rides on the add of the two: mlp, if both are edited."""
    block, carried = sites.get("block"), "mlp" if "mlp" in sites or "attn" not in sites else "attn"
    one = next(one for one in recipe.adds() if one.site == carried)
    x = sites.get(carried)
    if x is not None:
        x.ride = ride(carried, _dropout_of(owner, one.dropout), None)
    if block is not None:
        block.ride = ride("block", None, None)
    served = served_norms(recipe, owner, norms)
    return State(owner, {one.inner: add(x), "sum": add(sum=block)}, served, served[recipe.entry])
