"""The ranks that a vLLM server can be started for; imports nothing."""

from __future__ import annotations

# What `--max-lora-rank` may be, and what it is if it is not given.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16


def rank_flag(rank: int) -> int | None:
    """The smallest `--max-lora-rank` that takes this rank; None above the largest."""
    return next((limit for limit in VLLM_RANKS if rank <= limit), None)
