"""A reward model: one number for an answer, larger for the preferred one."""

from lamina.training.trainers.method import Method

METHOD = Method(
    "reward",
    ("RewardConfig", "RewardTrainer"),
    head="reward",
    settings={"max_length": "max_length"},
)
