"""Edits of objects."""
