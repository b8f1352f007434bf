"""The kernels as torch functions: `edit`, `edit_add`, `edit_add_norm`, `project`, `moments`, `value_ascent`.

In plain eager mode an op is one call of the native module, which reads the tensors, checks them and allocates the
result. If that returns None, Python finds out why:

- a gradient is needed: an autograd.Function;
- a tracer looks on: the registered operators of ops/registered.py;
- a transform of torch.func is at work: the reference;
- another backend serves: ops/dispatch.py;
- an argument is wrong: the checks name it.
"""

import math

import torch
from torch.compiler import is_dynamo_compiling

from ..arguments import FP32_MAX, NORM_KINDS, TAKES, as_flag, as_number, check_norm_kind, check_on, check_projection
from ..kernels import reference
from .autograd import FUNCTIONS
from .checks import check, check_ascent, check_group, check_tensor
from .native import try_edit, try_edit_add, try_edit_add_norm, try_project
from .parameter_changes import transformed
from .registered import OPERATORS, ascend
from .running import PLAIN, exporting, run


def edit(
    hidden, scale=None, bias=None, read=None, offset=None, write=None, *,
    slot=None, strength=None, gate=None, rule=None, return_projection=False,
):  # fmt: skip
    """Apply an edit in normal form to hidden states, in one pass (docs/design.md, 1).

        h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write)

    k = strength · g, where g = 1 without a gate. With a gate, s = h · gate (or their cosine, for a gate of length 1),
    and g = 1 where s > threshold, else 0. With a sharpness, g = sigmoid(sharpness · (s − threshold)).

    Covers RED (scale, bias; arXiv 2402.15179 Eq. 3), (IA)³, steering (bias), directional ablation, clamping
    and LoReFT (read, offset, write).

    Args:
        hidden: (…, width), fp32, bf16 or fp16 (the reference serves fp64).
        scale, bias: (width,) fp32, or None for 1 and 0.
        read, write: (rank, width) fp32, rank 1 to 64. Both, or neither.
        offset: (rank,) fp32, added to the projection; None for 0.
        slot: int32, one per row (hidden.shape[:-1]). The parameters then have a leading slot dimension, and row i uses
            parameters[slot[i]]. −1 leaves the row's bits as they are. Out of range raises IndexError on the CPU. On a
            GPU that check would stall the stream, so such a row is left alone.
        strength: a float, an fp32 tensor of one element (a dial that can change without a new trace), or fp32, one per
            row. 0 leaves the row's bits as they are. So does a gate that is shut.
        gate: (width,) fp32, the direction that is looked for in h; with slot (slots, width).
        rule: (3,) fp32, with gate: threshold; sharpness, or 0 for a hard gate; 1 for the cosine (s over ‖h‖, and 0 for
            a row of zeros), else 0. With slot (slots, 3). The gate is evaluated in the same pass. If a gradient is
            needed, and under torch.compile, it is evaluated in operations before it. A hard gate has no gradient.
        return_projection: also return z = h @ readᵀ + offset, (…, rank) fp32.

    Returns:
        h' in hidden's shape and dtype, contiguous; or (h', z).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, before anything runs.
    """
    if not is_dynamo_compiling():
        done = try_edit(hidden, scale, bias, read, offset, write, slot, strength, return_projection, gate, rule)
        if done is not None:
            return done
    form = (scale, bias, read, offset, write, slot, _coefficient(strength, hidden, "hidden"))
    out, z = _seen("edit", (hidden,), form, gate=gate, rule=rule, want_z=return_projection)
    return (out, z) if return_projection else out


def edit_add(
    x, residual, scale=None, bias=None, read=None, offset=None, write=None, *,
    on="x", slot=None, strength=None, gate=None, rule=None, return_projection=False,
):  # fmt: skip
    """The residual add with an edit on it. It moves the bytes of the plain add.

    on="x":   residual' = residual + E(x)      sites `mlp` and `attn`
    on="sum": residual' = E(residual + x)      site `block`

    Args:
        x, residual: the same shape (…, width); dtypes promote as in PyTorch's add.
        scale, bias, read, offset, write, slot, strength, gate, rule, return_projection: as `edit`. A gate sees what the
            edit is given: x, or the sum in fp32. Without parameters this is the plain add.

    Returns:
        residual' (…, width), rounded once; or (residual', z).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, before anything runs.
    """
    on_sum = on == "sum"
    if not is_dynamo_compiling() and (on_sum or on == "x"):
        done = try_edit_add(
            x, residual, scale, bias, read, offset, write, slot, strength, on_sum, return_projection, gate, rule
        )
        if done is not None:
            return done
    check_on(on)
    form = (scale, bias, read, offset, write, slot, _coefficient(strength, x, "x"))
    out, z = _seen("edit_add", (x, residual), form, on_sum, gate=gate, rule=rule, want_z=return_projection)
    return (out, z) if return_projection else out


def edit_add_norm(
    x, residual, weight=None, scale=None, bias=None, read=None, offset=None, write=None, *,
    norm_bias=None, kind="rms", eps=1e-6, on="x", slot=None, strength=None, gate=None, rule=None,
    return_projection=False, return_residual=True,
):  # fmt: skip
    """edit_add, then a norm of the stored (rounded) residual', in one pass.

    Args:
        x, residual: as `edit_add`.
        weight: (width,), the norm's weight in the residual's dtype. None only for kind="layer".
        norm_bias: (width,), kind="layer" only.
        kind: "rms" (Llama, T5: rounds before it multiplies by the weight), "gemma" (rounds after, multiplies by
            1 + weight) or "layer" (LayerNorm).
        eps: added to the variance.
        return_residual: False if only the norm is read (BERT's post-norm). This saves the store, and returns None in
            its place unless a gradient is needed.
        on, scale, bias, read, offset, write, slot, strength, gate, rule, return_projection: as `edit_add`.

    Returns:
        (residual', normed), both (…, width); or (residual', normed, z).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, before anything runs.
    """
    on_sum, code = on == "sum", NORM_KINDS.get(kind) if isinstance(kind, str) else None
    if not is_dynamo_compiling() and code is not None and (on_sum or on == "x"):
        done = try_edit_add_norm(
            x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, strength, on_sum, code, eps,
            return_projection, return_residual, False, gate, rule,
        )  # fmt: skip
        if done is not None:
            return done
    check_on(on)
    check_norm_kind(weight, norm_bias, kind)
    eps = eps if isinstance(eps, float) else as_number("eps", eps)
    form = (scale, bias, read, offset, write, slot, _coefficient(strength, x, "x"))
    out, normed, z, *_ = _seen(
        "edit_add_norm", (x, residual, weight, norm_bias), form, on_sum, code, eps, gate=gate, rule=rule,
        want_z=return_projection, want_residual=return_residual,
    )  # fmt: skip
    return (out, normed, z) if return_projection else (out, normed)


def project(hidden, read, offset=None):
    """The activation projection z = hidden @ readᵀ + offset: a probe's output, a gate's input.

    Args:
        hidden: (…, width), fp32, bf16 or fp16.
        read: (rank, width) fp32, rank 1 to 64. offset: (rank,) fp32 or None.

    Returns:
        z (…, rank), fp32.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, before anything runs.
    """
    if not is_dynamo_compiling():
        done = try_project(hidden, read, offset)
        if done is not None:
            return done
    return _seen("project", (hidden, read, offset), ())


@torch.no_grad()
def moments(hidden, group=None, mask=None, groups=None):
    """Count, mean and M2 = Σ (h − mean)² of each group's rows, in one pass (Welford, merged by Chan's formula).

    Directions are made of these without storing activations: differences of means, and variances for a probe or for
    RoleRef's feature mask. The result is as accurate as two passes in float64, for every dtype of the rows and however
    large the mean is beside the deviations. There is no gradient: hidden states that require one are read as if they
    did not.

    Args:
        hidden: (…, width), fp32, bf16 or fp16 (the reference serves fp64).
        group: int32, one per row (hidden.shape[:-1]), 0 to groups − 1. −1 leaves a row out. None: all rows are group 0.
        mask: bool, one per row. False leaves a row out.
        groups: the number of groups. None: the largest number in `group` + 1, which waits for a GPU and which
            torch.compile cannot know.

    Returns:
        count (groups,) int64, mean (groups, width) float64, m2 (groups, width) float64; zeros for a group without rows.
        To merge several: fastedit.Moments.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device. IndexError: a group beyond groups, on the CPU. On a GPU
            that check would stall the stream, so such a row is left out.
    """
    traced = _traced(hidden)
    groups = check_group(hidden, group, mask, groups, traced)
    if mask is not None:
        group = torch.where(mask, 0 if group is None else group, -1).to(torch.int32)
    elif group is None and groups > 1:
        group = torch.zeros(hidden.shape[:-1], dtype=torch.int32, device=hidden.device)
    if traced:
        return OPERATORS["moments"](hidden, group, groups)
    return run("moments", hidden, group, groups)


@torch.no_grad()
def value_ascent(hidden, value_net, steps, step_size, target=None):
    """Gradient ascent on a value net, from each row by itself: u ← u + a ∇V(h + u), `steps` times; h' = h + u.

    This is RE-Control's control at test time (arXiv 2406.05954), without autograd. The steps stay in the first hidden
    layer's z = W h + b, which moves by a · (W Wᵀ) m. After the first step only units that change sign cost anything.
    There is no gradient: neither hidden states nor the value net train through it.

    Args:
        hidden: (…, width), fp32, bf16 or fp16 (the reference serves fp64).
        value_net: a fastedit.ValueNet of that width, on the same device. Its Gram matrix is computed at the first call,
            and again when its first weight has changed. Under torch.compile the caller does that: value_net.gram().
        steps, step_size: n and a of the paper.
        target: a number, or one for each output of the net. Then −½ Σ (V − target)² is ascended, towards these values. A net
            of several outputs needs it, or `value_net.mixed(weights)`. Targets, and nets of three hidden layers, take a
            product of the first layer's size for each step, and no kernel.

    Returns:
        h' in hidden's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, width, device or number, before anything runs.
    """
    check_ascent(hidden, value_net, steps, step_size, target)
    if target is not None or value_net.weight3 is not None:
        return value_net.ascended(hidden, steps, float(step_size), target)
    traced = _traced(hidden)
    gram = value_net.gram(torch.float64 if hidden.dtype is torch.float64 else torch.float32)
    version = value_net.gram_version if traced and not exporting() else -1  # a weight exported has no past
    arguments = (hidden, *value_net.tensors(), gram, version, steps, float(step_size))
    return OPERATORS["value_ascent"](*arguments) if traced else ascend(*arguments)


# --- calls that no native call has answered ----------------------------------------------------------------------------


def _traced(tensor):
    """True if the call must stay visible: torch.compile, export, torch.jit.trace, fake and functional tensors."""
    return type(tensor) not in PLAIN or torch.compiler.is_compiling() or torch.jit.is_tracing()


def _needs_grad(tensors):
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110, a generator costs half a microsecond
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            return True
    return False


def _coefficient(strength, hidden, name):
    """strength as the kernels see it: None (1 for every row) or an fp32 tensor."""
    if strength is None or isinstance(strength, torch.Tensor):
        return strength
    if not isinstance(strength, float) or FP32_MAX < abs(strength) < math.inf:
        strength = as_number("strength", strength)
    if strength == 1.0:
        return None
    check_tensor(hidden, name)
    return torch.full((1,), float(strength), dtype=torch.float32, device=hidden.device)


def _seen(op, rows, form, *how, gate=None, rule=None, want_z=False, want_residual=True):
    """An op for whoever must see it: a tracer, a transform, autograd. Else for another backend, or to be refused."""
    if want_z is not False and want_z is not True:
        want_z = as_flag("return_projection", want_z)
    if want_residual is not False and want_residual is not True:
        want_residual = as_flag("return_residual", want_residual)
    traced = _traced(rows[0])
    looked_at = not traced and transformed()
    learns = not (traced or looked_at) and _needs_grad((*rows, *form, gate, rule))
    if traced or looked_at or (learns and (gate is not None or rule is not None)):
        names = TAKES[op]
        check(op, dict(zip(names, (*rows, *form, *how), strict=False)) | {"gate": gate, "rule": rule, "want_z": want_z})
        if gate is not None:
            strength = _behind(gate, rule, _given_to_edit(op, rows, how), form[5], form[6])
            form = (*form[:6], strength.to(torch.promote_types(rows[0].dtype, torch.float32)))  # x may be narrower than the sum
    arguments = (*rows, *form, *how)
    if traced:
        out = OPERATORS[op](*arguments)
    elif looked_at:
        out = _defined(op, arguments)
    elif learns:
        if want_z and form[2] is None:
            check_projection(want_z, None)
        out = FUNCTIONS[op].apply(*arguments)
    elif op == "project":
        out = run(op, *arguments)
    else:
        more = (want_residual, False) if op == "edit_add_norm" else ()
        out = run(op, *arguments, want_z, *more, gate, rule)
    return out


def _given_to_edit(op, rows, how):
    """The hidden states that an edit is given. On the sum they are fp32, as in a kernel."""
    if op == "edit" or not how[0]:
        return rows[0]
    x, residual = rows[:2]
    dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    return residual.to(dtype) + x.to(dtype)


def _defined(op, arguments):
    """An op by its definition, for torch.func and forward-mode differentiation."""
    given = dict(zip(TAKES[op], arguments, strict=False))
    lead = arguments[0].shape[:-1]
    for name, value in given.items():
        if value is not None and name in ("hidden", "x", "residual"):
            given[name] = value.reshape(-1, value.shape[-1])
        elif value is not None and name in ("slot", "coefficient"):
            given[name] = value.reshape(-1)
    if op == "project":
        return reference.project(**given).view(*lead, -1)
    outputs = getattr(reference, op)(**given, want_z=given["read"] is not None)
    return tuple(None if t is None or t.dim() < 2 else t.reshape(*lead, t.shape[-1]) for t in outputs)


def _behind(gate, rule, hidden, slot, strength):
    """strength · g, one per row of hidden (…, width), in operations that autograd and a compiler see."""
    with torch.autocast(hidden.device.type, enabled=False):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if slot is None:
            s = project(hidden, gate[None])[..., 0]
        else:
            own = slot.long().clamp(0, gate.shape[0] - 1)  # what is out of range the edit itself refuses or leaves alone
            s, rule = (hidden.to(wide) * gate[own]).sum(-1), rule[own]
        threshold, sharpness, cosine = rule.unbind(-1)
        length = torch.linalg.vector_norm(hidden, dim=-1, dtype=wide)
        s = torch.where(cosine != 0, s / torch.where(length > 0, length, 1.0), s)
        soft = torch.sigmoid(sharpness * (s - threshold))
        g = torch.where(sharpness > 0, soft, (s > threshold).to(soft.dtype))
        return g if strength is None else torch.where(strength == 0, 0.0, strength * g)

