"""Directories: found, and replaced atomically; knows no adapter's content."""
