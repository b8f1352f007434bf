"""Calls of fastedit.ops: an argument list drawn at random, the documented contract, and the expression in float64.

The contract is written down a second time here, from the docstrings: `Wrong` is what a call must not accept. What it
does accept is compared with the plain expression in float64, whose rounding is bounded by the same expression of
absolute values (`within`).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastedit import ValueNet, ops

from . import drawing as st

ROWS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORM = ("scale", "bias", "read", "offset", "write")
OPS = ("edit", "edit_add", "edit_add_norm", "project", "moments", "value_ascent")
REFUSALS = (TypeError, ValueError, IndexError, KeyError)


class Wrong(Exception):
    """The contract does not allow this call."""


class Unsaid(Exception):
    """The contract says nothing of this call: served or refused, but by a refusal."""


def need(true, what):
    if not true:
        raise Wrong(what)


# --- drawing ------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call: the op's name, its arguments by name, and what was done to them."""

    op: str
    given: dict
    faults: tuple = ()

    def __repr__(self):
        return f"{self.op}({', '.join(f'{n}={said(v)}' for n, v in self.given.items())}) after {self.faults or 'nothing'}"


def said(value):
    if isinstance(value, torch.Tensor):
        grad = ", grad" if value.requires_grad else ""
        return f"{str(value.dtype)[6:]}{list(value.shape)}{'' if value.layout is not torch.strided else value.stride()}{grad}"
    return f"{value!r:.60}"


JUNK = (  # in the place of anything
    None, "x", "", b"sum", 3, -1, True, 2.5, math.nan, math.inf, 10**400, [1.0, 2.0], {}, object(), print, 1j, torch.float32,
    np.float32(1), np.ones(3, np.float32), torch.tensor(1.0), torch.ones(2, 0), torch.ones(3, device="meta"), torch.tensor(True),
)  # fmt: skip
BENT = {  # in the place of a tensor, made of it
    "half": lambda t: t.half(), "double": lambda t: t.double(), "integer": lambda t: t.long(), "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64), "numpy": lambda t: t.detach().float().numpy(), "list": lambda t: t.tolist(),
    "another dimension": lambda t: t[None], "longer": lambda t: torch.cat([t, t[..., :1]], -1) if t.dim() else t[None],
    "shorter": lambda t: t[..., :-1] if t.dim() else t, "first": lambda t: t[0] if len(t) else t.sum(),
    "no rows": lambda t: t[:0], "meta": lambda t: t.to("meta"), "sparse": lambda t: t.to_sparse(),
    "trained": lambda t: t.detach().float().requires_grad_(), "int32": lambda t: t.int(), "uint8": lambda t: t.to(torch.uint8),
    "backwards": lambda t: t.T if t.dim() == 2 else t.flip(0), "spread": lambda t: t[..., :1].expand_as(t),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0], "deep": lambda t: t.reshape(*[1] * 17, *t.shape),
    "negative bit": lambda t: torch._neg_view(t.detach().float()), "parameter": lambda t: torch.nn.Parameter(t.detach()),
    "subclass": lambda t: t.as_subclass(Sub), "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "out of range": lambda t: t * 0 - 2,
    "huge": lambda t: t * 0 + (2.0**31 if t.is_floating_point() else 2**31 - 1),
}  # fmt: skip


class Sub(torch.Tensor):
    pass


def tensor(draw, *shape, dtype=torch.float32, low=-2.0, high=2.0):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)


def rows_of(draw, lead, width, dtype):
    made = tensor(draw, *lead, width + 3, dtype=dtype)
    kind = draw(st.sampled_from(("dense", "piece", "turned", "spread")))
    if kind == "piece":
        return made[..., 2 : 2 + width]
    made = made[..., :width].contiguous()
    if kind == "turned" and made.dim() > 1:
        return made.mT.contiguous().mT
    return made[..., :1, :].expand_as(made) if kind == "spread" and made.dim() > 1 and made.shape[-2] else made


@st.composite
def calls(draw, op):
    """A Call of an op: right in half of the cases, else with one to three arguments bent or replaced."""
    lead = draw(st.sampled_from(((), (0,), (1,), (5,), (2, 3), (2, 0, 3), (1, 4, 1))))
    width, dtype = draw(st.sampled_from((1, 2, 7, 16, 33))), draw(st.sampled_from(ROWS))
    made = {"value_ascent": ascent, "moments": moments, "project": project}.get(op, edit)
    given = made(draw, op, lead, width, dtype)
    faults = []
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 1, 2, 3)))):
        name = draw(st.sampled_from(sorted(given)))
        if isinstance(given[name], torch.Tensor) and draw(st.booleans()):
            fault = draw(st.sampled_from(sorted(BENT)))
            try:
                given[name] = BENT[fault](given[name])
            except (RuntimeError, TypeError, NotImplementedError, IndexError):  # torch has no such tensor
                continue
        else:
            fault = draw(st.integers(0, len(JUNK) - 1))
            given[name] = JUNK[fault]
            fault = f"junk {fault}"
        faults.append(f"{name}: {fault}")
    return Call(op, given, tuple(faults))


def edit(draw, op, lead, width, dtype):
    rank, slots = draw(st.sampled_from((0, 0, 1, 3, 5))), draw(st.sampled_from((0, 0, 1, 3)))
    some = (slots,) if slots else ()
    second = torch.float32 if dtype is not torch.float64 and draw(st.booleans()) else dtype
    given = {"hidden": rows_of(draw, lead, width, dtype)}
    if op != "edit":
        given = {"x": given["hidden"], "residual": rows_of(draw, lead, width, second), "on": draw(st.sampled_from(("x", "sum")))}
    if op == "edit_add_norm":
        given |= {"kind": draw(st.sampled_from(("rms", "gemma", "layer"))), "eps": draw(st.sampled_from((1e-6, 1e-5, 1)))}
        given["weight"] = tensor(draw, width, dtype=second)
        if given["kind"] == "layer" and draw(st.booleans()):
            given["norm_bias"] = tensor(draw, width, dtype=second)
    if slots or draw(st.booleans()):
        given["scale"] = tensor(draw, *some, width)
    if draw(st.booleans()):
        given["bias"] = tensor(draw, *some, width)
    if rank:
        given |= {"read": tensor(draw, *some, rank, width), "write": tensor(draw, *some, rank, width)}
        if draw(st.booleans()):
            given["offset"] = tensor(draw, *some, rank)
        given["return_projection"] = draw(st.booleans())
    if slots:
        given["slot"] = tensor(draw, *lead, low=-1, high=slots - 1e-3).floor().int()
    strength = draw(st.sampled_from(("none", "float", "dial", "rows")))
    if strength != "none":
        given["strength"] = {"float": 0.5, "dial": tensor(draw, 1), "rows": tensor(draw, *lead)}[strength]
    if draw(st.integers(0, 3)) == 0:
        given["gate"] = tensor(draw, *some, width)
        given["rule"] = tensor(draw, *some, 3)
        given["rule"][..., 1:] = given["rule"][..., 1:].clamp(min=0).round()
    if draw(st.integers(0, 3)) == 0:
        for name in draw(st.sets(st.sampled_from(sorted(given)))):
            if isinstance(given[name], torch.Tensor) and given[name].is_floating_point():
                given[name] = given[name].requires_grad_()
    return given


def project(draw, op, lead, width, dtype):
    rank = draw(st.sampled_from((1, 2, 5)))
    given = {"hidden": rows_of(draw, lead, width, dtype), "read": tensor(draw, rank, width)}
    return given | ({"offset": tensor(draw, rank)} if draw(st.booleans()) else {})


def moments(draw, op, lead, width, dtype):
    given = {"hidden": rows_of(draw, lead, width, dtype)}
    if draw(st.booleans()):
        given["group"] = tensor(draw, *lead, low=-1, high=3.99).floor().int()
        given["groups"] = draw(st.sampled_from((None, 4, 7)))
    return given | ({"mask": tensor(draw, *lead) > 0} if draw(st.booleans()) else {})


def ascent(draw, op, lead, width, dtype):
    units = draw(st.sampled_from((1, 5, (4, 3))))
    net = ValueNet(width, units)
    return {
        "hidden": rows_of(draw, lead, width, dtype), "value_net": net, "steps": draw(st.sampled_from((0, 1, 4))),
        "step_size": draw(st.sampled_from((0.1, 1, -0.5))),
    }  # fmt: skip


# --- the contract -------------------------------------------------------------------------------------------------------


def held(value):
    """Whether a tensor's numbers can be read at all: dense, on this machine, of no wrapper's making."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized


def stream(name, value, like=None):
    if getattr(value, "is_meta", False) or isinstance(value, np.ndarray) or (held(value) and value.is_neg()):
        raise Unsaid(name)
    if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise Unsaid(name)
    need(held(value) and value.dtype in ROWS and value.dim(), name)
    need(like is None or value.shape == like.shape, f"{name}'s shape")
    return value.detach().double()


def parameter(name, value, shape, rows):
    if value is None:
        return None
    need(held(value) and tuple(value.shape) == shape, name)
    need(value.dtype is torch.float32 or (value.dtype is rows.dtype is torch.float64), f"{name}'s dtype")
    if value.is_neg():
        raise Unsaid(name)
    return value.detach().double()


def number(name, value, finite=True):
    if isinstance(value, bool):
        raise Unsaid(name)
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Wrong(name) from None
    need(math.isfinite(value) or not finite, name)
    return value


def flag(name, value):
    if not isinstance(value, bool):
        raise Unsaid(name)


def form_of(given, rows):
    """The form's tensors in float64, with a leading slot dimension; slot and coefficient a row."""
    width, lead = rows.shape[-1], tuple(rows.shape[:-1])
    slot, tensors = given.get("slot"), {name: given.get(name) for name in FORM}
    some = ()
    for each in (slot, given.get("strength")):
        if held(each) and each.dim() == 1 and tuple(each.shape) != lead and len(each) == math.prod(lead):
            raise Unsaid("one a row, already flat")
    if slot is not None:
        need(held(slot) and slot.dtype is torch.int32 and tuple(slot.shape) == lead, "slot")
        first = next((tensors[n] for n in ("scale", "bias", "read") if tensors[n] is not None), None)
        need(held(first) and first.dim() >= 2 and len(first), "slots")
        some = tuple(first.shape[:1])
    read = tensors["read"]
    rank = read.shape[-2] if held(read) and read.dim() >= 2 else 0
    need(read is None or 1 <= rank <= 64, "read's rank")
    need((read is None) == (tensors["write"] is None) and (read is not None or tensors["offset"] is None), "read and write")
    shapes = {"scale": (width,), "bias": (width,), "read": (rank, width), "offset": (rank,), "write": (rank, width)}
    found = {name: parameter(name, value, (*some, *shapes[name]), rows) for name, value in tensors.items()}
    strength = given.get("strength")
    if isinstance(strength, torch.Tensor):
        need(held(strength), "strength")
        one = strength.numel() == 1 and strength.dim() <= 1
        need(one or tuple(strength.shape) == lead, "strength")
        strength = parameter("strength", strength, tuple(strength.shape), rows)
    elif strength is not None:
        strength = number("strength", strength, finite=False)
    gate, rule = given.get("gate"), given.get("rule")
    need((gate is None) == (rule is None), "gate and rule")
    gate, rule = parameter("gate", gate, (*some, width), rows), parameter("rule", rule, (*some, 3), rows)
    if slot is not None:
        slot = slot.reshape(-1).long()
        need(bool(((slot >= -1) & (slot < some[0])).all()), "slot's range")
    if given.get("return_projection") is not None:
        flag("return_projection", given["return_projection"])
        need(read is not None or not given["return_projection"], "a projection of nothing")
    return found, slot, strength, gate, rule


def edited(h, form, slot, strength, gate, rule):
    """(h', the same of absolute values, z, rows that no rounding can decide differently) in float64."""
    flat = h.reshape(math.prod(h.shape[:-1]), h.shape[-1])
    at = torch.zeros(len(flat), dtype=torch.long) if slot is None else slot.clamp(min=0)
    pick = {n: None if t is None else (t[at] if slot is not None else t.expand(len(flat), *t.shape)) for n, t in form.items()}
    k = torch.ones(len(flat), dtype=torch.float64)
    if strength is not None:
        k = k * (strength.reshape(-1) if isinstance(strength, torch.Tensor) else strength)
    decided = torch.ones(len(flat), dtype=torch.bool)
    if gate is not None:
        g, r = (t[at] if slot is not None else t.expand(len(flat), *t.shape) for t in (gate, rule))
        s, size = (flat * g).sum(-1), flat.norm(dim=-1)
        s = torch.where(r[:, 2] != 0, torch.where(size > 0, s / size, 0.0), s)
        far = (s - r[:, 0]).abs() > 1e-4 * (1 + s.abs())
        hard = r[:, 1] <= 0
        decided = far | ~hard
        k = k * torch.where(hard, (s > r[:, 0]).double(), torch.sigmoid(r[:, 1] * (s - r[:, 0])))
    if slot is not None:
        k = torch.where(slot < 0, 0.0, k)
    zero = torch.zeros_like(flat)
    update, size, z = zero, flat.abs(), None
    if pick["scale"] is not None:
        update, size = (pick["scale"] - 1) * flat, size + (pick["scale"].abs() + 1) * flat.abs() * k.abs()[:, None]
    if pick["bias"] is not None:
        update, size = update + pick["bias"], size + pick["bias"].abs() * k.abs()[:, None]
    if pick["read"] is not None:
        offset = 0.0 if pick["offset"] is None else pick["offset"]
        z = (pick["read"] @ flat[..., None])[..., 0] + offset
        z = z if slot is None else torch.where(slot[:, None] < 0, 0.0, z)
        large = (pick["read"].abs() @ flat.abs()[..., None])[..., 0] + abs(offset)
        update = update + (z[:, None] @ pick["write"])[:, 0]
        size = size + (large[:, None] @ pick["write"].abs())[:, 0] * k.abs()[:, None]
    out = torch.where(k[:, None] == 0, flat, flat + k[:, None] * update)
    lead = h.shape[:-1]
    return out.view(h.shape), size.view(h.shape), None if z is None else z.view(*lead, z.shape[1]), decided.view(lead)


def within(found, exact, size, dtype, decided=None):
    """Whether `found` is the rounding of `exact`, whose terms add up to `size`: 32 roundings in fp32 and two of the dtype."""
    if not torch.is_tensor(found) or found.shape != exact.shape or found.dtype is not dtype:
        return False
    exact = exact.to(dtype).double()  # what overflows the dtype is infinite in both
    loose = 32 * torch.finfo(torch.float32).eps * size + 2 * torch.finfo(dtype).eps * exact.abs() + 2 * torch.finfo(dtype).tiny
    found = found.detach().double()
    same = ((found - exact).abs() <= loose) | (found == exact) | (found.isnan() & exact.isnan()) | (size > 1e37)
    if dtype is torch.float16:
        same |= exact.abs() > 6e4  # at the edge either side of infinity is a rounding
    return bool(same.all() if decided is None else same[decided].all())


def judge_edit(call, result):
    given = call.given
    h = given.get("hidden")
    rows = stream("hidden", h)
    form, *rest = form_of(given, h)
    if result is None:
        return True
    out, size, z, decided = edited(rows, form, *rest)
    result = result if given.get("return_projection") else (result,)
    return len(result) == 1 + bool(given.get("return_projection")) and within(result[0], out, size, h.dtype, decided) and (
        len(result) == 1 or within(result[1], z, 100 + z.abs() + size.nan_to_num().sum(-1, keepdim=True), z_dtype(h))
    )


def z_dtype(*rows):
    return torch.float64 if any(t.dtype is torch.float64 for t in rows) else torch.float32


def judge_edit_add(call, result, norm=False):
    given, x, residual = call.given, call.given.get("x"), call.given.get("residual")
    wide, beside = stream("x", x), stream("residual", residual, x)
    on = given.get("on", "x")
    need(isinstance(on, str) and on in ("x", "sum"), "on")
    form, *rest = form_of(given, x)
    out_dtype = torch.promote_types(x.dtype, residual.dtype)
    if norm:
        weight, bias = norm_of(given, x, out_dtype)
    if result is None:
        return True
    if on == "sum":
        out, size, z, decided = edited(wide + beside, form, *rest)
        size = size * 2 + wide.abs() + beside.abs()
    else:
        out, size, z, decided = edited(wide, form, *rest)
        out, size = out + beside, size + beside.abs()
    wanted = bool(given.get("return_projection"))
    result = result if isinstance(result, tuple) else (result,)
    if len(result) != 1 + norm + wanted or not within(result[0], out, size, out_dtype, decided):
        return False
    if norm and not normed(result[0], result[1], given, weight, bias, out_dtype):
        return False
    return not wanted or within(result[-1], z, 100 + z.abs() + size.nan_to_num().sum(-1, keepdim=True), z_dtype(x, residual))


def norm_of(given, x, dtype):
    kind, width = given.get("kind", "rms"), x.shape[-1]
    need(isinstance(kind, str) and kind in ("rms", "gemma", "layer"), "kind")
    if not isinstance(given.get("eps", 1e-6), (int, float)):
        number("eps", given["eps"], finite=False)
        raise Unsaid("eps")
    if not math.isfinite(number("eps", given.get("eps", 1e-6), finite=False)):
        raise Unsaid("eps")
    found = []
    for name in ("weight", "norm_bias"):
        value = given.get(name)
        need(value is None or (held(value) and tuple(value.shape) == (width,) and value.dtype is dtype), name)
        if held(value) and value.is_neg():
            raise Unsaid(name)
        need(value is not None or kind == "layer" or name == "norm_bias", "a norm without weight")
        need(value is None or name == "weight" or kind == "layer", "norm_bias")
        found.append(None if value is None else value.detach().double())
    return found


def normed(stored, result, given, weight, bias, dtype):
    rows, eps, kind = stored.detach().double(), float(given.get("eps", 1e-6)), given.get("kind", "rms")
    if kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    variance = rows.square().mean(-1, keepdim=True) + eps
    if bool((variance <= 1e-12).any()) or (rows.shape[-1] == 1 and kind == "layer"):
        return True  # a difference of equal numbers
    out = rows * variance.rsqrt()
    size = out.abs() * 4 + stored.double().abs().amax(-1, keepdim=True) * variance.rsqrt() if rows.numel() else out
    if weight is not None:
        factor = 1 + weight if kind == "gemma" else weight
        out, size = out * factor, size * (1 + factor.abs())
    if bias is not None:
        out, size = out + bias, size + bias.abs()
    return within(result, out, size + size * torch.finfo(dtype).eps * 2**16, dtype)


def judge_edit_add_norm(call, result):
    return judge_edit_add(call, result, norm=True)


def judge_project(call, result):
    h, read, offset = (call.given.get(n) for n in ("hidden", "read", "offset"))
    rows = stream("hidden", h)
    need(held(read) and read.dim() == 2 and 1 <= read.shape[0] <= 64, "read")
    read = parameter("read", read, (read.shape[0], rows.shape[-1]), h)
    offset = parameter("offset", offset, (read.shape[0],), h)
    if result is None:
        return True
    z, size = rows @ read.T, rows.abs() @ read.abs().T
    return within(result, z if offset is None else z + offset, size + (0 if offset is None else offset.abs()), z_dtype(h))


def judge_moments(call, result):
    h, group, mask, groups = (call.given.get(n) for n in ("hidden", "group", "mask", "groups"))
    rows = stream("hidden", h)
    lead = rows.shape[:-1]
    need(mask is None or (held(mask) and mask.dtype is torch.bool and mask.shape == lead), "mask")
    if isinstance(groups, bool):
        raise Unsaid("groups")
    need(groups is None or (type(groups) is int and 1 <= groups < 2**31), "groups")
    if group is not None:
        need(held(group) and group.dtype is torch.int32 and group.shape == lead, "group")
        need(groups is None or not group.numel() or int(group.max()) < groups, "group's range")
        need(not group.numel() or int(group.max()) < 2**20, "group's range")
    if result is None:
        return True
    at = (torch.zeros(lead) if group is None else group).reshape(-1).long()
    at = at if mask is None else torch.where(mask.reshape(-1), at, -1)
    count, mean, m2 = result
    rows = rows.reshape(math.prod(lead), rows.shape[-1])
    for number in range(len(count)):
        these = rows[at == number]
        exact = these.mean(0) if len(these) else torch.zeros(rows.shape[-1], dtype=torch.float64)
        squares = (these - exact).square().sum(0)
        near = dict(rtol=1e-5, atol=1e-6, equal_nan=True)
        sound = exact.isfinite()  # an infinite value leaves no mean: infinite or no number
        if count[number] != len(these) or not torch.allclose(mean[number][sound], exact[sound], **near):
            return False
        if mean[number][~sound].isfinite().any():
            return False
        if not torch.allclose(m2[number], squares, **near) and float(rows.abs().max()) < 1e15:
            return False
    largest = 0 if group is None else max(group.reshape(-1).tolist(), default=0)
    return len(count) == (max(1, 1 + largest) if groups is None else groups)


def judge_value_ascent(call, result):
    h, net, steps, size = (call.given.get(n) for n in ("hidden", "value_net", "steps", "step_size"))
    rows = stream("hidden", h)
    need(isinstance(net, ValueNet) and net.width == rows.shape[-1], "value_net")
    need(type(steps) is int and 0 <= steps < 2**24, "steps")
    need(isinstance(size, (int, float)), "step_size")
    size = number("step_size", size)
    if result is None:
        return True
    weight, bias, weight2, bias2, head = (None if t is None else t.detach().double() for t in net.tensors())
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    at, clear = flat, torch.ones(len(flat), dtype=torch.bool)
    for _ in range(steps):
        z = at @ weight.T + bias
        clear &= (z.abs() > 1e-4).all(-1)
        on = (z > 0).double()
        if weight2 is None:
            slope = on * head
        else:
            z2 = z.relu() @ weight2.T + bias2
            clear &= (z2.abs() > 1e-4).all(-1)
            slope = on * (((z2 > 0).double() * head) @ weight2)
        at = at + size * slope @ weight
    bound = flat.abs() + (steps * abs(size)) * 10 + at.abs()
    return within(result, at.view(rows.shape), bound.view(rows.shape), h.dtype, clear.view(rows.shape[:-1]))


JUDGES = {op: globals()[f"judge_{op}"] for op in OPS}


def run(call):
    """None where the call did what it should, else what it did: for a finding. And whether it was served."""
    judge = JUDGES[call.op]
    allowed = True
    try:
        judge(call, None)
    except Wrong as wrong:
        allowed = wrong
    except Unsaid:
        allowed = None
    before = {n: t.detach().clone() for n, t in call.given.items() if held(t)}
    try:
        result = getattr(ops, call.op)(**call.given)
    except REFUSALS as error:
        if allowed is True:
            return f"refused what is documented: {type(error).__name__}: {error}", False
        return (None if allowed is None or says_enough(str(error)) else f"a refusal that says too little: {error!r:.200}"), False
    except Exception as error:
        return f"{type(error).__name__} (wrong: {allowed}): {error!s:.200}", False
    for name, tensor in before.items():
        if not torch.equal(_now(tensor), _now(call.given[name])):
            return f"{name} was changed", True
    if allowed is None:
        return None, True
    if allowed is not True:
        return f"served, and should not have been: {allowed}", True
    return (None if judge(call, result) else f"wrong numbers: {said(result)}"), True


def _now(tensor):
    tensor = tensor.detach()
    return tensor.double().nan_to_num(7.0) if tensor.is_floating_point() else tensor  # float8 has no nan_to_num


def says_enough(text):
    """A sentence, with what was expected or what to do in it."""
    return len(text) >= 20 and any(word in text for word in WORDS)


WORDS = (
    "expected", "needs", "need a", "belong", "use ", "move", "same", "given without", "takes", "reads", "supported", "makes",
    "the model has", "there is n", "holds", "is empty", "wide", "leave it out", "add ", "are all", "go together", "pass ",
    "allow ", "measure at", "not reached", "looked for", "this bank does not serve", "out of range in self", "should be",
    "is ambiguous",
    "patch it separately", "an empty set", "leave layers", "have no direction", "not a plain state dict",
)  # fmt: skip
