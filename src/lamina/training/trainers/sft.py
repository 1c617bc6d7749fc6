"""Supervised fine-tuning: conversations, or prompts and completions."""

from lamina.training.trainers.method import Method

METHOD = Method(
    "sft",
    ("SFTConfig", "SFTTrainer"),
    settings={
        "max_length": "max_length",
        "packing": "packing",
        "assistant_only_loss": "assistant_only_loss",
        "completion_only_loss": "completion_only_loss",
        "loss_type": "loss_type",
    },
)
