"""Adapters for other programs: what each can take, a file per target."""
