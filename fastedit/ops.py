"""The kernels as torch functions: `edit`, `edit_add`, `edit_add_norm`, `project`, `moments`, `value_ascent`.

In plain eager mode an op is one call of the native module, which reads the tensors, checks them and allocates the
result. Where that says no (None), Python finds out why: a gradient is needed (an autograd.Function), a tracer looks on
(the registered operators of torch_library.py), a transform of torch.func is at work (the reference), another backend
serves (dispatch.py), or an argument is wrong, which the checks name.
"""

import torch
from torch.compiler import is_dynamo_compiling

from . import torch_library
from .arguments import NORM_KINDS, check_on, check_projection
from .changes import transformed
from .checks import check_ascent, check_form, check_gate, check_group, check_norm, check_rows, check_same_rows
from .functions import EditAddFunction, EditAddNormFunction, EditFunction, ProjectFunction
from .implementation import (
    run_edit,
    run_edit_add,
    run_edit_add_norm,
    run_moments,
    run_project,
    run_value_ascent,
)
from .kernels import reference
from .native import try_edit, try_edit_add, try_edit_add_norm, try_project

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _traced(tensor):
    """True where the call must stay visible: torch.compile, export, fake and functional tensors."""
    return type(tensor) not in _PLAIN or torch.compiler.is_compiling()


def _needs_grad(*tensors):
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110, a generator costs half a microsecond
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _coefficient(strength, hidden):
    """strength as the kernels see it: None (1 for every row) or an fp32 tensor."""
    if strength is None or isinstance(strength, torch.Tensor):
        return strength
    if isinstance(strength, (int, float)) and strength == 1.0:
        return None
    return torch.full((1,), float(strength), dtype=torch.float32, device=hidden.device)


def edit(
    hidden, scale=None, bias=None, read=None, offset=None, write=None, *,
    slot=None, strength=None, gate=None, rule=None, return_projection=False,
):  # fmt: skip
    """Apply an edit in normal form to hidden states, in one pass (DESIGN.md 2).

        h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write)

    k = strength · g, where g = 1 without a gate. With one, s = h · gate, or their cosine for a gate of length 1, and
    g = 1 where s > threshold, else 0; with a sharpness, g = sigmoid(sharpness · (s − threshold)).

    Covers RED (scale, bias; arXiv 2402.15179 Eq. 3), (IA)³, steering (bias), directional ablation, clamping
    and LoReFT (read, offset, write).

    Args:
        hidden: (…, width), fp32, bf16 or fp16 (fp64 is served by the reference).
        scale, bias: (width,) fp32, or None for 1 and 0.
        read, write: (rank, width) fp32, rank 1 to 64. Both, or neither.
        offset: (rank,) fp32, added to the projection; None for 0.
        slot: int32, one a row (hidden.shape[:-1]); the parameters then have a leading slot dimension and
            row i uses parameters[slot[i]]. −1 leaves the row's bits as they are. Out of range raises
            IndexError on the CPU; on a GPU, where looking would stall the stream, such a row is left alone.
        strength: A float, an fp32 tensor of one element (a dial that can change without a re-trace), or
            fp32, one a row. 0 leaves the row's bits as they are, and so does a gate that is shut.
        gate: (width,) fp32, what is looked for in h; with slot (slots, width).
        rule: (3,) fp32, with gate: threshold, sharpness or 0 for a hard gate, 1 for the cosine (s over ‖h‖, and 0 for
            a row of zeros) else 0; with slot (slots, 3). Looked at in the same pass; where a gradient is needed, and
            under torch.compile, in operations before it. A hard gate has no gradient.
        return_projection: also return z = h @ readᵀ + offset, (…, rank) fp32.

    Returns:
        h' in hidden's shape and dtype, contiguous; or (h', z).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, before anything runs.
    """
    if not is_dynamo_compiling():
        done = try_edit(hidden, scale, bias, read, offset, write, slot, strength, return_projection, gate, rule)
        if done is not None:
            return done if return_projection else done[0]
    coefficient = _coefficient(strength, hidden)
    form = (scale, bias, read, offset, write, slot, coefficient)
    check_rows(hidden, "hidden")
    check_form(hidden, *form)
    check_projection(return_projection, read)
    if gate is not None or rule is not None:
        check_gate(hidden, gate, rule, scale, bias, read, slot)
        if _traced(hidden) or _needs_grad(hidden, *form, gate, rule) or transformed():
            form, gate, rule = (*form[:6], _behind(gate, rule, hidden, slot, coefficient)), None, None
    if _traced(hidden):
        out, z = torch_library.edit(hidden, *form)
    elif transformed():
        out, z = _defined(reference.edit, (hidden,), form, return_projection)
    elif _needs_grad(hidden, *form):
        out, z = EditFunction.apply(hidden, *form)
    else:
        out, z = run_edit(hidden, *form, return_projection, gate, rule)
    return (out, z) if return_projection else out


def edit_add(
    x, residual, scale=None, bias=None, read=None, offset=None, write=None, *,
    on="x", slot=None, strength=None, gate=None, rule=None, return_projection=False,
):  # fmt: skip
    """The residual add with an edit on it: the traffic of the plain add.

    on="x":   residual' = residual + E(x)      sites `mlp` and `attn`
    on="sum": residual' = E(residual + x)      site `block`

    Args:
        x, residual: the same shape (…, width); dtypes promote as PyTorch's add does.
        Others: as `edit`; a gate sees what the edit is given: x, or the sum in fp32. With no parameters this is the
            plain add.

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
            return done if return_projection else done[0]
    check_on(on)
    coefficient = _coefficient(strength, x)
    form = (scale, bias, read, offset, write, slot, coefficient)
    _check_add(x, residual, form, return_projection)
    if gate is not None or rule is not None:
        form, gate, rule = _gate_of_add(x, residual, form, gate, rule, on_sum)
    if _traced(x):
        out, z = torch_library.edit_add(x, residual, *form, on_sum)
    elif transformed():
        out, z = _defined(reference.edit_add, (x, residual), form, on_sum, return_projection)
    elif _needs_grad(x, residual, *form):
        out, z = EditAddFunction.apply(x, residual, *form, on_sum)
    else:
        out, z = run_edit_add(x, residual, *form, on_sum, return_projection, gate, rule)
    return (out, z) if return_projection else out


def edit_add_norm(
    x, residual, weight=None, scale=None, bias=None, read=None, offset=None, write=None, *,
    norm_bias=None, kind="rms", eps=1e-6, on="x", slot=None, strength=None, gate=None, rule=None,
    return_projection=False, return_residual=True,
):  # fmt: skip
    """edit_add, then a norm of the stored (rounded) residual', in one pass.

    Args:
        x, residual: as `edit_add`.
        weight: (width,), the norm's weight in the residual's dtype; None only for kind="layer".
        norm_bias: (width,), kind="layer" only.
        kind: "rms" (Llama, T5: rounds before the weight multiply), "gemma" (rounds after, multiplies by
            1 + weight) or "layer" (LayerNorm).
        eps: added to the variance.
        return_residual: False where only the norm is read (BERT's post-norm): saves the store, and
            returns None in its place wherever no gradient is needed.
        Others: as `edit_add`.

    Returns:
        (residual', normed), both (…, width); or (residual', normed, z).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, before anything runs.
    """
    on_sum, code = on == "sum", NORM_KINDS.get(kind)
    if not is_dynamo_compiling() and code is not None and (on_sum or on == "x"):
        done = try_edit_add_norm(
            x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, strength, on_sum, code, eps,
            return_projection, return_residual, False, gate, rule,
        )  # fmt: skip
        if done is not None:
            return done[:3] if return_projection else done[:2]
    check_on(on)
    coefficient = _coefficient(strength, x)
    form = (scale, bias, read, offset, write, slot, coefficient)
    _check_add(x, residual, form, return_projection)
    check_norm(x, weight, norm_bias, kind)
    norm = (weight, norm_bias)
    if gate is not None or rule is not None:
        form, gate, rule = _gate_of_add(x, residual, form, gate, rule, on_sum, norm)
    if _traced(x):
        out, normed, z, _, _ = torch_library.edit_add_norm(x, residual, *norm, *form, on_sum, code, eps)
    elif transformed():
        form = (*norm, *form)
        out, normed, z = _defined(reference.edit_add_norm, (x, residual), form, on_sum, code, eps, return_projection)
    elif _needs_grad(x, residual, *norm, *form):
        out, normed, z, _, _ = EditAddNormFunction.apply(x, residual, *norm, *form, on_sum, code, eps)
    else:
        out, normed, z, _, _ = run_edit_add_norm(
            x, residual, *norm, *form, on_sum, code, eps, return_projection, return_residual, False, gate, rule
        )
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
    check_rows(hidden, "hidden")
    check_form(hidden, None, None, read, offset, None, None, None, read_only=True)
    if _traced(hidden):
        return torch_library.project(hidden, read, offset)
    if transformed():
        return reference.project(hidden.reshape(-1, hidden.shape[-1]), read, offset).view(*hidden.shape[:-1], read.shape[0])
    if _needs_grad(hidden, read, offset):
        return ProjectFunction.apply(hidden, read, offset)
    return run_project(hidden, read, offset)


@torch.no_grad()
def moments(hidden, group=None, mask=None, groups=None):
    """Count, mean and M2 = Σ (h − mean)² of each group's rows, in one pass (Welford, merged by Chan's formula).

    What a direction is made of without storing activations: differences of means, variances for a probe or for
    RoleRef's feature mask. As accurate as two passes in float64, whatever the rows' dtype and however large the mean is
    beside the deviations. Has no gradient: hidden states that require one are read as if they did not.

    Args:
        hidden: (…, width), fp32, bf16 or fp16 (fp64 is served by the reference).
        group: int32, one a row (hidden.shape[:-1]), 0 to groups − 1; −1 leaves a row out. None: all rows are group 0.
        mask: bool, one a row; False leaves a row out.
        groups: how many groups there are; None: the largest number in `group` + 1, which waits for a GPU, and which
            torch.compile cannot know.

    Returns:
        count (groups,) int64, mean (groups, width) float64, m2 (groups, width) float64; zeros for a group without rows.
        To be merged with others: fastedit.Moments.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device. IndexError: a group beyond groups, on the CPU; on a GPU,
        where looking would stall the stream, such a row is left out.
    """
    check_rows(hidden, "hidden")
    traced = _traced(hidden)
    groups = check_group(hidden, group, mask, groups, traced)
    if mask is not None:
        group = torch.where(mask, 0 if group is None else group, -1).to(torch.int32)
    if traced:
        return torch_library.moments(hidden, group, groups)
    return run_moments(hidden, group, groups)


@torch.no_grad()
def value_ascent(hidden, value_net, steps, step_size, target=None):
    """Gradient ascent on a value net, from each row on its own: u ← u + a ∇V(h + u), `steps` times; h' = h + u.

    RE-Control's control at test time (arXiv 2406.05954), without autograd: the steps stay in the first hidden layer's
    z = W h + b, which moves by a · (W Wᵀ) m, and only units that change sign cost anything after the first. Has no
    gradient: neither hidden states nor the value net are trained through it.

    Args:
        hidden: (…, width), fp32, bf16 or fp16 (fp64 is served by the reference).
        value_net: a fastedit.ValueNet of that width, on the same device. Its Gram matrix is made at the first call, and
            anew when its first weight has changed; under torch.compile that is the caller's: value_net.gram().
        steps, step_size: n and a of the paper.
        target: a number, or one for each output of the net: then what is ascended is −½ Σ (V − target)², towards these values.
            A net of several outputs needs it, or `value_net.mixed(weights)`. Targets, and nets of three hidden layers, take a
            product of the first layer's size a step, and no kernel.

    Returns:
        h' in hidden's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, width, device or number, before anything runs.
    """
    check_rows(hidden, "hidden")
    check_ascent(hidden, value_net, steps, step_size, target)
    if target is not None or value_net.weight3 is not None:
        return value_net.ascended(hidden, steps, float(step_size), target)
    traced = _traced(hidden)
    gram = value_net.gram(torch.float64 if hidden.dtype is torch.float64 else torch.float32)
    arguments = (hidden, *value_net.tensors(), gram)
    if traced:
        version = -1 if torch.compiler.is_exporting() else value_net.gram_version  # an exported weight has no history
        return torch_library.value_ascent(*arguments, version, steps, float(step_size))
    return run_value_ascent(*arguments, steps, float(step_size))


def _defined(op, streams, form, *more):
    """An op by its definition, for torch.func and forward-mode differentiation: its outputs but the statistics."""
    rows, lead = (s.reshape(-1, s.shape[-1]) for s in streams), streams[0].shape[:-1]
    *form, slot, k = form
    slot = None if slot is None else slot.reshape(-1)
    k = None if k is None else k.reshape(-1)
    outputs = op(*rows, *form, slot, k, *more)[:3]
    return tuple(None if t is None else t.reshape(*lead, t.shape[-1]) for t in outputs)


def _check_add(x, residual, form, return_projection):
    check_rows(x, "x")
    check_same_rows(x, residual)
    check_form(x, *form)
    check_projection(return_projection, form[2])


def _gate_of_add(x, residual, form, gate, rule, on_sum, norm=()):
    """(form, gate, rule) of an add: as they are for a kernel, else with the gate in the form's coefficient."""
    *parameters, slot, coefficient = form
    check_gate(x, gate, rule, *parameters[:3], slot)
    if not _traced(x) and not _needs_grad(x, residual, *norm, *form, gate, rule) and not transformed():
        return form, gate, rule
    seen = x
    if on_sum:
        dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
        seen = residual.to(dtype) + x.to(dtype)
    return (*parameters, slot, _behind(gate, rule, seen, slot, coefficient)), None, None


def _behind(gate, rule, hidden, slot, strength):
    """strength · g, one a row of hidden (…, width), in operations that autograd and a compiler see."""
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

