"""From captured sums and rows to directions, and from directions to doses.

Imports `capturing`, `patching` and below. Read `directions.py` first, then `contrast.py`.
"""
