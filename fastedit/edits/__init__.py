"""What to do to hidden states and where, declaratively: the normal form, kinds of edits, gates, probes, positions, sites.

Imports nothing of fastedit but `arguments`: no op, no model. Read `kinds.py` first, then `form.py`.
"""
