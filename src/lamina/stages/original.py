"""Laminae whose initialisation took a part out of the base: to the file, and back into a model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lamina.checkpoint.record import Lamina
from lamina.engine.compose import Factors
from lamina.engine.layers import lora_layers
from lamina.engine.layers.displacing import Displaced
from lamina.engine.names import adapted_layers
from lamina.errors import StageError
from lamina.model import PeftModel
from lamina.model.original import converted_config, displaced_by, scaling_of, with_taken
from lamina.stages.lamination import Part


def on_original_base(model: PeftModel, adapter: str, part: Part) -> Part:
    """The lamina as it has to lie over the base as it was: `[B, -B0] [A; A0]`, noted in its entry.

    Laminae that left the base alone come back as they are.
    """
    base = model.get_base_model()
    taken = displaced_by(base, adapter)
    if not taken:
        return part
    scaling = scaling_of(part.config)
    factors = {m: with_taken(own, taken.get(m), scaling) for m, own in part.factors.items()}
    ranks = {module: whole.rank for module, whole in factors.items()}
    config = converted_config(base, adapter, part.config, ranks)
    lamina = Lamina(
        stage=part.lamina.stage,
        config=config.to_dict(),
        ranks=ranks,
        began=part.lamina.began or str(part.config.init_lora_weights),
        taken={module: each.A.shape[0] for module, each in taken.items()},
    )
    return replace(part, lamina=lamina, config=config, factors=factors)


def split_off_taken(base: nn.Module, part: Part) -> tuple[Part, dict[str, Displaced]]:
    """Undo `on_original_base`: the ranks that train, and what was taken out of the base."""
    if not part.lamina.taken:
        return part, {}
    own, taken = dict(part.factors), {}
    for module, count in part.lamina.taken.items():
        whole = part.factors[module]
        r = whole.rank - count
        A, B = whole.A, whole.B
        own[module] = Factors(A[:r].clone(), B[:, :r].clone(), whole.scaling, whole.bias)
        taken[module] = Displaced(A[r:].clone(), -B[:, r:], whole.scaling, None, None)
    ranks = {module: each.rank for module, each in own.items()}
    config = converted_config(base, part.lamina.stage, part.config, ranks)
    config = replace(config, modules_to_save=part.config.modules_to_save, bias=part.config.bias)
    return replace(part, config=config, factors=own), taken


@torch.no_grad()
def take_again(base: nn.Module, adapter: str, taken: dict[str, Displaced]) -> None:
    """Take out of the base what the adapter's initialisation had taken out of it."""
    for module, layer in adapted_layers(base):
        if module in taken:
            layer.take(adapter, taken[module])


def check_saveable(model: PeftModel) -> None:
    """Refuse now what could not be saved as a stage after training.

    Raises:
        StageError: an initialisation has changed the base by more than an update.
    """
    faults = [
        f"{path}: {name} has put other values into the base's weight"
        for path, layer in lora_layers(model)
        for name, each in layer.displaced.items()
        if not each.is_low_rank
    ]
    if faults:
        raise StageError(
            "A stage that begins by LoftQ can't be saved for the base as it was: its quantisation "
            "has changed all of each weight.",
            faults=faults[:6],
            cure="load the base in 4 bits, begin with init_lora_weights=True, and call "
            "replace_lora_weights_loftq(model)",
        )
