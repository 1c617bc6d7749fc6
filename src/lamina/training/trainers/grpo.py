"""Group relative policy optimisation with reward functions."""

from __future__ import annotations

from typing import Any

from lamina.training.trainers.functions import find_function
from lamina.training.trainers.method import Job, Method


def _with_rewards(kind: type[Any], job: Job) -> Any:
    named = job.settings.reward_functions or ()
    rewards = list(job.rewards or map(find_function, named))
    arguments = job.arguments
    beta = arguments.beta
    # TRL would copy an adapter named "default", which is no reference of a chain, and takes no
    # reference as an argument; so it is made without, and given the reference with its weight.
    arguments.beta = 0.0
    trainer = kind(reward_funcs=rewards, **job.for_trainer())
    arguments.beta = beta
    if beta:
        trainer.beta = beta
        trainer.ref_model = job.reference
    return trainer


METHOD = Method(
    "grpo",
    ("GRPOConfig", "GRPOTrainer"),
    settings={
        "beta": "beta",
        "loss_type": "loss_type",
        "num_generations": "num_generations",
        "max_completion_length": "max_completion_length",
        "temperature": "temperature",
    },
    has_reference=True,
    make=_with_rewards,
)
