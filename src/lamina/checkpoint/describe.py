"""What an adapter directory holds, told from its files alone; no torch."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.checkpoint.chain import Chain, RankGroup, chain_of, unknown_chain
from lamina.checkpoint.header import read_headers
from lamina.checkpoint.methods import Beside, beside_factors, method_of
from lamina.checkpoint.origin import split_key
from lamina.checkpoint.record import Base, StageRecord, read_record
from lamina.checkpoint.scan import Question, Span, Suspect, scan
from lamina.checkpoint.shapes import (
    FactorShapes,
    find_factors,
    group_by_kind,
    natural_order,
    scalings,
)
from lamina.config import PeftConfig
from lamina.config.readable import readable
from lamina.errors import ConfigError
from lamina.storage.source import PathOrId, find_adapter

Header = Mapping[str, Mapping[str, Any]]
Range = tuple[int, int]


@dataclass(frozen=True)
class ModuleKind:
    """All adapted modules of one name, such as every `q_proj`.

    Attributes:
        name: the last component of their names.
        count: how many there are.
        rank: the smallest and the largest rank in the file.
        ranks: the same for each group of ranks in `Chain.groups`; (0, 0) where it has none.
        shapes: the different shapes of the layers, in → out.
        parameters: entries of their factors.
    """

    name: str
    count: int
    rank: Range
    ranks: tuple[Range, ...]
    shapes: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter as its files show it.

    Attributes:
        source: the directory, or the hub id.
        files: name -> bytes.
        parameters: entries of all tensors.
        dtypes: dtype on disk -> entries of that dtype, most first.
        config: the values in `adapter_config.json`.
        base: the base model, as far as it is known.
        method: what it is beside plain LoRA, such as "DoRA"; else "LoRA".
        beside: the tensors of that method that are no factors, by kind.
        has_record: whether there is a stage record; a plain adapter has none.
        chain: its stages and groups of ranks.
        modules: its adapted modules by kind.
        scaling: the different scalings in it; one where all modules have the same.
        suspects: factors that are zero and tensors that are not finite; None if not looked for.
        faults: what doesn't fit together, a line each.
    """

    source: str
    files: dict[str, int]
    parameters: int
    dtypes: dict[str, int]
    config: dict[str, Any]
    base: Base
    method: str
    beside: tuple[Beside, ...]
    has_record: bool
    chain: Chain
    modules: tuple[ModuleKind, ...]
    scaling: tuple[float, ...]
    suspects: tuple[Suspect, ...] | None
    faults: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def describe_adapter(
    path_or_id: PathOrId, *, look_for_zeros: bool = True, **where: Any
) -> AdapterDescription:
    """Describe an adapter: its stages, ranks, sizes, base, and what looks untrained or broken.

    Args:
        path_or_id: a directory or a hub id.
        look_for_zeros: read the tensors; without it only headers are read.
        where: `subfolder`, `revision`, `token` and more; see `lamina.storage.source.find_adapter`.

    Raises:
        CheckpointError: a file is missing or broken.
        RecordError: the stage record can't be understood.
    """
    files = find_adapter(path_or_id, **where)
    config = PeftConfig.from_json_file(files.config)
    headers, metadata = read_headers(files)
    header = {key: entry for each in headers.values() for key, entry in each.items()}
    factors, faults = find_factors(header)
    record = read_record(metadata, source=files.root)
    chain = unknown_chain(config, factors) if record is None else chain_of(record)
    faults += [*_config_faults(config), *_rank_faults(factors, chain.groups)]
    suspects = _suspects(headers, factors, chain.groups) if look_for_zeros else None
    return AdapterDescription(
        source=files.root,
        files={file.name: file.stat().st_size for file in (files.config, *files.weights)},
        parameters=sum(math.prod(entry["shape"]) for entry in header.values()),
        dtypes=_dtypes(header),
        config=config,
        base=_base(config, record),
        method=method_of(config),
        beside=beside_factors(header, {key for each in factors for key in each.keys}),
        has_record=record is not None,
        chain=chain,
        modules=tuple(
            _kind(name, members, chain.groups) for name, members in group_by_kind(factors).items()
        ),
        scaling=scalings(config, {each.module: each.rank for each in factors}),
        suspects=suspects,
        faults=tuple(faults),
    )


def _dtypes(header: Header) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in header.values():
        counts[entry["dtype"]] += math.prod(entry["shape"])
    return dict(counts.most_common())


def _base(config: Mapping[str, Any], record: StageRecord | None) -> Base:
    told = readable(config)
    model_class = (told.get("auto_mapping") or {}).get("base_model_class")
    known = Base(
        name_or_path=told.get("base_model_name_or_path"),
        revision=told.get("revision"),
        model_class=model_class if isinstance(model_class, str) else None,
    )
    if record is None:
        return known
    recorded = record.newest.base
    return known.model_copy(update={k: v for k, v in recorded if v is not None})


def _kind(name: str, members: Sequence[FactorShapes], groups: Sequence[RankGroup]) -> ModuleKind:
    ranks = [each.rank for each in members]
    return ModuleKind(
        name=name,
        count=len(members),
        rank=(min(ranks), max(ranks)),
        ranks=tuple(_range([g.ranks.get(each.module, 0) for each in members]) for g in groups),
        shapes=tuple(dict.fromkeys(each.shape for each in members)),
        parameters=sum(each.parameters for each in members),
    )


def _range(values: Sequence[int]) -> Range:
    return min(values), max(values)


def _config_faults(config: dict[str, Any]) -> list[str]:
    try:
        PeftConfig.from_dict(config)
    except ConfigError as error:
        return [f"the config can't be honoured: {fault}" for fault in error.faults or [error.what]]
    return []


def _rank_faults(factors: Sequence[FactorShapes], groups: Sequence[RankGroup]) -> list[str]:
    faults = []
    in_file = {each.module: each.rank for each in factors}
    in_record: Counter[str] = Counter()
    for group in groups:
        in_record.update(group.ranks)
    for module in sorted(in_file.keys() | in_record.keys()):
        told, found = in_record[module], in_file.get(module, 0)
        if told != found:
            faults.append(f"{module} has rank {found} in the file and {told} in the record")
    return faults


def _suspects(
    headers: Mapping[Path, Header], factors: Sequence[FactorShapes], groups: Sequence[RankGroup]
) -> tuple[Suspect, ...]:
    of_factors = {
        question.key: question for each in factors for question in _questions(each, groups)
    }
    found: list[Suspect] = []
    for file, header in headers.items():
        questions = [of_factors.get(key, Question(key, _owner(key))) for key in header]
        found += scan(file, header, questions)
    return tuple(sorted(found, key=lambda each: natural_order(each.module)))


def _questions(factors: FactorShapes, groups: Sequence[RankGroup]) -> list[Question]:
    spans: list[Span] = []
    begin = 0
    for group in groups:
        end = begin + group.ranks.get(factors.module, 0)
        if end > begin:
            spans.append(Span(group.trained_last_by, begin, end))
        begin = end
    # A grouped convolution's B, or a file that its record contradicts, is only looked at whole.
    if begin != factors.rank or factors.shape_B[1] != factors.rank or len(groups) < 2:
        spans = []
    key_A, key_B = factors.keys
    return [
        Question(key_A, factors.module, "A", 0, spans),
        Question(key_B, factors.module, "B", 1, spans),
    ]


def _owner(key: str) -> str:
    module, leaf = split_key(key)
    return module if leaf else module.rpartition(".")[0]


def _plain(value: Any) -> Any:
    if isinstance(value, Base):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    # JSON has no NaN and no infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value
