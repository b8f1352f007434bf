"""The slow reference: edits as plain hooks, on one whole sequence without padding, by their definition and in float32.

It shares with the library where a site is, and a form's tensors. It does not share how, when or on which rows they are
applied.
"""

import contextlib
from dataclasses import dataclass

import torch

from ..edits.form import Form, at_strength
from ..edits.positions import Positions
from ..families import Input, Part
from ..patching.layer_plan import site_width
from .inputs import takes


@dataclass
class _Part:
    """One edit at one place. form: at its strength, or None for a gate that only measures there."""

    layer: object
    site: str
    form: Form | None
    positions: Positions | None = None
    keep_norm: bool = False
    gating: object = None
    sensor: object = None


class Reference:
    """A handle's present edits. None: no edits.

    Raises:
        ValueError: edits that have no normal form, or act where a mask says.
    """

    def __init__(self, handle):
        self.parts, self._said = [], []
        if handle is None:
            return
        for sensor in handle._sensors():
            self.parts.append(_Part(sensor.layer, sensor.site, None, sensor=sensor))
        for edit, layer, masters in handle._each():
            if masters.stage is not None:
                raise ValueError(f"{type(edit).__name__} is no normal form, and the reference knows no other edits")
            if masters.positions is not None and masters.positions.mask:
                raise ValueError("positions='mask' is of one batch: the reference takes one sequence at a time")
            if not masters.is_probe:
                tensors = (None if t is None else t.detach().clone() for t in masters.form().tensors())
                form = at_strength(Form(*tensors), masters.strength)
                self.parts.append(_Part(layer, edit.site, form, masters.positions, masters.keep_norm, masters.gating))

    def dtype(self, model):
        """The dtype in which the logits are compared: the coarsest of the model's."""
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)

    @torch.no_grad()
    def logits(self, model, given, prompt):
        """(tokens, …) of one request; prompt: how many of its tokens are the prompt. Modes that generate mostly say the same
        sequences: each is run once."""
        key = [prompt, *(_bits(name, value) for name, value in given.items())]
        for known, said in self._said:
            if known == key:
                return said
        with self.hooked(given, prompt):
            said = output_of(model, given)[0]
        self._said.append((key, said))
        return said

    @contextlib.contextmanager
    def hooked(self, given, prompt):
        """The model with the edits on it, for one request."""
        run, places, hooks = _Run(given, prompt), {}, []
        for part in self.parts:
            places.setdefault((part.layer, part.site), []).append(part)
        try:
            for (layer, site), parts in places.items():
                hooks.append(_hook(layer, site, parts, run))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _bits(name, value):
    """What tells one argument from another."""
    if not isinstance(value, torch.Tensor):
        return name, value
    return name, value.shape, value.dtype, value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def output_of(model, given):
    """The logits of a forward without a cache, or the last hidden states of a model that has no head."""
    given = given | ({"use_cache": False} if takes(model, "use_cache") else {})
    return tensor_of(model(**given), model)


def tensor_of(said, model):
    """The logits, or the last hidden states, of what a model returned."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(said, name, None), torch.Tensor):
            return getattr(said, name)
    said = said[0] if not isinstance(said, torch.Tensor) else said
    if not isinstance(said, torch.Tensor):
        raise ValueError(f"{type(model).__name__} returned neither logits nor hidden states")
    return said


class _Run:
    """One request in the reference: which of its tokens an edit is for."""

    def __init__(self, given, prompt):
        self.given, self.prompt, self.measured = given, prompt, {}

    def tokens(self, layer):
        """(ids or None, prompt length or None for all) of the stack that a layer is in."""
        behind = "decoder_input_ids" in self.given
        if behind and not layer.name.startswith("encoder"):
            return self.given["decoder_input_ids"], self.prompt
        return self.given.get("input_ids"), None if behind else self.prompt

    def coefficient(self, part, hidden):
        """(tokens,) fp32 of hidden states (1, tokens, width); 1 for every row."""
        if part.positions is None and part.gating is None:
            return 1.0
        if hidden.dim() != 3:
            raise ValueError(f"hidden states have shape {tuple(hidden.shape)}, expected (1, tokens, width) for positions")
        ids, prompt = self.tokens(part.layer)
        count = hidden.shape[1]
        prompt = count if prompt is None else prompt
        found = torch.ones(count, device=hidden.device)
        if part.positions is not None:
            found = _chosen(part.positions, count, prompt, ids).to(hidden.device).float()
        if part.gating is not None:
            said = iter([self._said(sensor, hidden, prompt) for sensor in part.gating.sensors])
            found = found * part.gating.rule.combine(said)
        return found[:, None]

    def _said(self, sensor, hidden, prompt):
        return self.measured[sensor.key] if sensor.layer is not None else measure(sensor, hidden, prompt)


def _chosen(positions, count, prompt, ids):
    index = torch.arange(count)
    here = torch.zeros(count, dtype=torch.bool)
    if positions.prompt:
        here |= index < prompt
    if positions.generated:
        here |= index >= prompt
    if positions.first:
        here |= index < min(positions.first, prompt)
    if positions.last:
        here |= (index < prompt) & (index >= prompt - positions.last)
    for token in positions.tokens:
        here |= ids[0].cpu() == token
    return here


def measure(sensor, hidden, prompt):
    """A gate's g for (1, tokens, width): (tokens,), or one for all of them if it is decided on the prompt."""
    rows = hidden[0].float()
    if sensor.decide == "prompt":
        rows = rows[prompt - 1 : prompt]
    elif sensor.decide == "prompt mean":
        rows = rows[:prompt].mean(0, keepdim=True)
    along = rows @ sensor.condition
    if sensor.kind == "cosine":
        along = along / rows.norm(dim=-1).clamp(min=1e-30)
    elif sensor.kind == "cast":
        squashed = torch.tanh(along[:, None] * sensor.condition)
        along = torch.nn.functional.cosine_similarity(rows, squashed, dim=-1, eps=1e-30)
    if sensor.sharpness is None:
        return (along > sensor.threshold).float()
    return torch.sigmoid(sensor.sharpness * (along - sensor.threshold))


def _hook(layer, site, parts, run):
    place, module = layer.place(site), layer.at(site)
    columns = place.columns(layer.module, site_width(module, layer)) if isinstance(place, Part) else None

    def edited(hidden):
        if columns is None:
            return _apply(parts, hidden, run)
        groups, start, stop = columns
        grouped = hidden.unflatten(-1, (groups, -1)).clone()
        mine = _apply(parts, grouped[..., start:stop].flatten(-2), run)
        grouped[..., start:stop] = mine.unflatten(-1, (groups, -1))
        return grouped.flatten(-2)

    def before(module, args, kwargs):
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edited(kwargs["hidden_states"])}

    def after(module, args, output):
        return type(output)((edited(output[0]), *output[1:])) if isinstance(output, (tuple, list)) else edited(output)

    if isinstance(place, Input):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _apply(parts, hidden, run):
    for part in parts:
        if part.form is None:
            _, prompt = run.tokens(part.layer)
            run.measured[part.sensor.key] = measure(part.sensor, hidden, hidden.shape[1] if prompt is None else prompt)
            continue
        wide = hidden.float()
        new = wide + run.coefficient(part, hidden) * (part.form(wide) - wide)
        if part.keep_norm:
            new = new * (wide.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=1e-30))
        hidden = new.to(hidden.dtype)
    return hidden
