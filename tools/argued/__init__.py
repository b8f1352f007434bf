"""make arguments: calls with arguments of every kind, right ones and wrong ones; what must come of each is known beforehand.

A call is right to the rounding, or it raises TypeError, ValueError, IndexError or KeyError and says what is wrong. `ops` has
the functions of tensors, `models` those that take a model, which a refusal must leave as it was.

    python -m tools.argued --calls 100000 --model-calls 1000 --out bench/results/arguments.csv
"""
