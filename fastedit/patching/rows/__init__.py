"""Which rows of a forward an edit acts on: positions and gates at work, prompts and caches, packed rows, tenants.

Read `row_plan.py` first.
"""
