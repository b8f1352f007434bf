"""RE-Control: a value net on hidden states, and control of each next token's state.

Kong et al., arXiv 2406.05954, NeurIPS 2024.

::

    trajectories = recontrol.collect(model, tokenizer, prompts, reward)         # any reward: texts → numbers
    net = fastedit.ValueNet(trajectories.width)
    recontrol.fit(net, trajectories)
    with fastedit.patch(model, recontrol.Control(net, step_size=0.5, steps=30)) as handle:
        model.generate(...)
    handle.save("my-control");  handle = fastedit.load(model, "my-control")     # as every edit

Step size a and number of steps n as tuned by the authors (arXiv 2406.05954)::

    model            a     n
    Vicuna-7B, HH    0.5    30
    Falcon-7B        0.2   200
    Vicuna, SHP      1.0    50
    Llama-3-8B       1.0    30
"""

import copy
import math
from dataclasses import dataclass

import torch

from ..ops.value_net import ValueNet
from ..patching.control import NAMES, Control
from .trajectories import Trajectories, collect

__all__ = ["Control", "Fit", "Trajectories", "collect", "fit", "td_loss", "td_targets", "value_net"]


@torch.no_grad()
def td_targets(values, lengths, rewards, lam=0.0):
    """The target of each state's value, (steps,), in the values' dtype. No gradient flows through it.

    At the last step of a trajectory it is the reward r. Before that it is V of the next step (TD(0), arXiv 2406.05954),
    or with lam = λ the λ-return  G_t = (1 − λ) V_{t+1} + λ G_{t+1},  which is r itself for λ = 1. There is no discount.

    Args:
        values: (steps,) V of every state, trajectories one after another. lengths: (n,) int64. rewards: (n,).
            Of a net of several outputs (steps, outputs) and (n, outputs), each output on its own.
    """
    ends = lengths.to(values.device).cumsum(0) - 1
    rewards = rewards.to(values.device, values.dtype)
    following = values.detach().roll(-1, 0)
    following[ends] = rewards
    if lam == 0:
        return following
    back = torch.arange(int(lengths.max()), device=values.device)  # steps before the last
    place = ends[:, None] - back
    valid = back < lengths.to(values.device)[:, None]
    table = following[place.clamp_min(0)]
    for column in range(1, table.shape[1]):
        table[:, column] = (1 - lam) * table[:, column] + lam * table[:, column - 1]
    return following.index_put((place[valid],), table[valid])


def td_loss(values, lengths, rewards, lam=0.0):
    """(Σ over pairs of valid steps (V_t − sg V_{t+1})² + Σ over trajectories (V_T − r)²) / steps, T the last valid
    step.

    Arguments as in `td_targets`.
    """
    return (values - td_targets(values, lengths, rewards, lam)).square().mean()


@dataclass
class Fit:
    """epochs: one dict each, {"epoch", "loss", "held_out", "error"}. best: the number of the one that was kept.

    loss, held_out: `td_loss`. error: the held-out mean of (V_t − r)² over all states, which does not depend on V's own
        targets.
    """

    epochs: list
    best: int

    @property
    def error(self):
        """The held-out error of the epoch that was kept. None if nothing was held out."""
        return self.epochs[self.best]["error"]


def fit(
    net, trajectories, *, lam=0.0, epochs=100, batch_size=512, lr=1e-4, held_out=0.1, patience=10, seed=0, progress=None,
):  # fmt: skip
    """Train a value net in place on trajectories, by Adam on `td_loss`. Returns the Fit.

    Every epoch sees each trajectory once, with one forward of V per batch. The weights kept are those of the epoch with
    the least held-out error (the start counts as epoch 0). Without held-out trajectories they are those of the last
    epoch. On the CPU the same seed gives the same bits.

    Args:
        net: a fastedit.ValueNet of the trajectories' width.
        lam: λ of TD(λ), from 0 (TD(0), the paper's) to 1.
        batch_size: trajectories per step.
        held_out: the share of trajectories that are only measured. patience: stop after so many epochs without a better
            one.
        progress: called as progress(epoch, epochs) after each epoch.

    Raises:
        TypeError, ValueError: another width, numbers out of range, or too few trajectories to hold some out. The net is
        as it was.
        RuntimeError: the loss is no longer finite (lower lr). The net has the best weights so far.
    """
    _check(net, trajectories, lam, epochs, batch_size, held_out)
    train, test = _split(len(trajectories), held_out, seed)
    data, generator = _Data(trajectories, net.weight.device), torch.Generator().manual_seed(seed)
    flags = [p.requires_grad for p in net.parameters()]
    net.requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    history = [{"epoch": 0, "loss": None} | data.measure(net, test, lam, batch_size)]
    best, kept = 0, copy.deepcopy(net.state_dict())
    try:
        for epoch in range(1, epochs + 1):
            loss = _epoch(net, optimizer, data, train[torch.randperm(len(train), generator=generator)], lam, batch_size)
            history.append({"epoch": epoch, "loss": loss} | data.measure(net, test, lam, batch_size))
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} in epoch {epoch}: lower lr (now {lr:g}), or scale the rewards")
            error = history[-1]["error"]
            if error is None or error < history[best]["error"]:
                best, kept = epoch, copy.deepcopy(net.state_dict())
            if progress is not None:
                progress(epoch, epochs)
            if epoch - best >= patience:
                break
    finally:
        net.load_state_dict(kept)
        for parameter, flag in zip(net.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return Fit(history, best)


def _epoch(net, optimizer, data, order, lam, batch_size):
    """One pass over the trajectories `order`. Returns the mean loss per state."""
    total, steps = 0.0, 0
    for chosen in order.split(batch_size):
        states, lengths, rewards = data.take(chosen)
        loss = td_loss(net(states), lengths, rewards, lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, steps = total + loss.item() * len(states), steps + len(states)
    return total / steps


class _Data:
    """Trajectories by number, moved to the net's device one batch at a time."""

    def __init__(self, trajectories, device):
        self.given, self.device = trajectories, device
        self.starts = trajectories.lengths.cumsum(0) - trajectories.lengths

    def take(self, chosen):
        """(states (steps, width) fp32, lengths, rewards) of the trajectories `chosen`."""
        lengths, rewards = self.given.lengths[chosen], self.given.rewards[chosen]
        first = self.starts[chosen] - (lengths.cumsum(0) - lengths)
        rows = torch.arange(int(lengths.sum())) + first.repeat_interleave(lengths)
        return self.given.states[rows].to(self.device, torch.float32), lengths, rewards.to(self.device)

    @torch.no_grad()
    def measure(self, net, chosen, lam, batch_size):
        """{"held_out", "error"} over the trajectories `chosen`. None if there are none."""
        if not len(chosen):
            return {"held_out": None, "error": None}
        loss = error = steps = 0
        for part in chosen.split(batch_size):
            states, lengths, rewards = self.take(part)
            values, count = net(states), len(states)
            loss += td_loss(values, lengths, rewards, lam).item() * count
            error += (values - rewards.repeat_interleave(lengths.to(self.device), 0)).square().mean().item() * count
            steps += count
        return {"held_out": loss / steps, "error": error / steps}


def _split(count, share, seed):
    """(numbers to train on, numbers held out)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(count * share)) if share else 0
    return order[held:].sort().values, order[:held].sort().values


def _check(net, trajectories, lam, epochs, batch_size, held_out):
    if not isinstance(net, ValueNet):
        raise TypeError(f"net is {type(net).__name__}, expected a fastedit.ValueNet")
    if net.width != trajectories.width:
        raise ValueError(f"the value net reads states of width {net.width}, and these are {trajectories.width} wide")
    outputs = trajectories.rewards.shape[1] if trajectories.rewards.dim() == 2 else 1
    if net.outputs != outputs:
        raise ValueError(f"the value net has {net.outputs} output(s), and the rewards are {outputs} number(s) a response")
    if not 0 <= lam <= 1 or not 0 <= held_out < 1:
        raise ValueError(f"lam is {lam!r} and held_out {held_out!r}, expected 0 ≤ lam ≤ 1 and 0 ≤ held_out < 1")
    if not isinstance(epochs, int) or not isinstance(batch_size, int) or epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs is {epochs!r} and batch_size {batch_size!r}, expected whole numbers from 1 on")
    if held_out and len(trajectories) < 2:
        raise ValueError("there is one trajectory, too few to hold some out: collect more, or held_out=0")


def value_net(handle):
    """A copy of the value net of a handle's Control, to train further or to score states.

    Raises:
        ValueError: the handle holds no Control.
    """
    for edit, _, masters in handle._each():
        if isinstance(edit, Control):
            held = masters.masters()
            copies = (held[name].clone() if name in held else None for name in NAMES)
            return ValueNet.from_tensors(*copies).requires_grad_(True)
    raise ValueError("the handle holds no Control, so there is no value net")
