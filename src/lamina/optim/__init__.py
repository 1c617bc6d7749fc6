"""Optimizers made for LoRA: LoRA+, LoRA-FA and Riemannian preconditioning."""

from lamina.optim.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from lamina.optim.loraplus import create_loraplus_optimizer
from lamina.optim.riemannian import create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]
