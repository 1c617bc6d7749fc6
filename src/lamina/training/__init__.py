"""A plan of stages, read from a file and checked before anything starts."""
