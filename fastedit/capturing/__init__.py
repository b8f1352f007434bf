"""From texts to sums and rows of hidden states.

Imports `patching`, `texts` and below. Read `capture.py` first.
"""
