"""Edits in a serving engine: the vLLM plugin (plugin.py), installed with fastedit and asleep until it is configured.

A request goes options → admission (front end) → runner, rows, residency (worker) → layers. docs/serving.md is the manual.
"""
