"""Nobody is timed doing something else: a variant's result must be the plain hook's, to rounding.

The exact result is that of the hook in a wider dtype (float64 for fp32, fp32 for bf16). A variant may be SLACK times
as far from it as the hook in the model's own dtype is, and a unit in the last place of the largest value more. And the
edit must show: the unedited model has to be MARGIN times further off than that, or the comparison proves nothing.
"""

import copy

import torch

from .sizes import sharing
from .variants.plain import hook
from .works import PROMPT, WORKS, training_logits

SLACK = 4  # another order of the same roundings; a wrong edit is off by orders of magnitude more
MARGIN = 20

_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def wide_hook(base, values):
    return hook(copy.deepcopy(base).to(_WIDER[base.dtype]), values)  # its own weights: `to` changes tensors in place


class Logits:
    """What `work` must say on a base model under the plain hook's edit."""

    def __init__(self, base, values, work):
        self.work, self.base = WORKS[work], base
        self.exact = self._say(wide_hook(base, values)).double()
        self.limit = SLACK * self._error(self._say(hook(sharing(base), values)))
        self.limit += torch.finfo(base.dtype).eps * self.exact.abs().max().item()
        if self.work.training:  # the floor trains, the unedited model has nothing to
            return
        shown = self._error(self._say(sharing(base)))
        if shown < MARGIN * self.limit:
            raise ValueError(f"{work}: the edit shows by {shown:.2e}, less than {MARGIN} × the limit {self.limit:.2e}")

    def error(self, model, step):
        """How far from exact a variant is."""
        return self._error(training_logits(model, self.base) if self.work.training else step())

    def _say(self, model):
        return training_logits(model, self.base) if self.work.training else self.work.prepare(model, self.base)()

    def _error(self, said):
        if said.shape != self.exact.shape:
            raise ValueError(f"{self.work.name}: results of shape {tuple(said.shape)}, not {tuple(self.exact.shape)}")
        return (said.double() - self.exact).abs().max().item()


class Tokens:
    """For generation: by how much, exactly, a chosen token's logit falls short of the best one's.

    Greedy choices between near-equal logits may differ by rounding, and all that follows with them; so each token is
    judged behind the tokens that this variant chose before it.
    """

    def __init__(self, base, values, work):
        self.wide, own = wide_hook(base, values), hook(sharing(base), values)
        prepare = WORKS[work].prepare
        tokens = prepare(own, base)()
        self.shape = tokens.shape
        with torch.no_grad():
            exact, said = self.wide(input_ids=tokens).logits.double(), own(input_ids=tokens).logits.double()
        ulp = torch.finfo(base.dtype).eps * exact.abs().max().item()
        self.limit = 2 * (SLACK * (said - exact).abs().max().item() + ulp)  # two logits are compared
        unedited = sharing(base)
        if self.error(unedited, prepare(unedited, base)) <= self.limit:
            raise ValueError(f"{work}: the unedited model generates the same tokens")

    def error(self, model, step):
        tokens = step()
        if tokens.shape != self.shape:
            raise ValueError(f"generated {tuple(tokens.shape)} tokens, not {tuple(self.shape)}")
        with torch.no_grad():
            logits = self.wide(input_ids=tokens).logits.double()[:, PROMPT - 1 : -1]
        chosen = logits.gather(-1, tokens[:, PROMPT:, None]).squeeze(-1)
        return (logits.max(-1).values - chosen).max().item()


def reference(base, values, work):
    """What results of a work are compared with: `.error(model, step)` is to stay within `.limit`."""
    return (Tokens if work.startswith("generate") else Logits)(base, values, work)
