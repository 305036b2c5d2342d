"""Searches whose product is an architecture."""
