"""Edits onto a model: the handle, the plan of its layers, the sites at work, fused layers and their proof, merging, saving.

Imports `edits`, `ops`, `families`, `texts` and `files`. Read `handle.py` first, then `layer_plan.py`, `installation.py`,
`site.py` and `residual_add.py`, in the order in which a forward meets them.
"""
