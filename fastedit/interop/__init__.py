"""Importers of neighbours' edits, one file a neighbour."""
