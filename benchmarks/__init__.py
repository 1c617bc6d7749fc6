"""Lamina against the real peft: the same calls, in one run, alternating."""
