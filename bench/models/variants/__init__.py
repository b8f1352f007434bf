"""One file a family of variants (registry.py says how to add one)."""
