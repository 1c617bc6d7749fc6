"""Some laminae of a chain by themselves, with what belongs to their stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from lamina.checkpoint.chain import makers_of
from lamina.checkpoint.origin import PREFIX, table_of
from lamina.checkpoint.record import Stage, StageRecord
from lamina.config import LoraConfig
from lamina.errors import StageError
from lamina.model import PeftModel
from lamina.stages.lamination import Chain, Part


@dataclass(frozen=True)
class Selection:
    """A part of a chain.

    Attributes:
        chain: the laminae that were chosen; its record tells of their stages only.
        whole: whether that is all of the chain it is from.
        left_out: the stages of the chain that are not in it.
        overwritten: what the chosen stages had trained, and later ones that were not chosen have
            trained anew, so that the file has no longer what it was; a line each.
    """

    chain: Chain
    whole: bool
    left_out: tuple[str, ...]
    overwritten: tuple[str, ...]

    @property
    def modules(self) -> set[str]:
        """Plain names of all modules that have ranks."""
        return {module for part in self.chain.parts for module in part.factors}


def select(chain: Chain, indices: Sequence[int], *, sums_apart: bool = False) -> Selection:
    """The laminae at these places, in the order of the file.

    Modules trained whole, biases and rows of tables come along if the record says that they are of
    a stage that is chosen. So does what is no stage's, such as an embedding that was written along.

    Args:
        chain: the whole chain.
        indices: which of its laminae.
        sums_apart: let the newest stage have what is a sum of several in the file.

    Raises:
        StageError: there are no ranks in it, or the biases of B, which are summed in the file,
            would have to be told apart.
    """
    parts = tuple(chain.parts[index] for index in sorted(indices))
    _refuse_what_has_no_ranks(chain, parts)
    whole = len(parts) == len(chain.parts)
    if whole:
        return Selection(chain, True, (), ())
    if not sums_apart:
        _refuse_summed_biases(chain, parts)
    makers = makers_of(chain.record)
    names = {name for index in indices for name in makers[index]}
    record = _record(chain.record, parts, names)
    gone = tuple(_overwritten(chain, parts, names))
    _refuse_torn_biases(chain, parts, record, names)
    if not gone and sorted(indices) == list(range(len(parts))):
        # The beginning of a chain is what it was when its last stage was saved.
        stages = record.stages
    else:
        stages = tuple(stage.model_copy(update={"probe": None}) for stage in record.stages)
    record = record.model_copy(update={"stages": stages})
    modules = {module for part in parts for module in part.factors}
    others = dict(_others(chain, parts, record, modules))
    rows = {
        table: tuple(row for row in there if row in _rows_in(record, table))
        for table, there in chain.rows.items()
        if _rows_in(record, table)
    }
    chosen = Chain(chain.source, record, parts, others, chain.embeddings & modules, rows)
    left_out = tuple(s.name for s in chain.record.stages if s.name not in names)
    return Selection(chosen, False, left_out, gone)


def _refuse_what_has_no_ranks(chain: Chain, parts: Sequence[Part]) -> None:
    if any(part.config.target_parameters for part in parts):
        raise StageError(
            f"In {chain.source} target_parameters lie otherwise than ranks of modules do.",
            cure="use it as it is: it is one plain adapter already",
        )
    if not any(part.factors for part in parts):
        names = ", ".join(repr(part.lamina.stage) for part in parts)
        raise StageError(
            f"In {chain.source} there are no ranks of {names}: no adapter can be made of them.",
            cure="use it as it is",
        )


def _record(record: StageRecord, parts: Sequence[Part], names: set[str]) -> StageRecord:
    stages = tuple(stage for stage in record.stages if stage.name in names)
    if not stages:
        raise StageError("No lamina is left of the chain.")
    below = record.stages[: record.stages.index(stages[-1])]
    left_out = tuple(stage.name for stage in below if stage.name not in names)
    return record.model_copy(
        update={
            "stages": (*stages[:-1], _with_sketch(stages[-1], record)),
            "laminae": tuple(part.lamina for part in parts),
            "saved_modules": {m: o for m, o in record.saved_modules.items() if o in names},
            "biases": {bias: owner for bias, owner in record.biases.items() if owner in names},
            "token_rows": _rows_of(record, names),
            "weights": None,
            "left_out": (*record.left_out, *left_out),
        }
    )


def _with_sketch(stage: Stage, record: StageRecord) -> Stage:
    """The stage, with the sketch of its base that a later one has for both."""
    later = record.stages[record.stages.index(stage) :]
    sketch = next((each.base.sketch for each in later if each.base.sketch), None)
    base = stage.base.model_copy(update={"sketch": sketch})
    return stage.model_copy(update={"base": base})


def _rows_of(record: StageRecord, names: set[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    chosen = {
        table: {stage: rows for stage, rows in stages.items() if stage in names}
        for table, stages in record.token_rows.items()
    }
    return {table: stages for table, stages in chosen.items() if stages}


# --- tensors that are no factors ------------------------------------------------------------------


def _others(
    chain: Chain, parts: Sequence[Part], record: StageRecord, modules: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    # It means the biases of all adapted layers to a reader.
    all_biases = record.biases and any(part.config.bias == "lora_only" for part in parts)
    for key, tensor in chain.others.items():
        table = table_of(key)
        if table is not None:
            rows = _rows(chain, record, table, tensor)
            if rows is not None:
                yield key, rows
            continue
        owner = owner_of(key, chain.record)
        module = key.removeprefix(PREFIX).removesuffix(".base_layer.bias")
        untrained = owner is None and key.endswith(".base_layer.bias")
        if untrained and not (all_biases and module in modules):
            continue
        if owner is None or owner_of(key, record) is not None:
            yield _respelt(key, modules), tensor


def owner_of(key: str, record: StageRecord) -> str | None:
    """The stage that a tensor of a module trained whole, or a bias, is of; None if no stage's."""
    plain = key.removeprefix(PREFIX)
    bias = record.biases.get(plain.replace(".base_layer.", "."))
    if bias is not None:
        return bias
    within = [module for module in record.saved_modules if plain.startswith(f"{module}.")]
    return record.saved_modules[max(within, key=len)] if within else None


def _respelt(key: str, modules: Collection[str]) -> str:
    # What belongs to the base lies in `base_layer` where there is an adapter, only there.
    outer, inside, leaf = key.removeprefix(PREFIX).rpartition(".base_layer.")
    return f"{PREFIX}{outer}.{leaf}" if inside and outer not in modules else key


def _rows(
    chain: Chain, record: StageRecord, table: str, tensor: torch.Tensor
) -> torch.Tensor | None:
    """The chosen rows of a table, in the order of the file."""
    wanted = _rows_in(record, table)
    places = [place for place, row in enumerate(chain.rows[table]) if row in wanted]
    return tensor[places] if places else None


def _rows_in(record: StageRecord, table: str) -> set[int]:
    return {row for rows in record.token_rows.get(table, {}).values() for row in rows}


# --- what can't be told apart any more ------------------------------------------------------------


def _refuse_summed_biases(chain: Chain, parts: Sequence[Part]) -> None:
    faults = []
    for module in sorted({module for part in parts for module in part.factors}):
        here = [p for p in chain.parts if module in p.factors and p.config.lora_bias]
        chosen = [part for part in here if any(part is each for each in parts)]
        if chosen and len(chosen) < len(here):
            faults.append(f"{module}: of {', '.join(p.lamina.stage for p in here)}")
    if faults:
        raise StageError(
            "The biases of B (lora_bias=True) of several stages are one sum in the file, which "
            "can't be told apart.",
            faults=faults[:8],
            cure="choose all of these stages or none",
        )


def _refuse_torn_biases(
    chain: Chain, parts: Sequence[Part], record: StageRecord, names: set[str]
) -> None:
    """A config names biases by their kind: of those that a stage trained, all are there or none."""
    gone = list(_biases_gone(chain, parts, names))
    if gone and record.biases:
        raise StageError(
            "A file can't hold a part of the biases that a stage has trained.",
            faults=[f"{many} of {mine} were trained anew by {owner}" for mine, owner, many in gone],
            cure="choose these stages too: lamina flatten DIR -o OUT",
        )


def _biases_gone(
    chain: Chain, parts: Sequence[Part], names: set[str]
) -> Iterator[tuple[str, str, int]]:
    """(stage, stage that trained its biases anew, how many)."""
    for part in parts:
        owners = Counter(
            owner
            for bias, owner in chain.record.biases.items()
            if _later(chain.record, part, owner, names) and _trains_bias(part, bias)
        )
        yield from ((part.lamina.stage, owner, many) for owner, many in owners.items())


def _overwritten(chain: Chain, parts: Sequence[Part], names: set[str]) -> Iterator[str]:
    record = chain.record
    for part in parts:
        mine = part.lamina.stage
        for module, owner in record.saved_modules.items():
            if _later(record, part, owner, names) and trains_whole(part.config, module):
                yield f"{module}, trained whole by {mine}, was trained anew by {owner}"
        for table, owners in record.token_rows.items():
            for owner, rows in owners.items():
                many = len({*rows} & _asked(part.config, table))
                if many and _later(record, part, owner, names):
                    yield f"{many} row(s) of {table} by {mine} were trained anew by {owner}"
    for mine, owner, many in _biases_gone(chain, parts, names):
        yield f"{many} bias(es) of {mine} were trained anew by {owner}"


def _later(record: StageRecord, part: Part, owner: str, names: set[str]) -> bool:
    """Whether a stage that isn't among `names` came after the one that trained a lamina last."""
    order = [stage.name for stage in record.stages]
    return owner not in names and order.index(owner) > order.index(part.lamina.stage)


def trains_whole(config: LoraConfig, module: str) -> bool:
    """Whether a stage with this config has trained a module whole."""
    heads = PeftModel.for_task(config.task_type).task_heads
    return any(module.endswith(ending) for ending in (*(config.modules_to_save or ()), *heads))


def _trains_bias(part: Part, bias: str) -> bool:
    module = bias.removesuffix(".bias")
    kind = part.config.bias
    return kind == "all" or (kind == "lora_only" and module in part.lamina.ranks)


def _asked(config: LoraConfig, table: str) -> set[int]:
    """The rows of a table that a config asks to train."""
    asked = config.trainable_token_indices or {}
    if not isinstance(asked, dict):
        return set(asked)
    return {row for name, rows in asked.items() if f".{table}".endswith(f".{name}") for row in rows}
