"""What is wrong with an adapter's file by itself: everything at once, and without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.digest import tensors_digest
from lamina.checkpoint.origin import A_LEAVES, B_LEAVES, PREFIX, plain_key, split_key
from lamina.checkpoint.record import StageRecord, read_record
from lamina.config import LoraConfig, PeftConfig
from lamina.errors import LaminaError, RecordError
from lamina.stages.configs import scaling_of

_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Contents:
    """An adapter's file, and what it says of itself.

    Attributes:
        file: as it was read.
        record: its record; None if it has none, or a damaged one.
        damage: why its record can't be read; None if it can.
        missing: names of tensors that the record, or the other factor, asks for.
        contradictions: where else record and tensors disagree.
        changed: whether its tensors are not those that were saved; None if that isn't recorded.
        not_finite: names of tensors with NaN or infinity.
        zero: whether no B has any value other than zero.
        scale: the scaling that the config gives, over that of the newest stage on record, where
            that is the same in all modules; None if there is nothing to compare.
    """

    file: AdapterFile
    record: StageRecord | None
    damage: str | None
    missing: tuple[str, ...]
    contradictions: tuple[str, ...]
    changed: bool | None
    not_finite: tuple[str, ...]
    zero: bool
    scale: float | None

    @property
    def whole(self) -> bool:
        """Whether it can be opened as what its record says."""
        return not (self.damage or self.missing or self.contradictions)


def contents_of(file: AdapterFile) -> Contents:
    """Look a file over that has been read."""
    record, damage = _record(file)
    tensors = {plain_key(key): tensor for key, tensor in file.tensors.items()}
    missing = tuple(_missing(file.config, record, tensors))
    saved = None if record is None else record.weights
    b = [tensor for key, tensor in tensors.items() if split_key(key)[1] in B_LEAVES]
    return Contents(
        file=file,
        record=record,
        damage=damage,
        missing=missing,
        contradictions=() if damage else tuple(_contradictions(file, missing)),
        changed=None if saved is None else tensors_digest(file.tensors) != saved,
        not_finite=tuple(key for key, each in tensors.items() if not bool(each.isfinite().all())),
        zero=bool(b) and not any(bool(each.any()) for each in b),
        scale=None if record is None else _scale(file.config, record),
    )


def _record(file: AdapterFile) -> tuple[StageRecord | None, str | None]:
    try:
        return read_record(file.metadata, source=file.source), None
    except RecordError as error:
        return None, "; ".join([error.what, *error.faults])


def _missing(
    config: LoraConfig, record: StageRecord | None, tensors: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    """Names of factors that aren't there."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        module, leaf = split_key(key)
        if leaf is not None:
            found.setdefault(module, {})[leaf] = key
    wanted = dict.fromkeys(found)
    for lamina in record.laminae if record else ():
        wanted.update(dict.fromkeys(lamina.ranks))
    for module in wanted:
        leaves = found.get(module, {})
        for mine, others in ((A_LEAVES, B_LEAVES), (B_LEAVES, A_LEAVES)):
            if any(leaf in leaves for leaf in mine):
                continue
            # Named as its other half is.
            other = next((i for i, leaf in enumerate(others) if leaf in leaves), 0)
            yield f"{PREFIX}{module}.{mine[other]}"
        if config.use_dora and leaves and _MAGNITUDE not in leaves:
            yield f"{PREFIX}{module}.{_MAGNITUDE}"


def _contradictions(file: AdapterFile, missing: tuple[str, ...]) -> Iterator[str]:
    modules = {split_key(key)[0] for key in missing}
    try:
        file.record()
    except RecordError as error:
        for fault in error.faults:
            if fault.partition(": rank ")[0] not in modules:
                yield fault


def _scale(config: LoraConfig, record: StageRecord) -> float | None:
    newest = record.laminae[-1] if record.laminae else None
    if newest is None:
        return None
    try:
        own = PeftConfig.from_dict(newest.config, source="the record")
        assert isinstance(own, LoraConfig)
        wanted = scaling_of(own, "")
        modules = {module for lamina in record.laminae for module in lamina.ranks}
        ratios = {round(scaling_of(config, module) / wanted, 6) for module in modules}
    except (LaminaError, AssertionError, ZeroDivisionError):
        return None
    return ratios.pop() if len(ratios) == 1 else None
