"""What an adapter's config would adapt in a model, from the model's config alone."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from lamina.checkpoint.shapes import FactorShapes
from lamina.checkpoint.structure import empty_model
from lamina.config import LoraConfig
from lamina.engine.inject import inject
from lamina.engine.layers import TrainableTokensLayer, lora_layers
from lamina.engine.state import AdapterState
from lamina.engine.targets import find_all_linear_names
from lamina.engine.trainability import count_parameters

_NAME = "dry"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class TargetKind:
    """Layers that would be adapted: those of all blocks that have one place and one shape.

    Attributes:
        name: their whole name, with * for the numbers in it.
        layer: their class, such as "Linear".
        shape: features in → out.
        count: how many there are.
        rank: of their factors.
        parameters: entries of all their factors.
    """

    name: str
    layer: str
    shape: str
    count: int
    rank: int
    parameters: int


@dataclass(frozen=True)
class DryRun:
    """The result: what would be adapted, and what could be.

    Attributes:
        model: its path or hub id.
        model_class: its class.
        base_parameters: entries of all its weights.
        counts: pattern -> layers that it hits.
        kinds: the layers that would be adapted.
        parameters: entries of the adapter.
        linear_names: the names for `target_modules` that mean every linear layer but the head.
        skipped: expert parameters that "all-linear" leaves out, which `target_parameters` takes in.
        head_names: the names that `linear_names` gains with the output head.
    """

    model: str
    model_class: str
    base_parameters: int
    counts: dict[str, int]
    kinds: tuple[TargetKind, ...]
    parameters: int
    linear_names: tuple[str, ...]
    head_names: tuple[str, ...]
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def dry_run(
    name_or_path: str,
    config: LoraConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> DryRun:
    """Find what `config` means in a model, whose weights are neither loaded nor downloaded.

    Args:
        name_or_path: a directory with a `config.json`, or a hub id.
        config: the adapter to be.
        revision: of the hub repository.
        trust_remote_code: run the model's own code, where it isn't one of transformers'.

    Raises:
        CheckpointError: there is no model by this name, or of no known kind.
        TargetError: a pattern matches nothing or something that can't be adapted.
    """
    model = empty_model(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    return dry_run_on(model, config, name=name_or_path)


def dry_run_on(model: nn.Module, config: LoraConfig, *, name: str) -> DryRun:
    """Find what `config` means in a model on the meta device, which is adapted.

    Args:
        model: from `empty_model`.
        config: the adapter to be.
        name: of the model, for the result.

    Raises:
        TargetError: a pattern matches nothing or something that can't be adapted.
    """
    names = find_all_linear_names(model)
    with_head = find_all_linear_names(model, include_head=True)
    base_parameters = count_parameters(model)[1]
    with warnings.catch_warnings():
        # What is left out is told in the result.
        warnings.filterwarnings("ignore", '"all-linear" leaves out')
        plan = inject(model, _NAME, config, AdapterState(), initialise=False)
    layers = [
        _layer(path, layer)
        for path, layer in lora_layers(model)
        # Rows that are replaced are no ranks.
        if not isinstance(layer, TrainableTokensLayer)
    ]
    return DryRun(
        model=name,
        model_class=type(model).__name__,
        base_parameters=base_parameters,
        counts=plan.counts,
        kinds=_kinds(layers),
        parameters=sum(shapes.parameters for shapes, _ in layers),
        linear_names=tuple(names),
        head_names=tuple(sorted(set(with_head) - set(names))),
        skipped=plan.skipped,
    )


def _layer(name: str, layer: Any) -> tuple[FactorShapes, str]:
    a, b = layer.factors(_NAME)
    if layer.kind == "experts":
        name = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
    shapes = FactorShapes(name, (name, name), tuple(a.shape), tuple(b.shape))
    return shapes, type(layer.get_base_layer()).__name__


def _kinds(layers: list[tuple[FactorShapes, str]]) -> tuple[TargetKind, ...]:
    alike: dict[tuple[str, str, str, int], list[FactorShapes]] = defaultdict(list)
    for shapes, layer in layers:
        alike[_NUMBER.sub("*", shapes.module), layer, shapes.shape, shapes.rank].append(shapes)
    return tuple(
        TargetKind(
            name=name,
            layer=layer,
            shape=shape,
            count=len(members),
            rank=rank,
            parameters=sum(each.parameters for each in members),
        )
        for (name, layer, shape, rank), members in alike.items()
    )
