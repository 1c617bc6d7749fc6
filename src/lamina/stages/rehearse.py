"""Begin all stages of a chain to be, on a base without weights: what would be refused, up front."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.fold import check_foldable
from lamina.engine.layers import saved_modules
from lamina.engine.names import adapted_layers
from lamina.errors import LaminaError, StageError
from lamina.model import PeftModel
from lamina.stages.one_file import check_biases_apart, check_one_file
from lamina.stages.rows import tables


@dataclass(frozen=True)
class StageToBe:
    """A stage as it will be begun.

    Attributes:
        name: of the stage.
        mode: "continue", "stack" or "merge"; None for the first.
        config: of its adapter; None under "continue".
        task: of the model that it trains, as configs have it.
        base: makes the model that it is begun on, anew and on the meta device.
    """

    name: str
    mode: str | None
    config: LoraConfig | None
    task: str
    base: Callable[[], nn.Module]


@dataclass(frozen=True)
class _Part:
    """What a stage has put into the model by its end."""

    name: str
    config: LoraConfig
    layers: frozenset[str] = frozenset()
    saved: frozenset[str] = frozenset()
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)


def rehearse(chain: Sequence[StageToBe]) -> Iterator[tuple[int, LaminaError]]:
    """(number of the stage, what `begin_stage` would raise), until a stage can't be begun.

    Names, patterns, what lies in one file, what can be folded, and heads are looked at; values are
    not, so initialisations that look at weights are not tried.
    """
    parts: list[_Part] = []
    for number, stage in enumerate(chain):
        try:
            parts = _begun(stage, parts)
        except LaminaError as error:
            yield number, error
            return


def _begun(stage: StageToBe, parts: Sequence[_Part]) -> list[_Part]:
    base = stage.base()
    older = list(parts[:-1] if stage.mode == "continue" else parts)
    config = parts[-1].config if stage.config is None else stage.config
    model = PeftModel.for_task(config.task_type)(base, None)
    if stage.mode == "continue":
        restored = replace(parts[-1], name=stage.name)
        _check_heads(model, stage, restored)
        _restore(model, restored, [])
        own: Any = config
    else:
        own = copy.deepcopy(model._own_config(base, config))
        own.inference_mode = False
    for part, newer in ((part, parts[place + 1 :]) for place, part in enumerate(older)):
        _restore(model, part, newer)
    if stage.mode != "continue":
        whole = replace(_as_kept(own), modules_to_save=own.modules_to_save, bias=own.bias)
        whole.trainable_token_indices = own.trainable_token_indices
        model.base_model.add(stage.name, whole, trainable=True, initialise=False)
    frozen = [part.name for part in older]
    model.set_adapter([*frozen, stage.name], train=[stage.name])
    check_one_file(model)
    if stage.mode == "merge":
        check_biases_apart(model, frozen)
        check_foldable(base, frozen, with_values=False)
    return [*older, _part(model, stage.name, own)]


def _as_kept(config: LoraConfig) -> LoraConfig:
    """A config of the same ranks that reads no weights and names nothing that a newer one took."""
    kept = copy.deepcopy(config)
    kept.init_lora_weights = True
    kept.modules_to_save = None
    kept.trainable_token_indices = None
    kept.bias = "none"
    return kept


def _restore(model: PeftModel, part: _Part, newer: Sequence[_Part]) -> None:
    """As `restore_part`: what newer stages have trained whole, or taken over, is theirs."""
    saved = set(part.saved).difference(*(each.saved for each in newer))
    kept = _as_kept(part.config)
    kept.modules_to_save = sorted(saved) or None
    kept.bias = part.config.bias
    taken = {(table, row) for each in newer for table, rows in each.rows.items() for row in rows}
    left = {t: [row for row in rows if (t, row) not in taken] for t, rows in part.rows.items()}
    kept.trainable_token_indices = {t: rows for t, rows in left.items() if rows} or None
    model.base_model.add(part.name, kept, trainable=False, initialise=False, strict=False)
    there = _part(model, part.name, kept)
    lost = sorted((part.layers - there.layers) | (saved - there.saved))
    if lost:
        raise StageError(
            f"{', '.join(lost)} of stage {part.name!r} is not in the model that this stage trains: "
            f"{type(model.get_base_model()).__name__}."
        )


def _check_heads(model: PeftModel, stage: StageToBe, part: _Part) -> None:
    """Refuse to go on with ranks under a head that they know nothing of, which nothing trains."""
    wanted = PeftModel.for_task(stage.task).task_heads
    ends = {path.rpartition(".")[2] for path in part.saved}
    if wanted and not ends & set(wanted):
        raise StageError(
            "continue trains the parent's ranks on, which have no head for this method: the "
            "model's would stay as random as it began. stack trains one"
        )


def _part(model: PeftModel, name: str, config: LoraConfig) -> _Part:
    base = model.get_base_model()
    return _Part(
        name,
        config,
        frozenset(path for path, layer in adapted_layers(base) if name in layer.records),
        frozenset(path for path, each in saved_modules(base) if name in each.modules_to_save),
        {
            table: tuple(layer.token_indices[name])
            for table, layer in tables(base).items()
            if name in layer.token_indices
        },
    )
