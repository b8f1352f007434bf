"""Nobody is timed doing something else: a variant's result must be the plain hook's, to rounding.

The exact result is that of the hook in a wider dtype (float64 for fp32, fp32 for bf16). A variant may be SLACK times
as far from it as the hook in the model's own dtype is, and a unit in the last place of the largest value more. And the
edit must show: the unedited model has to be MARGIN times further off than that, or the comparison proves nothing.
"""

import copy

import torch

from .sizes import sharing
from .variants.plain import hook
from .works import PROMPT, WORKS, answer, training_logits

SLACK = 4  # another order of the same roundings; a wrong edit is off by orders of magnitude more
MARGIN = 3

_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def wide_hook(base, values):
    return hook(copy.deepcopy(base).to(_WIDER[base.dtype]), values)  # its own weights: `to` changes tensors in place


class Reference:
    """What a work must say on a base model under the plain hook's edit.

    `limit` is how far from exact a variant's logits may be, `error(model, step)` how far they are.
    """

    def __init__(self, base, values, work):
        self.work, self.base = WORKS[work], base
        self.generates = work.startswith("generate")
        self.wide, own = wide_hook(base, values), hook(sharing(base), values)
        self.fixed = None if self.generates else self._say(self.wide)[0].double()
        self.limit = SLACK * self.error(own) + torch.finfo(base.dtype).eps * self.largest
        shown = self.error(sharing(base))
        if shown < MARGIN * self.limit:
            raise ValueError(f"{work}: the edit shows by {shown:.2e}, less than {MARGIN} × the limit {self.limit:.2e}")

    def error(self, model, step=None):
        """step: of a work that the model has prepared already, to spare doing it again."""
        logits, tokens = self._say(model, step)
        exact = self.fixed if tokens is None else self._behind(tokens)
        if logits.shape != exact.shape:
            raise ValueError(f"{self.work.name}: logits of shape {tuple(logits.shape)}, expected {tuple(exact.shape)}")
        self.largest = exact.abs().max().item()
        return (logits.double() - exact).abs().max().item()

    def _say(self, model, step=None):
        """(logits, the tokens that they are behind where the model chose them)"""
        if self.work.training:
            return training_logits(model, self.base), None
        if self.generates:
            said = answer(model, self.base)
            return torch.stack(said.logits, 1), said.sequences
        return (step or self.work.prepare(model, self.base))(), None

    def _behind(self, tokens):
        """Exact logits for each token that was chosen, behind those chosen before it: where two are equal but for
        rounding, the choice may fall either way, and the rest of the answer with it."""
        with torch.no_grad():
            return self.wide(input_ids=tokens).logits.double()[:, PROMPT - 1 : -1]
