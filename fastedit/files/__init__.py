"""Files, read as if an enemy had written them: checksums over every byte, regular files only, limits.

Imports nothing of fastedit above it. Read `sealed.py` first, then `edit_file.py`.
"""
