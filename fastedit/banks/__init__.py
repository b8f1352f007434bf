"""Many edits resident on one model, mixed in one batch.

Imports `patching` and below. Read `bank.py` first, then `assignment.py`.
"""
