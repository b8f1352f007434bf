"""Control at generation: the state that the LM head reads ascends a value net before each token is chosen.

    u ← u + a ∇V(h + u), n times;  h' = h + u              (RE-Control, arXiv 2406.05954)

or, towards target scores, with −½ Σ (V − target)² in place of V.

This is an edit on `final` like any other: the same handle patches, stacks, dials, saves and removes it. It has no
normal form, so it is a stage of its own (`Ascending`). It acts only on rows that a next token is predicted from.
"""

import itertools
import math
import weakref

import torch

from .. import ops
from ..arguments import check_steps, check_target
from ..edits.kinds import Edit
from ..ops.running import exporting
from ..ops.value_net import NAMES, ValueNet

_stages, _numbers = weakref.WeakValueDictionary(), itertools.count()  # what a compiled graph knows a stage by
_library = torch.library.Library("fastedit", "FRAGMENT")
_library.define(
    "control(Tensor hidden, int stage) -> Tensor",  # the dial is looked at when it runs: not in a CUDA graph
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe),
)


class Ascending:
    """A stage that moves the rows that a next token is predicted from, and passes on the others.

    In `generate` these are the columns from the prompt's last one on: one per forward, or several for the candidates of
    an assistant. In a forward by hand it is each sequence's last token, by the attention mask.
    """

    on_x, on_sum, positions, looks = False, False, None, None

    def __init__(self, masters, stack):
        self.masters, self.control, self.stack = [masters], masters, stack
        self.__setstate__({})

    def __getstate__(self):
        return {name: self.__dict__[name] for name in ("masters", "control", "stack")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.net, self.seen, self.number = None, (), next(_numbers)
        _stages[self.number] = self

    def apply(self, hidden):
        needs_grad = hidden.requires_grad and torch.is_grad_enabled()
        if (needs_grad or not _in_graph()) and self.is_off():
            return hidden
        plan = self.stack.known_plan("a Control")
        _check_call(hidden, plan)
        rows = _rows(plan, hidden)
        if rows is None:
            return hidden
        chosen = hidden[rows] if isinstance(rows, tuple) else hidden[:, -rows:]
        moved = torch.ops.fastedit.control.default(chosen, self.number) if _in_graph() else self.ascend(chosen)
        if isinstance(rows, tuple):
            return hidden.index_put(rows, moved)
        return moved if rows == hidden.shape[1] else torch.cat([hidden[:, :-rows], moved], 1)

    def is_off(self):
        return self.control.strength == 0 or self.control.options["steps"] == 0

    def ascend(self, hidden):
        options = self.control.options
        step_size = options["step_size"] * self.control.strength
        return ops.value_ascent(hidden, self._net(), options["steps"], step_size, options["target"])

    def _net(self):
        """A ValueNet on the masters' own memory, so that it sees what is copied into them. A new one if they were
        replaced.

        An exported program may run where there is no stage. It holds the present net and Gram matrix.
        """
        if exporting():
            if self.net is None:
                raise RuntimeError("a Control prepares its value net in the first forward: run one before torch.export")
            return self.net
        held = self.control._buffers
        now = [held.get(name) for name in NAMES]
        if self.net is None or any(a is not b for a, b in zip(now, self.seen, strict=True)):
            self.net, self.seen = ValueNet.from_tensors(*now), now
        return self.net


def _in_graph():
    """The stage under torch.compile. A graph calls it by its number and reads dial, net and Gram matrix in each
    call."""
    return torch.compiler.is_compiling() and not exporting()


def _control(hidden, stage):
    stage = _stages[stage]
    return hidden.clone(memory_format=torch.contiguous_format) if stage.is_off() else stage.ascend(hidden)


def _fake_control(hidden, stage):
    return hidden.new_empty(hidden.shape)


_library.impl("control", _control, "CompositeExplicitAutograd")
torch.library.register_fake("fastedit::control", _fake_control, lib=_library)


def _check_call(hidden, plan):
    if hidden.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a Control has no gradient, and this forward needs one: it acts at generation alone. Use model.generate or "
            "torch.no_grad(); to train, set handle.strength = 0 or handle.remove() first"
        )
    if hidden.dim() != 3:
        raise ValueError(f"a Control was given hidden states {tuple(hidden.shape)}, expected (sequences, tokens, width)")
    if plan.generation is not None and plan.generation.beams > 1:
        raise ValueError(
            f"a Control does not go with beam search (num_beams={plan.generation.beams}): beams are ranked by their "
            "probability under the model, which control leaves at every step; use sampling or greedy decoding"
        )


def _rows(plan, hidden):
    """How many columns at the end predict a next token, or their (sequence, column) indices. None for none."""
    tokens = hidden.shape[1]
    if plan.generation is not None:
        if torch.compiler.is_compiling() and isinstance(plan.offset, torch.Tensor):
            return 1  # a whole prompt or one token; candidates of an assistant are not run on a compiled static cache
        count = tokens + int(plan.offset) - (plan.generation.columns - 1)
        return min(count, tokens) if count > 0 else None
    plan.whole_rows("controls")
    if tokens == 1 or (plan.attention_mask is None and not plan.unread):
        return 1
    if plan.unread:
        raise ValueError(
            "a Control must tell each sequence's last token from padding, but attention_mask is not a (batch, tokens) "
            "tensor; give the model that one, or use model.generate"
        )
    real = plan.attention_mask[:, -tokens:].to(hidden.device) != 0
    last = torch.where(real, torch.arange(1, tokens + 1, device=hidden.device), 0).argmax(1)
    return torch.arange(len(hidden), device=hidden.device), last


class Control(Edit):
    """RE-Control at generation (arXiv 2406.05954): u ← u + a ∇V(h + u), n times, on the state the LM head reads.

    Only rows that a next token is predicted from move: the last position of each forward of `generate`, with sampling
    or greedily, padded on either side. KV caches hold nothing of it. `handle.strength` multiplies the step size: 0
    leaves every bit, a negative strength descends. Beam search and forwards that need a gradient are refused when they
    run.

    Args:
        value_net: a fastedit.ValueNet of the model's width (`fastedit.methods.recontrol.fit`). Its present values are
            copied onto the model, in fp32 whatever the model's dtype.
        step_size, steps: a and n. fastedit/methods/recontrol.py has the published ones.
        target: scores to steer to instead of upwards: a number for each output of the net, None for one that is left alone.
            A net of several outputs needs it, or `value_net.mixed(weights)`.
        strength: as in every edit.

    Raises:
        TypeError, ValueError: not a ValueNet, or not finite; a or n that is not a number.
    """

    default_site = "final"
    allowed_names = NAMES
    options = ("units", "step_size", "steps", "target")
    stage = Ascending

    def __init__(self, value_net, step_size=0.5, steps=30, *, target=None, strength=1.0):
        if not isinstance(value_net, ValueNet):
            raise TypeError(
                f"value_net is {type(value_net).__name__}, expected a fastedit.ValueNet; ValueNet.from_sequential takes an "
                "nn.Sequential of Linear and ReLU"
            )
        self.given = {
            name: tensor.detach().to("cpu", torch.float32, copy=True)
            for name in NAMES
            if (tensor := getattr(value_net, name)) is not None
        }
        for name, tensor in self.given.items():
            if not tensor.isfinite().all():
                raise ValueError(f"the value net's {name} holds values that are NaN or infinite")
        self.units = [len(bias) for _, bias in value_net.hidden_layers]
        self.step_size, self.steps, self.target = step_size, steps, self._aimed(value_net, target)
        super().__init__(self.given, strength=strength)
        self.check()

    def check(self):
        """Check one that was built, or rebuilt from a file."""
        if isinstance(self.step_size, bool):
            raise ValueError(f"step_size is {self.step_size!r}, expected a finite number")
        check_steps(self.steps, self.step_size)
        units = self.units
        if not isinstance(units, list) or not all(isinstance(n, int) and n > 0 for n in units) or len(units) not in (1, 2, 3):
            raise ValueError(f"Control: units is {units!r:.60}, expected one to three numbers from 1 on")
        target = self.target
        if target is not None and (not isinstance(target, list) or not target or not all(map(_is_finite, target))):
            raise ValueError(f"Control: target is {target!r:.60}, expected a list of finite numbers")
        names = [name for name in NAMES if name[-1] not in "23" or int(name[-1]) <= len(units)]
        if list(self.names) != names:
            raise ValueError(f"Control: tensors is {list(self.names)!r}, expected {names} for {len(units)} hidden layer(s)")
        if self.site != "final" or self.positions is not None or self.keep_norm or self.gate is not None or self.rank:
            raise ValueError("Control: it acts on 'final', where a next token is predicted, and takes no other place or gate")

    def _aimed(self, net, target):
        """The target as a list; outputs that are left alone are taken out of what was given."""
        if target is None:
            check_target(net, None)
            return None
        target = list(target) if isinstance(target, (list, tuple)) else [target]
        kept = [n for n, value in enumerate(target) if value is not None]
        check_target(net, [0.0 if value is None else value for value in target])
        if not kept:
            raise ValueError("target leaves every output alone: give a number for one of them")
        if len(kept) < len(target):
            rows = self.given["head"][kept]
            self.given["head"], self.given["offset"] = rows[0] if len(kept) == 1 else rows, self.given["offset"][kept]
        return [float(target[n]) for n in kept]

    def when(self, gate):
        raise TypeError("a Control has no coefficient for a gate to decide; use handle.strength")

    def tensors(self, spot, width):
        if self.neutral:
            return {name: self.neutral_tensor(name, width) for name in self.names}
        found = self.given["weight"].shape[1]
        if found != width:
            raise ValueError(f"Control: the value net reads states of width {found}, but this model's are {width} wide")
        return self.given

    def neutral_tensor(self, name, width):
        return torch.zeros(self.shape(name, width))

    def shape(self, name, width):
        sizes, outputs = [width, *self.units], len(self.target or [0.0])
        if name == "head":
            return (sizes[-1],) if outputs == 1 else (outputs, sizes[-1])
        if name == "offset":
            return (outputs,)
        place = int(name[-1]) if name[-1] in "23" else 1
        return (sizes[place], sizes[place - 1]) if name.startswith("weight") else (sizes[place],)


def _is_finite(value):
    return isinstance(value, float) and math.isfinite(value)
