"""LoRA+: B learns faster than A."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

from lamina.engine.layers import LoraLayer
from lamina.optim.checks import check_class, check_number, check_trainable, refuse
from lamina.optim.factors import factor

_EIGHT_BIT = {"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"}


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer in which B learns `loraplus_lr_ratio` times as fast as A.

    Four groups, in this order, any of them possibly empty: A and other matrices (`lr`); adapted
    embeddings (`loraplus_lr_embedding`); B and vectors (`lr * loraplus_lr_ratio`); those of the
    latter that are a bias or lie in a LayerNorm (same rate, never decayed).

    Args:
        model: the adapted model.
        optimizer_cls: the class to make, e.g. `torch.optim.AdamW`.
        lr: the learning rate of A.
        loraplus_lr_ratio: the rate of B divided by that of A; the paper recommends about 16.
        kwargs: `loraplus_weight_decay` (default 0) and `loraplus_lr_embedding` (default 1e-6);
            everything else goes to `optimizer_cls`.

    Raises:
        OptimizerError: with all that is wrong with the arguments; nothing has changed.

    Source: Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models",
    arXiv:2402.12354.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    refuse(
        "create_loraplus_optimizer",
        [
            *check_class(optimizer_cls),
            *check_number("lr", lr),
            *check_number("loraplus_lr_ratio", loraplus_lr_ratio, included=False),
            *check_number("loraplus_weight_decay", decay),
            *check_number("loraplus_lr_embedding", embedding_lr),
            *check_trainable(model),
        ],
    )
    if kwargs.get("weight_decay"):
        warnings.warn(
            f"weight_decay={kwargs['weight_decay']} has no effect: every group has its own. Pass "
            "loraplus_weight_decay.",
            stacklevel=2,
        )
    fast = lr * loraplus_lr_ratio
    rates = {
        "A": (lr, decay),
        "embedding": (embedding_lr, decay),
        "B": (fast, decay),
        "B_no_decay": (fast, 0.0),
    }
    kinds = _kinds(model)
    groups: list[dict[str, Any]] = [
        {
            "params": [p for kind, p in kinds if kind == wanted],
            "weight_decay": weight_decay,
            "lr": rate,
        }
        for wanted, (rate, weight_decay) in rates.items()
    ]
    # The keyword comes before the groups' own: an optimizer may want a default.
    optimizer: Any = optimizer_cls
    made: Optimizer = optimizer(groups, lr=lr, **kwargs)
    if any(base.__name__ in _EIGHT_BIT for base in optimizer_cls.__mro__):
        _keep_embeddings_in_32_bits(model)
    return made


def _kinds(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Each trained parameter with the name of the group that it belongs to."""
    modules = dict(model.named_modules())
    normalised = set(_in_layer_norms(model))
    kinds = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        known = factor(name)
        if _in_adapted_embedding(name, modules):
            kind = "embedding"
        elif (known is not None and known.side == "B") or parameter.ndim == 1:
            leaf = name.rpartition(".")[2]
            kind = "B_no_decay" if "bias" in leaf or name in normalised else "B"
        else:
            kind = "A"
        kinds.append((kind, parameter))
    return kinds


def _in_adapted_embedding(name: str, modules: dict[str, nn.Module]) -> bool:
    # Of <layer>.<place>.<adapter>, or of <layer>.base_layer.weight, the layer.
    parts = name.split(".")
    layer = modules.get(".".join(parts[:-2])) if len(parts) > 2 else None
    return isinstance(layer, LoraLayer) and layer.is_embedding


def _in_layer_norms(model: nn.Module) -> Iterator[str]:
    """The names of all parameters that lie in a LayerNorm."""
    kinds: tuple[type[nn.Module], ...] = tuple(ALL_LAYERNORM_LAYERS)
    for path, module in model.named_modules():
        if isinstance(module, kinds):
            for name, _ in module.named_parameters(prefix=path):
                yield name


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    import bitsandbytes

    overrides = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            overrides.register_module_override(module, "weight", {"optim_bits": 32})
