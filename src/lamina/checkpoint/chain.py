"""The chain of stages that an adapter holds: who began which ranks, and who went on with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.checkpoint.origin import UNKNOWN
from lamina.checkpoint.record import Base, Lamina, Mode, Stage, StageRecord
from lamina.checkpoint.shapes import FactorShapes, scalings
from lamina.config.readable import readable


@dataclass(frozen=True)
class RankGroup:
    """The ranks that one stage began, as they lie in the file.

    Attributes:
        begun_by: the stage that added them; None if the record doesn't say. Where flattening has
            put stages together, the last of these.
        continued_by: the stages that trained them on, in order.
        trained_last_by: the stage whose values the file holds.
        ranks: plain module name -> its rank.
        r: the rank in that stage's config.
        lora_alpha: likewise.
        target_modules: likewise.
        scaling: the different scalings that its config gives its modules.
        made_of: the stages that flattening has put together in them, oldest first.
        error: what flattening left out of them, relative to the whole; None if nothing.
    """

    begun_by: str | None
    continued_by: tuple[str, ...]
    trained_last_by: str
    ranks: dict[str, int]
    r: int | None
    lora_alpha: float | None
    target_modules: Any
    scaling: tuple[float, ...]
    made_of: tuple[str, ...] = ()
    error: float | None = None

    @property
    def rank_range(self) -> tuple[int, int]:
        """The smallest and the largest rank; (0, 0) without modules."""
        return (min(self.ranks.values(), default=0), max(self.ranks.values(), default=0))


@dataclass(frozen=True)
class StageSummary:
    """One stage, and what it did.

    Attributes:
        name: of the stage.
        mode: "fresh", "continue", "stack" or "merge"; None if its origin is unknown.
        trained: index of the group of ranks that it trained; None if that can't be told, or if
            flattening has put them together with those of a later stage.
        saved_modules: modules trained whole whose copy in the file is this stage's.
        biases: likewise, biases of the base.
        created, metrics, data, base, versions: as the record has them.
    """

    name: str
    mode: Mode | None
    trained: int | None
    saved_modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    created: str | None = None
    metrics: Mapping[str, float] | None = None
    data: Any = None
    base: Base | None = None
    versions: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Chain:
    """All stages, oldest first, and all groups of ranks in the order of the file.

    `left_out` names stages that these were trained on, and whose part is not in the file.
    """

    stages: tuple[StageSummary, ...]
    groups: tuple[RankGroup, ...]
    left_out: tuple[str, ...] = ()


def chain_of(record: StageRecord) -> Chain:
    """Replay a record: `continue` trains the newest group on, every other mode begins one."""
    trained = _trained_groups(record)
    groups = tuple(
        _group(lamina, [s.name for s, i in zip(record.stages, trained, strict=True) if i == index])
        for index, lamina in enumerate(record.laminae)
    )
    stages = tuple(
        _stage(stage, index, record) for stage, index in zip(record.stages, trained, strict=True)
    )
    return Chain(stages, groups, record.left_out)


def unknown_chain(config: Mapping[str, Any], factors: Sequence[FactorShapes]) -> Chain:
    """The chain of an adapter without a record: one stage of unknown origin."""
    whole = Lamina(stage=UNKNOWN, config=dict(config), ranks={f.module: f.rank for f in factors})
    saved = tuple(sorted(readable(config).get("modules_to_save") or ()))
    stage = StageSummary(UNKNOWN, None, 0, saved_modules=saved)
    return Chain((stage,), (_group(whole, []),))


def makers_of(record: StageRecord) -> list[tuple[str, ...]]:
    """For each lamina the stages that made its ranks what they are, oldest first.

    Of a stage without ranks of its own it can't be told: it goes with those that came after it.
    """
    index = {lamina.stage: i for i, lamina in enumerate(record.laminae)}
    index |= {name: i for i, lamina in enumerate(record.laminae) for name in lamina.made_of}
    for stage, i in zip(record.stages, _trained_groups(record), strict=True):
        if i is not None:
            index[stage.name] = i
    found: list[list[str]] = [[] for _ in record.laminae]
    waiting: list[str] = []
    for stage in record.stages:
        waiting.append(stage.name)
        if stage.name in index:
            found[index[stage.name]] += waiting
            waiting = []
    if found:
        found[-1] += waiting
    return [tuple(names) for names in found]


def _trained_groups(record: StageRecord) -> list[int | None]:
    """For each stage the index of the group that it trained."""
    trained: list[int | None] = []
    flattened = {s: i for i, lamina in enumerate(record.laminae) for s in lamina.made_of}
    newest = -1
    for stage in record.stages:
        if stage.name in flattened:
            newest = flattened[stage.name]
            is_last = stage.name == record.laminae[newest].made_of[-1]
            trained.append(newest if is_last else None)
            continue
        newest += stage.mode != "continue" or newest < 0
        trained.append(newest)
    last = {index: stage.name for stage, index in zip(record.stages, trained, strict=True)}
    told = [last.get(index) for index in range(len(record.laminae))]
    if told == [lamina.stage for lamina in record.laminae] and newest < len(record.laminae):
        return trained
    # Stages without ranks of their own: what is certain is who trained a group last.
    trained_by = {lamina.stage: index for index, lamina in enumerate(record.laminae)}
    return [trained_by.get(stage.name) for stage in record.stages]


def _group(lamina: Lamina, trainers: list[str]) -> RankGroup:
    config = readable(lamina.config)
    targets = config.get("target_modules")
    return RankGroup(
        begun_by=trainers[0] if trainers else None,
        continued_by=tuple(trainers[1:]),
        trained_last_by=lamina.stage,
        ranks=dict(lamina.ranks),
        r=config.get("r"),
        lora_alpha=config.get("lora_alpha"),
        target_modules=targets if isinstance(targets, str) else sorted(targets or []),
        scaling=scalings(lamina.config, lamina.ranks),
        made_of=lamina.made_of,
        error=lamina.error,
    )


def _stage(stage: Stage, trained: int | None, record: StageRecord) -> StageSummary:
    return StageSummary(
        name=stage.name,
        mode=stage.mode,
        trained=trained,
        saved_modules=_owned(record.saved_modules, stage.name),
        biases=_owned(record.biases, stage.name),
        created=stage.created,
        metrics=stage.metrics,
        data=stage.data,
        base=stage.base,
        versions=stage.versions,
    )


def _owned(owners: Mapping[str, str], stage: str) -> tuple[str, ...]:
    return tuple(sorted(name for name, owner in owners.items() if owner == stage))
