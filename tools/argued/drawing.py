"""Two ways to draw the arguments of a call: by hypothesis, which makes a finding small, and at random, eight times as fast.

What a call draws from is written as for hypothesis.strategies: draw(sampled_from(…)).
"""

import functools

from hypothesis import strategies as st


def sampled_from(options):
    return st.sampled_from, options


def booleans():
    return st.sampled_from, (False, True)


def integers(low, high):
    return st.integers, (low, high)


def sets(some):
    return st.sets, some[1]


def composite(function):
    """function(draw, *arguments), as a strategy of its arguments; `.at_random(random, *arguments)` draws with a Random."""

    def strategy(*arguments):
        return st.composite(lambda draw: function(lambda what: draw(_strategy(*what)), *arguments))()

    strategy.at_random = lambda random, *arguments: function(functools.partial(_at_random, random), *arguments)
    return functools.wraps(function)(strategy)


def _strategy(kind, options):
    if kind is st.integers:
        return st.integers(*options)
    return kind(st.sampled_from(options)) if kind is st.sets else kind(options)


def _at_random(random, what):
    kind, options = what
    if kind is st.integers:
        return random.randint(*options)
    if kind is st.sets:
        return {option for option in options if random.random() < 0.5}
    return random.choice(options)
