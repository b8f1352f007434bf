"""Preference losses on log-probabilities of responses: one number per pair, (pairs,), fp32.

π is the policy, r the reference (the same model at strength 0), w the chosen and l the rejected response. Each
log-probability is the sum over the response's tokens, and |y| is their number:

    DPO    −log σ(β [(log π(w) − log r(w)) − (log π(l) − log r(l))])
    BiPO   the same with d β in place of β, π at strength d, d ∈ {−1, 1} at random per step
    ORPO   −log π(w)/|w| − λ log σ(log odds(w) − log odds(l)), odds of p = exp(log π/|y|): p / (1 − p)
    RePS   −log σ(Δ⁺) − log σ(Δ⁻)
           Δ⁺ = b⁺ log π⁺(w)/|w| − log π⁺(l)/|l|,   b⁺ = max(log r(l) − log r(w), 1),   π⁺ at strength 1
           Δ⁻ = b⁻ log π⁻(l)/|l| − log π⁻(w)/|w|,   b⁻ = max(log r(w) − log r(l), 1),   π⁻ at strength −1

DPO is arXiv 2305.18290, BiPO 2406.00045, ORPO 2403.07691, RePS 2505.20809. RePS of the paper nulls its direction for
the negative side. Here that side is strength −1, which every edit has.
"""

import torch
from torch.nn import functional as F

LOSSES = ("dpo", "bipo", "orpo", "reps")
WITH_REFERENCE = ("dpo", "bipo", "reps")


def dpo(policy, reference, *, beta=0.1, sign=1):
    """policy, reference: (chosen, rejected), each (pairs,) summed log-probabilities. sign: BiPO's d, 1 for DPO."""
    margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
    return -F.logsigmoid(sign * beta * margin)


def orpo(policy, lengths, *, weight=0.1):
    """policy: as for `dpo`. lengths: how many tokens the responses have, (chosen, rejected)."""
    chosen, rejected = (p / n for p, n in zip(policy, lengths, strict=True))
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - weight * F.logsigmoid(odds)


def reps(policy, reference, lengths, *, sign=1):
    """One side of RePS, −log σ(Δ) with the policy at strength `sign`. −1 swaps chosen and rejected."""
    near, far = (0, 1) if sign > 0 else (1, 0)
    weight = (reference[far] - reference[near]).clamp_min(1.0)
    return -F.logsigmoid(weight * policy[near] / lengths[near] - policy[far] / lengths[far])


def _log1mexp(x):
    """log(1 − eˣ) for x < 0, without loss near 0."""
    x = x.clamp_max(-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
