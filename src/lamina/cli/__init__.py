"""The command line: a file per verb; each turns its arguments into one call of the library."""

from lamina.cli.app import app, main

__all__ = ["app", "main"]
