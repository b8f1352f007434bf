"""What the tests of moments share: the promise, 1e-6 of a mean and of a variance found in float64 by two passes."""

import torch


def assert_exact(found, exact, limit=1e-6):
    """Counts equal; means within `limit` of the larger of mean and deviation, M2 within `limit` of itself."""
    count, mean, m2 = found
    exact_count, exact_mean, exact_m2 = exact
    assert torch.equal(count, exact_count) and count.dtype == torch.int64
    assert mean.dtype == m2.dtype == torch.float64 and mean.shape == m2.shape == exact_mean.shape
    deviation = (exact_m2 / exact_count.clamp_min(1)[:, None]).sqrt()
    error = (mean - exact_mean).abs() - limit * torch.maximum(exact_mean.abs(), deviation)
    assert (error <= 0).all(), f"mean: {float(error.max()):.3g} beyond {limit:g}"
    beyond = (m2 - exact_m2).abs() - limit * exact_m2
    assert (beyond <= 0).all(), f"m2: {float((beyond / exact_m2.clamp_min(1e-30)).max()):.3g} beyond {limit:g}"
