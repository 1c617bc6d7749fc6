"""Odds ratio preference optimisation: preferences without a reference."""

from lamina.training.trainers.method import Method

METHOD = Method(
    "orpo",
    ("ORPOConfig", "ORPOTrainer"),
    module="trl.experimental.orpo",
    settings={"max_length": "max_length", "beta": "beta"},
)
