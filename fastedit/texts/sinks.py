"""Attention sinks: a few tokens, usually the first, whose hidden states are a hundred times as long as the others'.

A mean over tokens that includes a sink shows little else. So a mean takes no token whose norm is above SINKS × the
median norm of its text's tokens. In SmolLM2-135M-Instruct norms are 23,600 there and 200 elsewhere.
"""

import math

import torch

from ..arguments import FP32_MAX

SINKS = 5.0


def check_sinks(sinks):
    number = isinstance(sinks, (int, float)) and not isinstance(sinks, bool)
    if sinks is not None and not (number and (1 < sinks <= FP32_MAX or sinks == math.inf)):
        raise ValueError(f"sinks is {sinks!r:.60}, expected None, or a number above 1: how many medians a norm may be")
    return sinks


def above_median(hidden, tokens, factor=SINKS):
    """(…, columns) bool: tokens of hidden (…, columns, width) with a norm above `factor` × their sequence's median.

    tokens (…, columns) bool: which are real. The median is the lower one, so some token is always left.
    """
    return longer_than_median(norms(hidden), tokens, factor)


def norms(hidden):
    """(…, columns), at least in fp32."""
    return torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))


def longer_than_median(norm, tokens, factor=SINKS):
    """The same for norms (…, columns)."""
    median = norm.masked_fill(~tokens, torch.nan).nanmedian(-1, keepdim=True).values
    return tokens & (norm > factor * median)
