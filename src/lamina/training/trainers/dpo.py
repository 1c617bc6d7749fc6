"""Direct preference optimisation, against an explicit reference."""

from __future__ import annotations

from typing import Any

from lamina.training.trainers.method import Job, Method


def with_reference(kind: type[Any], job: Job) -> Any:
    """A trainer that takes its reference as an argument."""
    return kind(**job.for_trainer(), ref_model=job.reference)


METHOD = Method(
    "dpo",
    ("DPOConfig", "DPOTrainer"),
    settings={"max_length": "max_length", "beta": "beta", "loss_type": "loss_type"},
    has_reference=True,
    make=with_reference,
)
