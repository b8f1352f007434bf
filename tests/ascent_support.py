"""What the tests of value_ascent share: the autograd loop that it replaces, cases without ties, and the promise.

A unit whose z comes within rounding of 0 is a tie: on or off for a step, as the last bit falls, in the loop as in any
other order of the same sums. Cases here have none, by the float64 loop's own z: the smallest |z| over all steps is far
above fp32's rounding of it.
"""

import dataclasses

import oracle
import torch

import fastedit

TIE = 1e-4  # of the largest |z|; fp32 sums of this size err by some 1e-6


def autograd_loop(hidden, net, steps, step_size):
    """h + u after u ← u + a ∇V(h + u), `steps` times, by autograd; and the smallest |z| on the way over the largest."""
    u, margin = torch.zeros_like(hidden), 1.0
    for _ in range(steps):
        moved = (hidden + u).requires_grad_()
        (gradient,) = torch.autograd.grad(net(moved).sum(), moved)
        margin = min(margin, _margin(net, moved.detach()))
        u = u + step_size * gradient
    return hidden + u, margin


@torch.no_grad()
def _margin(net, hidden):
    z = hidden @ net.weight.T.to(hidden.dtype) + net.bias.to(hidden.dtype)
    all_z = [z]
    if net.weight2 is not None:
        all_z.append(torch.relu(z) @ net.weight2.T.to(hidden.dtype) + net.bias2.to(hidden.dtype))
    return min(float(z.abs().min() / z.abs().max()) if z.numel() else 1.0 for z in all_z)


@dataclasses.dataclass
class Case:
    hidden: torch.Tensor
    net: fastedit.ValueNet
    steps: int
    step_size: float
    exact: torch.Tensor  # the loop in float64

    def arguments(self, dtype=torch.float32):
        """As a backend takes them."""
        return self.hidden, *self.net.tensors(), self.net.gram(dtype), self.steps, self.step_size

    def eager(self):
        """The loop in fp32, rounded once."""
        return autograd_loop(self.hidden.float(), self.net, self.steps, self.step_size)[0].to(self.hidden.dtype)

    def z_and_slope(self):
        """(z, slope, what else a kernel of the steps takes)."""
        weight, bias, _, _, head = self.net.tensors()
        z = self.hidden.float() @ weight.T + bias
        return z, ((z > 0) * head) @ self.net.gram(), (head, self.net.gram(), self.steps, self.step_size)


def make_net(width, units, gain=1.0, seed=0):
    """A frozen net whose gradient is `gain` times a fresh nn.Linear's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = fastedit.ValueNet(width, units).requires_grad_(False)
    net.head.mul_(gain)
    return net


def make(rows, width, units, steps, dtype=torch.float32, step_size=0.5, gain=4.0):
    """A case without ties: rows that have one are drawn anew."""
    net, generator, kept = make_net(width, units, gain), torch.Generator().manual_seed(1), []
    while len(kept) < rows:
        row = torch.randn(1, width, generator=generator).to(dtype)
        exact, margin = autograd_loop(row.double(), net, steps, step_size)
        if margin > TIE:
            kept.append((row, exact))
    hidden, exact = (torch.cat(column) if column else row.new_empty(0, width) for column, row in ((c, row) for c in zip(*kept)))
    return Case(hidden, net, steps, step_size, exact)


def assert_promise(case, found):
    assert found.dtype == case.hidden.dtype
    oracle.assert_promise("h'", found, case.exact, case.eager())
