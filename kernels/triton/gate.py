"""The gate: what a row's coefficient is multiplied by, from the row itself.

    k = coefficient · g,  g = 1 where s > threshold, else 0; or, with a sharpness, sigmoid(sharpness · (s − threshold))
    s = h · gate, over ‖h‖ for the cosine (0 for a row of zeros)

h is in registers, or walked tile by tile, for the edit itself (rows.py): the gate adds one vector of parameters, two
sums along the row and no stream. Its rule is read like any parameter, so thresholds change and differ between slots
without a new kernel. Hence both sums, whatever the rule.
"""

import triton
import triton.language as tl


@triton.jit
def gated_coefficient(k, along, squares, rule, base):
    """(BLOCK_ROWS, 1) k · g from h · gate and h · h, k None where it is 1. A k of 0 stays 0 whatever the row holds."""
    threshold = tl.load(rule + base * 3)
    sharpness = tl.load(rule + base * 3 + 1)
    cosine = tl.load(rule + base * 3 + 2)
    length = tl.where(squares > 0.0, tl.sqrt_rn(squares), 1.0)
    s = tl.div_rn(along, tl.where(cosine != 0.0, length, 1.0))
    soft = tl.sigmoid(sharpness * (s - threshold))
    g = tl.where(sharpness > 0.0, soft, tl.where(s > threshold, 1.0, 0.0))
    if k is None:
        return g
    else:
        return tl.where(k == 0.0, 0.0, k * g)
