"""Adapters on disk: found, read strictly, written whole or not at all."""
