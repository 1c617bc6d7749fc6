"""What an adapter's file holds, told from names and shapes alone; no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lamina.checkpoint.record import Base, Lamina, Stage, StageRecord, read_record
from lamina.config import LoraConfig
from lamina.errors import CheckpointError, RecordError

PREFIX = "base_model.model."
UNKNOWN = "imported"
# The names on disk of what an adapted layer has, A first.
# The last of each are AdaLoRA's.
A_LEAVES = ("lora_A.weight", "lora_embedding_A", "lora_A")
B_LEAVES = ("lora_B.weight", "lora_embedding_B", "lora_B")
LEAVES = (*A_LEAVES, *B_LEAVES, "lora_B.bias")
# Rows that replace a table's own (`trainable_token_indices`).
ROWS = "token_adapter.trainable_tokens_delta"
# What a variant of LoRA keeps beside A and B is named like them: `lora_magnitude_vector`.
_OF_VARIANT = re.compile(r"^(.+)\.(lora_[A-Za-z_]+(?:\.[a-z_]+)?)$")
WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."
)
_NAMED_FACTOR = re.compile(r"\.(lora_A|lora_B)\.([^.]+)\.(weight|bias)$")
_NAMED_EMBEDDING = re.compile(r"\.(lora_embedding_[AB])\.([^.]+)$")
# DoRA's magnitude, as it is named inside a model.
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.[^.]+)?\.weight$")


def plain_key(key: str) -> str:
    """A name from a file without what torch's wrappers and adapter names put into it."""
    key = WRAPPERS.sub("", key)
    key = _NAMED_FACTOR.sub(r".\1.\3", key)
    key = _MAGNITUDE.sub(".lora_magnitude_vector", key)
    return _NAMED_EMBEDDING.sub(r".\1", key)


def split_key(key: str) -> tuple[str, str | None]:
    """(plain module name, leaf) of a factor; (name without prefix, None) of anything else."""
    plain = key.removeprefix(PREFIX)
    for leaf in LEAVES:
        if plain.endswith(f".{leaf}"):
            return plain[: -len(leaf) - 1], leaf
    of_variant = _OF_VARIANT.match(plain)
    return (of_variant[1], of_variant[2]) if of_variant else (plain, None)


def ranks_in(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Plain module name -> rank, from the shapes of a file's tensors by their names.

    Modules that all ranks were taken away from are left out.

    Raises:
        CheckpointError: a factor has no dimension for its rank and one for features.
    """
    ranks, faults = {}, []
    for key, shape in shapes.items():
        module, leaf = split_key(key)
        if leaf in (*A_LEAVES, *B_LEAVES) and len(shape) < 2:
            faults.append(f"{key} has the shape {list(shape)}")
        elif leaf in A_LEAVES and shape[0]:
            ranks[module] = int(shape[0])
    if faults:
        raise CheckpointError(
            f"{len(faults)} tensor(s) are named like factors, and are none.",
            faults=faults[:8],
            cure="save or download the adapter again",
        )
    return ranks


def record_of(
    config: LoraConfig,
    shapes: Mapping[str, Sequence[int]],
    metadata: dict[str, str],
    *,
    source: str,
) -> StageRecord:
    """The chain in a file: its record, or for a plain adapter one stage of unknown origin.

    Raises:
        RecordError: the record and the tensors contradict each other.
    """
    record = read_record(metadata, source=source)
    shapes = {plain_key(key): shape for key, shape in shapes.items()}
    ranks = ranks_in(shapes)
    if record is None:
        return _unknown_origin(config, ranks, shapes)
    totals: dict[str, int] = {}
    for lamina in record.laminae:
        for module, rank in lamina.ranks.items():
            totals[module] = totals.get(module, 0) + rank
    faults = [
        f"{module}: rank {ranks.get(module, 0)} in the file, {totals.get(module, 0)} in the record"
        for module in sorted({*totals, *ranks})
        if totals.get(module) != ranks.get(module)
    ]
    faults += faults_of_others(record, shapes)
    faults += _faults_of_rows(record, shapes)
    if faults:
        raise RecordError(
            f"The stage record of {source} and its tensors contradict each other in "
            f"{len(faults)} place(s).",
            faults=faults[:8],
            cure="another tool has changed the tensors; open it with PeftModel.from_pretrained",
        )
    return record


def faults_of_others(record: StageRecord, shapes: Iterable[str]) -> list[str]:
    """What is wrong with modules trained whole and biases, by all names in a file."""
    unseen = {*record.saved_modules, *record.biases}
    faults = []
    for name, leaf in map(split_key, shapes):
        if leaf is not None or name.endswith(f".{ROWS}"):
            continue
        bias = name.replace(".base_layer.", ".")
        saved = [module for module in record.saved_modules if name.startswith(f"{module}.")]
        # With bias="lora_only" a file has the biases of all adapted layers, trained or not.
        untrained = name.endswith(".base_layer.bias")
        if bias not in record.biases and not saved and not untrained:
            faults.append(f"{name} is in the file, not in the record")
        unseen -= {bias, *saved}
    return faults + [f"{name} is in the record, not in the file" for name in sorted(unseen)]


def _faults_of_rows(record: StageRecord, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What is wrong with replaced rows of tables."""
    there = {table_of(key): int(shape[0]) for key, shape in shapes.items() if table_of(key)}
    told = {table: sum(map(len, stages.values())) for table, stages in record.token_rows.items()}
    return [
        f"{table}: {there.get(table, 0)} replaced rows in the file, {told.get(table, 0)} in the "
        "record"
        for table in sorted({*filter(None, there), *told})
        if there.get(table) != told.get(table)
    ]


def table_of(key: str) -> str | None:
    """The plain name of the table whose replaced rows a tensor has; None for other tensors."""
    name = key.removeprefix(PREFIX)
    return name.removesuffix(f".{ROWS}") if name.endswith(f".{ROWS}") else None


def rows_in(config: LoraConfig, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Plain name of a table -> the indices of the rows that a file has of it, in its order.

    Raises:
        RecordError: config and tensors contradict each other.
    """
    asked = config.trainable_token_indices or {}
    found = {}
    for key, shape in shapes.items():
        table = table_of(key)
        if table is None:
            continue
        if isinstance(asked, dict):
            fits = (rows for name, rows in asked.items() if f".{table}".endswith(f".{name}"))
            indices = tuple(next(fits, ()))
        else:
            indices = tuple(asked)
        if len(indices) != int(shape[0]):
            raise RecordError(
                f"{table} has {shape[0]} replaced rows in the file, {len(indices)} in the config.",
                cure="save or download the adapter again",
            )
        found[table] = indices
    return found


def _unknown_origin(
    config: LoraConfig, ranks: dict[str, int], shapes: Mapping[str, Sequence[int]]
) -> StageRecord:
    base = Base(name_or_path=config.base_model_name_or_path, revision=config.revision)
    wanted = tuple(config.modules_to_save or ())
    others = [name for name, leaf in map(split_key, shapes) if leaf is None and not table_of(name)]
    rows = rows_in(config, shapes)
    saved = {owner for owner in (_saved_owner(name, wanted) for name in others) if owner}
    biases = [
        name.replace(".base_layer.", ".")
        for name in others
        if name.endswith("bias") and not _saved_owner(name, wanted)
    ]
    return StageRecord(
        stages=(Stage(name=UNKNOWN, mode="fresh", base=base),),
        laminae=(Lamina(stage=UNKNOWN, config=config.to_dict(), ranks=ranks),),
        saved_modules=dict.fromkeys(sorted(saved), UNKNOWN),
        biases=dict.fromkeys(biases, UNKNOWN) if config.bias != "none" else {},
        token_rows={table: {UNKNOWN: indices} for table, indices in rows.items()},
    )


def _saved_owner(name: str, wanted: tuple[str, ...]) -> str | None:
    """The module trained whole that a tensor belongs to."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:end])
        # As peft means it: "norm" is also the end of "input_layernorm".
        if owner.endswith(wanted):
            return owner
    return None
