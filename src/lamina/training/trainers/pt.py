"""Plain text: every token is learned."""

from lamina.training.trainers.method import Method

METHOD = Method(
    "pt",
    ("SFTConfig", "SFTTrainer"),
    settings={"max_length": "max_length", "packing": "packing"},
    fixed={"completion_only_loss": False},
)
