"""Ratios that survive a noisy machine: variants interleaved in one process, medians, and an interval.

A variant is a function of no arguments. `interleave` runs them in turn, each call timed on its own, in
several blocks; a ratio's interval is over the blocks' medians.
"""

import math
import statistics
import time

import torch

# Two-sided 95 % Student t for n − 1 degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 14: 2.14, 19: 2.09}


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_once(function, repeat=1):
    synchronise()
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    synchronise()
    return (time.perf_counter() - start) / repeat


def repeats_for(function, seconds=2e-4):
    """Calls to put in one timing so that it lasts about `seconds`: clock reads cost some tens of ns."""
    once = time_once(function)
    if once > 10 * seconds:  # more calls would not change the answer, and may take minutes
        return 1
    once = min(once, *(time_once(function) for _ in range(2)))
    return max(1, round(seconds / max(once, 1e-7)))


def interleave(variants, blocks=7, rounds=15, warmup=3):
    """{name: [median seconds of each block]} for {name: function}, the variants taking turns in every round."""
    repeat = {}
    for name, function in variants.items():
        for _ in range(warmup):
            function()
        repeat[name] = repeats_for(function)
    medians = {name: [] for name in variants}
    for _ in range(blocks):
        times = {name: [] for name in variants}
        for round_ in range(rounds):
            names = list(variants) if round_ % 2 == 0 else list(variants)[::-1]
            for name in names:
                times[name].append(time_once(variants[name], repeat[name]))
        for name, values in times.items():
            medians[name].append(statistics.median(values))
    return medians


def ratio(medians, name, base):
    """(median ratio name/base, half-width of its 95 % interval over the blocks)."""
    ratios = [a / b for a, b in zip(medians[name], medians[base], strict=True)]
    if len(ratios) < 2:
        return ratios[0], math.inf
    n = len(ratios) - 1
    t = T95.get(n) or T95[max(k for k in T95 if k <= n)]
    return statistics.median(ratios), t * statistics.stdev(ratios) / math.sqrt(len(ratios))


def quantiles(values):
    """(p20, p50, p80)."""
    ordered = sorted(values)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return at(0.2), statistics.median(ordered), at(0.8)
