"""Lamina in the place of other libraries."""
