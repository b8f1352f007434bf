"""A fused forward is proved before it is used.

The same small input goes through the layer's own forward and through the fused one. Stand-ins replace attention and
FFN, and copies with random weights on the CPU replace the norms. So the proof needs no real weights (meta, offloaded
and sharded models work), touches no global random state and leaves the layer alone. It compares structure, not kernels:
the fused side runs the ops' definitions in PyTorch.
"""

import inspect
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import nn

from ..edits.form import Form
from ..families import ParallelLayer, submodule
from ..families.own_class import base_of
from ..kernels.reference.edit_add_norm import norm as norm_by_definition
from .class_swap import swapped_class
from .fused_chain import build_state
from .fused_layer import STATE, arguments_of
from .layer_plan import site_width
from .residual_add import Add
from .site import Ride

_KINDS = ("rms", "gemma", "layer")
_EPS = ("variance_epsilon", "eps", "epsilon")


@dataclass
class Verdict:
    """reason: why a recipe is not used, or None. norms: {name: (kind, eps), or None: call the module}."""

    reason: str | None = None
    norms: dict = field(default_factory=dict)


def prove(layer, recipe):
    """The Verdict on a recipe for a layer."""
    owner = submodule(layer.module, recipe.owner)
    inners = _inners(recipe, owner)
    names = [*recipe.norms, *inners]
    missing = [name for name in names if name not in owner._modules]
    if missing:
        return Verdict(f"{type(owner).__name__} has no submodule {missing[0]!r}")
    if getattr(recipe, "without", None) and recipe.without in owner._modules:
        return Verdict(f"{type(owner).__name__} has a {recipe.without}")
    base = base_of(owner)
    first = list(inspect.signature(base.forward).parameters)[1:2]
    if first != ["hidden_states"]:
        return Verdict(f"{base.__name__}.forward takes {first} first, not hidden_states")
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        norms = {name: norm_spec(owner._modules[name], generator) for name in recipe.norms}
        try:
            reason = _compare(layer, recipe, owner, base, norms, generator)
        except (
            Exception
        ) as error:  # whatever a layer's own forward may do with stand-ins: no proof, no fusion
            reason = f"the proof could not run {base.__name__}: {type(error).__name__}: {error}"
    return Verdict(reason, norms)


def fingerprint(layer, recipe):
    """A key for layers that share a verdict: the same classes and plain settings of the owner and its children."""
    owner = submodule(layer.module, recipe.owner)
    modules = [("", owner), *owner.named_children()]
    return recipe, tuple((name, base_of(m), *_settings(m)) for name, m in modules)


def _settings(module):
    plain = (int, float, str, type(None))
    skipped = ("training", "layer_idx", "layer_id")
    settings = [(k, v) for k, v in module.__dict__.items() if isinstance(v, plain) and k not in skipped]
    shapes = [(k, None if p is None else tuple(p.shape)) for k, p in module._parameters.items()]
    return *sorted(settings, key=str), *shapes


# --- norms --------------------------------------------------------------------------------------------------


def norm_spec(module, generator):
    """(kind, eps) of a norm module that the kernel can replace, found by comparing the two. Else None."""
    eps = next(
        (getattr(module, name) for name in _EPS if isinstance(getattr(module, name, None), float)), None
    )
    weight = module._parameters.get("weight")
    if eps is None or module._modules or set(module._parameters) - {"weight", "bias"}:
        return None
    shape = getattr(module, "normalized_shape", None) if weight is None else weight.shape
    if shape is None or len(shape) != 1:
        return None
    for kind in _KINDS:
        if weight is None and kind != "layer":
            continue
        if all(
            _is_kind(module, kind, eps, shape[0], dtype, generator)
            for dtype in (torch.float32, torch.bfloat16)
        ):
            return kind, eps
    return None


def _is_kind(module, kind, eps, width, dtype, generator):
    """Whether the module is this norm, and the kernel's definition errs at most twice as much plus an ulp."""
    twin = _norm_twin(module, dtype, generator)
    rows = _rows((6, width), generator).to(dtype)
    weight, bias = twin._parameters.get("weight"), twin._parameters.get("bias")
    code = _KINDS.index(kind)
    wide = [None if p is None else p.double() for p in (weight, bias)]
    exact = norm_by_definition(rows.double(), *wide, code, eps)[0]
    ours, theirs = norm_by_definition(rows, weight, bias, code, eps)[0], twin(rows)
    if theirs.dtype is not dtype or theirs.shape != rows.shape:
        return False
    error, allowed = (ours.double() - exact).abs().amax(-1), (theirs.double() - exact).abs().amax(-1)
    ulp = torch.finfo(dtype).eps * exact.abs().amax(-1)
    # the module itself must be this norm, and the definition no worse than the module
    return bool((allowed <= 8 * ulp).all() and (error <= 2 * allowed + ulp).all())


def _rows(shape, generator):
    """Rows of very different sizes, so that another eps shows."""
    sizes = torch.logspace(-3, 1, shape[-2])[:, None]
    return torch.randn(shape, generator=generator) * sizes


def _blank(module, cls):
    """A shallow copy without hooks, in eval mode, of class `cls`."""
    twin = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, OrderedDict):
            twin.__dict__[name] = OrderedDict()
    for name in ("forward", "_old_forward", "_hf_hook", STATE):
        twin.__dict__.pop(name, None)
    twin.__dict__["_modules"], twin.__dict__["training"] = {}, False
    return twin


def _norm_twin(module, dtype, generator):
    twin = _blank(module, base_of(module))
    twin.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter((torch.rand(p.shape, generator=generator) + 0.5).to(dtype))
        for name, p in module._parameters.items()
    }
    return twin


# --- the layer ----------------------------------------------------------------------------------------------


class _StandIn(nn.Module):
    """Replaces attention or FFN: a fixed function of the rows, then a form. Notes how it was called."""

    def __init__(self, number, outputs, form, calls):
        super().__init__()
        self.number, self.outputs, self.form, self.calls = number, outputs, form, calls

    def forward(self, *args, **kwargs):
        rows = args[0] if args else kwargs["hidden_states"]
        self.calls.append((len(args), args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        bent = rows * (1 + 0.3 * self.number)
        out = bent / (1 + bent * bent) + 0.1 * self.number  # torch.sin's first call in a process may be off by 1e-4
        out = out if self.form is None else self.form(out.float()).to(out.dtype)
        return out if self.outputs == 1 else (out, *(f"output {n}" for n in range(1, self.outputs)))


class _Unexpected(nn.Module):
    """Replaces a child that the recipe does not know."""

    def forward(self, *args, **kwargs):
        raise RuntimeError("it calls a module that the recipe does not know")


class _GivenSite:
    """A site whose one stage is a given form."""

    on_x = on_sum = True
    looks = None

    def __init__(self, form):
        self.stages, self.form, self.ride = (self,), form, None

    def arguments(self, hidden):
        return self.form.tensors(), None

    def apply(self, hidden):
        return self.form(hidden.float()).to(hidden.dtype)


def _add_by_definition(x, residual, tensors, strength, on_sum, norm=None, want_residual=True, looks=None):
    """adds.add, in plain PyTorch."""
    form, dtype = Form(*tensors), torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.float(), residual.float()
    out = (form(residual + x) if on_sum else residual + form(x)).to(dtype)
    if norm is None:
        return out
    normed, _, _ = norm_by_definition(out.flatten(0, -2), *norm.parameters(), norm.code, norm.eps)
    return out, normed.view(out.shape)


class _DefinedAdd(Add):
    run = staticmethod(_add_by_definition)


def _compare(layer, recipe, owner, base, norms, generator):
    """None if the fused forward does what the layer's own does, with edits. Else the difference."""
    width = site_width(layer.at("mlp"), layer)
    forms = {
        site: Form(*(torch.randn(width, generator=generator) * 0.3 + one for one in (1.0, 0.0)))
        for site in recipe.sites
    }
    for dtype in (torch.float32, torch.bfloat16):
        weights = {name: _norm_twin(owner._modules[name], dtype, generator) for name in recipe.norms}
        rows = _rows((2, 3, width), generator).to(dtype)
        for without, left_out, by_keyword in _cases(recipe):
            arguments = _arguments(recipe, base, rows, by_keyword, left_out)
            edited = {site: form for site, form in forms.items() if site not in without}
            expected, expected_calls = _run(recipe, owner, base, weights, edited, None, arguments)
            fused = swapped_class(base, recipe)
            got, calls = _run(recipe, owner, fused, weights, edited, norms, arguments)
            difference = _difference(expected, got, dtype)
            if difference is None and calls != expected_calls:
                difference = f"it calls its submodules with other arguments: {calls} and not {expected_calls}"
            if difference is not None:
                return f"its forward is not what {type(recipe).__name__} says: {difference}"
    return None


def _cases(recipe):
    """(sites without an edit, arguments that are None, whether arguments are passed by keyword)"""
    for by_keyword in (True, False):
        yield (), (), by_keyword
    if isinstance(recipe, ParallelLayer):
        yield ("mlp",), (), True  # then the add carries `attn`
    if getattr(recipe, "optional", ()):
        yield (), recipe.optional, True


def _inners(recipe, owner):
    """{submodule that a stand-in replaces: (site of its output or None, how many outputs)}"""
    found = {one.inner: (one.site, one.outputs) for one in recipe.adds()}
    for step in getattr(recipe, "steps", ()):
        for name in step.chain[:-1]:
            module = owner._modules.get(name)
            if module is not None and any(True for _ in module.parameters()):
                found[name] = None, 1
    return found


def _arguments(recipe, base, rows, by_keyword, left_out=()):
    """Arguments for a forward: a marker for each, the rows where it takes rows, None for cross-attention."""
    values = {"hidden_states": rows}
    for name in arguments_of(base):
        values[name] = rows * 0.7 if name == "input_tensor" else f"given {name}"
    values |= dict.fromkeys((*getattr(recipe, "cross", ()), *left_out))
    if not by_keyword:
        return tuple(values.values()), {}
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values())
    rows = values.pop("hidden_states")
    return (rows,), {**values, **({"and_more": "given and_more"} if takes_more else {})}


def _run(recipe, owner, cls, weights, forms, norms, arguments):
    """(outputs, calls of the stand-ins) of the owner's twin of class `cls`. With norms, as a fused one."""
    twin, calls, fused = _blank(owner, cls), [], norms is not None
    known = _inners(recipe, owner)
    for number, (name, child) in enumerate(owner._modules.items()):
        if name in known:
            site, outputs = known[name]
            twin._modules[name] = _StandIn(number, outputs, None if fused else forms.get(site), calls)
        elif name in weights:
            twin._modules[name] = weights[name]
        elif child is None or not any(True for _ in child.parameters()):
            twin._modules[name] = nn.Identity()
        else:
            twin._modules[name] = _Unexpected()
    if fused:
        sites = {site: _GivenSite(form) for site, form in forms.items()}
        twin.__dict__[STATE] = build_state(recipe, twin, sites, norms, lambda *_: Ride(()), _DefinedAdd)
        for name, (site, _) in known.items():
            if site in sites and sites[site].ride is None:  # no add carries it: its own module applies it
                twin._modules[name].form = forms[site]
    positional, keywords = arguments
    out = twin(*positional, **keywords)
    rows, *rest = out if isinstance(out, tuple) else (out,)
    if not fused and "block" in forms:
        rows = forms["block"](rows.float()).to(rows.dtype)
    return (type(out), rows, rest), calls


def _difference(expected, got, dtype):
    """None, or in words where two outputs differ by more than rounding, row by row."""
    if expected[0] is not got[0] or expected[2] != got[2]:
        return "it returns something else behind the hidden states"
    a, b = expected[1], got[1]
    if a.dtype is not b.dtype or a.shape != b.shape:
        return f"it returns {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
    size = a.double().abs().amax(-1).clamp_min(1e-3)
    apart = float(((a.double() - b.double()).abs().amax(-1) / size).max())
    limit = 16 * torch.finfo(dtype).eps  # some roundings of the largest value in a row
    return (
        None
        if apart <= limit
        else f"outputs differ by {apart:.1e} of a row's largest value (limit {limit:.1e})"
    )
