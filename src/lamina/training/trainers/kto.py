"""Kahneman-Tversky optimisation: answers that are wanted or not, against a reference."""

from lamina.training.trainers.dpo import with_reference
from lamina.training.trainers.method import Method

METHOD = Method(
    "kto",
    ("KTOConfig", "KTOTrainer"),
    settings={"max_length": "max_length", "beta": "beta", "loss_type": "loss_type"},
    has_reference=True,
    make=with_reference,
)
