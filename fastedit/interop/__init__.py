"""Importers of other libraries' edits, one file per neighbor.

Imports `patching` and below. Read `adopt.py` first, then `found.py`.
"""
