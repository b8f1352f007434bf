"""How sure an effect is."""

import math

# Student's, by the size of the sample
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def trend(hits, of):
    """Cochran–Armitage test of a trend in shares over equally spaced doses: (z, two-sided p). Positive z: rising.

    It takes the groups as independent. Groups that share prompts vary together, which makes the test a cautious one.
    """
    total, share = sum(of), sum(hits) / sum(of)
    mean = sum(k * n for k, n in enumerate(of)) / total
    spread = share * (1 - share) * sum(n * (k - mean) ** 2 for k, n in enumerate(of))
    if spread == 0:
        return 0.0, 1.0
    z = sum((k - mean) * hit for k, hit in enumerate(hits)) / math.sqrt(spread)
    return z, math.erfc(abs(z) / math.sqrt(2))


def mean_and_error(values):
    """(mean, its standard error) of a sample."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def pooled(means, errors):
    """(mean, standard error) over samples of one size, independent of each other."""
    return sum(means) / len(means), math.sqrt(sum(error**2 for error in errors)) / len(errors)


def over_seeds(values):
    """Half the width of the 95 % interval of the mean of what a few seeds gave; infinite for one seed."""
    return T95[len(values)] * mean_and_error(values)[1] if len(values) > 1 else math.inf


def auroc(high, low):
    """The share of pairs, one number of each, in which `high`'s is the larger; half for a tie."""
    return ((high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()).mean().item()
