"""Edits in a serving engine: the vLLM plugin, installed with fastedit and inactive until it is configured.

A request goes options → admission (front end) → runner, rows, residency (worker) → layers. docs/serving.md is the
manual. Imports `banks` and below. Read `plugin.py` first, then `admission.py`.
"""
