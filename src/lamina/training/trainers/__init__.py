"""Methods of training, each on one of TRL's trainers."""

from lamina.training.trainers import dpo, grpo, kto, orpo, pt, reward, sft
from lamina.training.trainers.method import Job, Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (pt, sft, dpo, kto, orpo, reward, grpo)
}

__all__ = ["METHODS", "Job", "Method"]
