"""A local page to try edits on a model: chat side by side, dials, colored tokens, new directions, export.

`session.py` holds what a person does, without a page. `page.py` draws it with Gradio. Read `session.py` first.
May import: all folders but `cli`.
"""
