"""A local page to try edits on a model: chat side by side, dials, coloured tokens, new directions, export.

`session.py` holds what a person does, without a page; `page.py` draws it with Gradio. Open `session.py` first.
May import: all wings but `cli`.
"""
