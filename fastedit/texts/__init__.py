"""Texts, chat messages and rows of data files, as batches of token ids; which of the tokens are measured.

Imports nothing else of fastedit. Read `chat.py` first.
"""
