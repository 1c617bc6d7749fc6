"""Adapters for other programs: what each can take, a file per target.

`limits`, `contents` and `plain` know no torch, so that others can ask what a program takes.
"""
