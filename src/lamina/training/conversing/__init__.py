"""Talking to the stages of a chain, and laying their answers side by side."""
