"""The arithmetic of low-rank updates, on tensors alone."""
