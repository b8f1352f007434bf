"""Gates at work: sensors measure hidden states, and a Gating makes an edit's coefficient of the results.

One plain gate by token at the edit's own site has no Gating: the edit's kernel takes the gate itself (`kernel_gate`).

A sensor at the edit's own site measures what the edit is given. A sensor at another layer is a stage of that layer's
site, before the edits there (patching/site.py). It leaves its result in the forward's RowPlan for the edits after it.
"""

import torch

from ... import ops
from ...edits.gates import outside_kernels
from ...kernels import reference
from ...ops.fp32_module import InFp32
from ...texts.sinks import above_median, longer_than_median, norms
from .prompt_decisions import decide


class Sensor(InFp32):
    """One gate at one place: its condition (width,) and threshold (1,), fp32 masters.

    key: names the result. layer, site: the place, if not the edit's own site. All layers then share the sensor.
    """

    is_sensor, is_probe, trainable, needs_plan, positions, rank, gating = True, False, False, True, None, 0, None
    fused = True  # or not, as its edit's

    def __init__(self, gate, key, spot, width, device, layer=None, site=None):
        super().__init__()
        self.kind, self.decide, self.sharpness = gate.kind, gate.decide, gate.sharpness
        self.key, self.layer, self.site = key, layer, site
        # The last decision on a prompt (prompt_decisions.py), and the call of `generate` that it belongs to.
        self.kept = self.keeper = None
        self.left_out = None  # of the last prompt mean: (sequences,), how many attention sinks it is without
        for name, tensor in gate.values(spot, width).items():
            self.register_buffer(name, tensor.to(device, torch.float32, copy=True))
        self._rule = self._ruled = None

    def masters(self):
        return dict(self._buffers)

    def __getstate__(self):
        return self.__dict__ | {"_rule": None, "_ruled": None, "keeper": None}  # a copy's threshold need not be its rule's

    def gate(self):
        """(condition (width,), rule (3,)) as the kernels take them, at addresses that stay.

        The threshold becomes a view of the rule, so that a value loaded into one is also in the other, for a captured
        graph too. It is made again if another tensor has taken its place (`.to`, `to_empty`).
        """
        held = self._buffers
        if held["threshold"] is not self._ruled:
            with torch.inference_mode(False), torch.no_grad():
                more = held["threshold"].new_tensor([self.sharpness or 0.0, float(self.kind == "cosine")])
                self._rule = torch.cat([held["threshold"], more])
                self._ruled = held["threshold"] = self._rule[:1]
        return held["condition"], self._rule

    def measure(self, hidden, plan):
        """g for hidden states (…, width): (…,), or (sequences, 1) if it is decided on the prompt.

        For packed rows it is then (batch, tokens).
        """
        if self.decide == "token":
            return self.say(hidden)
        plan.fit(hidden.shape, "a gate on the prompt")
        if plan.packing is not None:
            plan.by_hand("a gate that decides once on the prompt")
            return self._of_packed(hidden, plan)
        return decide(plan, self, lambda: self._of_prompt(hidden, plan))[:, None]

    def say(self, rows):
        """g of rows (…, width), (…,). A hard gate has no gradient."""
        if self.sharpness is None:
            with torch.no_grad():
                return (self.score(rows) > self.threshold).float()
        return torch.sigmoid(self.sharpness * (self.score(rows) - self.threshold))

    def score(self, rows):
        """s of rows (…, width), (…,)."""
        with torch.autocast(rows.device.type, enabled=False):
            z = _project(rows, self.condition)
            if self.kind == "dot":
                return z
            if self.kind == "cosine":
                return z / _length(rows)
            squashed = torch.tanh(z[..., None] * self.condition)
            return (rows.to(z.dtype) * squashed).sum(-1) / _length(rows) / _length(squashed)

    def _of_prompt(self, hidden, plan):
        """(sequences,): g of the prompt's last token in this forward, or of the mean of its tokens."""
        batch, tokens = plan.shape or hidden.shape[:2]
        rows = hidden.reshape(batch, tokens, hidden.shape[-1])
        here = plan.of_prompt(batch, tokens, hidden.device)
        if self.decide == "prompt":
            last = (here * torch.arange(1, tokens + 1, device=here.device)).argmax(1)
            return self.say(rows[torch.arange(batch, device=here.device), last])
        wide, prompt = rows.to(torch.promote_types(rows.dtype, torch.float32)), here.bool()
        here = prompt & ~above_median(wide, prompt)
        if not torch.compiler.is_compiling():
            self.left_out = (prompt & ~here).sum(1)
        share = here.to(wide.dtype) / here.sum(1, keepdim=True).clamp(min=1)
        with torch.autocast(rows.device.type, enabled=False):
            return self.say(torch.einsum("bt,btw->bw", share, wide))

    def _of_packed(self, hidden, plan):
        """(batch, tokens): g of each token's own sequence."""
        batch, tokens = plan.shape
        rows, packing = hidden.reshape(batch, tokens, hidden.shape[-1]), plan.packing
        here = plan.of_prompt(batch, tokens, hidden.device)
        if self.decide == "prompt":
            return self.say(rows).gather(1, packing.last(here))
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a gate decides on the mean of each packed sequence, whose number a compiled forward does not know: run it "
                "uncompiled, leave position_ids out where rows are not packed, or decide='prompt', on the last token"
            )
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        slot = packing.number.clamp(min=0).flatten().to(hidden.device)
        kept, long = here.flatten().bool(), norms(wide).flatten()
        sinks = [longer_than_median(long, kept & (slot == number)) for number in range(packing.sequences())]
        self.left_out = torch.stack([found.sum() for found in sinks])
        weight = (kept & ~torch.stack(sinks).any(0)).to(wide.dtype)
        count = weight.new_zeros(packing.sequences()).index_add(0, slot, weight)
        share = (weight / count.clamp(min=1)[slot])[:, None]
        means = wide.new_zeros(len(count), wide.shape[-1]).index_add(0, slot, share * wide.flatten(0, 1))
        return self.say(means)[slot].view(batch, tokens)


def _project(rows, condition):
    """rows · condition, in one pass over the rows. Plain PyTorch for a compiler to see."""
    if torch.compiler.is_compiling():
        return reference.project(rows.reshape(-1, rows.shape[-1]), condition[None], None).view(rows.shape[:-1])
    return ops.project(rows, condition[None])[..., 0]


def _length(rows):
    """‖row‖ in fp32 (fp64 for fp64 rows). 1 for a row of zeros, which is orthogonal to everything."""
    length = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return torch.where(length > 0, length, torch.ones_like(length))


class Gating:
    """One edit's rule at one site. sensors: one per leaf of the rule, in its order."""

    def __init__(self, rule, key, sensors):
        self.rule, self.key, self.sensors = rule, key, sensors
        self.shared = [s for s in sensors if s.layer is not None]
        self.soft = any(s.sharpness is not None for s in sensors)
        self.looks = len(self.shared) < len(sensors)  # at what the edit is given
        self.needs_plan = bool(self.shared) or any(s.decide != "token" for s in sensors)

    def coefficient(self, hidden, stack):
        """(…,) for hidden states (…, width)."""
        plan = stack.known_plan("an edit with a gate") if self.needs_plan else None
        if self.looks or self.soft:  # a checkpoint that computes this again needs the gradient again
            return self._combine(hidden, plan)
        if self.key not in plan.measured:
            plan.measured[self.key] = self._combine(hidden, plan)
        made = plan.measured[self.key]
        plan.fit(hidden.shape, "an edit with a gate")
        if made.numel() != hidden.shape[:-1].numel():
            raise ValueError(
                f"a gate was measured on {made.numel()} tokens, the edit's hidden states have shape {tuple(hidden.shape)}"
            )
        return made.to(hidden.device, non_blocking=True).view(hidden.shape[:-1])

    def _combine(self, hidden, plan):
        said = [self._said(sensor, hidden, plan) for sensor in self.sensors]
        sequences = next((g.shape[0] for g, s in zip(said, self.sensors, strict=True) if s.decide != "token"), None)
        if sequences is None:
            return self.rule.combine(iter(said)).contiguous()
        said = [g if s.decide != "token" else g.reshape(sequences, -1) for g, s in zip(said, self.sensors, strict=True)]
        coefficient = self.rule.combine(iter(said))
        rows = hidden.shape[:-1].numel()
        return coefficient.expand(sequences, rows // sequences).contiguous().view(hidden.shape[:-1])

    def _said(self, sensor, hidden, plan):
        if sensor.layer is None:
            return sensor.measure(hidden, plan)
        said, had_gradients = plan.measured.get(sensor.key, (None, None))
        if said is None:
            raise RuntimeError(
                f"a gate at site {sensor.site!r} of layer {sensor.layer.name} measured nothing in this forward: the "
                "layer was passed over, or the stack was not called through its owner"
            )
        if sensor.sharpness is not None and torch.is_grad_enabled() and not had_gradients:
            raise RuntimeError(
                "the gradient of a soft gate at another layer does not cross a reentrant checkpoint; use "
                "gradient_checkpointing_enable({'use_reentrant': False}), or a hard gate"
            )
        return said.to(hidden.device, non_blocking=True)


def kernel_gate(masters):
    """The Sensor that the kernel of an edit's masters takes in place of a coefficient, or None.

    It is the edit's only gate, at the edit's own site, by dot or cosine, by token.
    """
    gating = masters.gating
    return None if gating is None or outside_kernels(gating.rule) is not None else gating.sensors[0]


class Tap:
    """A stage that lets a sensor measure what arrives at a site."""

    on_x, on_sum, positions, looks = True, False, None, None

    def __init__(self, sensor, stack):
        self.sensor, self.stack, self.masters = sensor, stack, [sensor]

    def apply(self, hidden):
        plan = self.stack.known_plan("a gate")
        plan.measured[self.sensor.key] = self.sensor.measure(hidden, plan), torch.is_grad_enabled()
        return hidden

    def arguments(self, hidden):
        self.apply(hidden)
