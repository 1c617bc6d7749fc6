"""What an adapter consists of, sorted by what other programs can take; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamina.checkpoint.header import read_header
from lamina.checkpoint.origin import LEAVES, PREFIX, plain_key, split_key
from lamina.checkpoint.shapes import FactorShapes, find_factors, scaling_in
from lamina.config import PeftConfig
from lamina.config.patterns import first_match
from lamina.errors import CheckpointError
from lamina.storage.source import PathOrId, find_adapter

Header = Mapping[str, Mapping[str, Any]]

_ROWS = ".trainable_tokens_delta"
# An adapted table's own values, which PEFT saves beside its factors when a vocabulary was resized.
_BASE_WEIGHT = ".base_layer.weight"
_BIAS_OF_B = "lora_B.bias"


@dataclass(frozen=True)
class Finding:
    """Something that a program can't take, or that has to be known.

    Attributes:
        what: one sentence.
        cure: what to do about it; empty where nothing has to be done.
    """

    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.cure}" if self.cure else self.what


@dataclass(frozen=True)
class Contents:
    """An adapter's tensors by what they are, told from names and shapes.

    Attributes:
        source: the directory, or the hub id.
        config: the values in `adapter_config.json`.
        shapes: name in the file, without wrappers' parts -> shape.
        keys: the same name -> the name as the file has it.
        metadata: the strings in the header.
        factors: the adapted modules.
        halves: a line for each module that lacks A or B.
        biases_of_B: modules whose B has a bias.
        wholes: module trained whole -> its tensors.
        biases: trained biases of the base.
        rows: tensors of trained token rows.
        base_weights: an adapted table's own values, saved beside its factors.
        of_methods: what a method keeps beside A and B, such as magnitudes.
    """

    source: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    keys: dict[str, str]
    metadata: dict[str, str]
    factors: tuple[FactorShapes, ...]
    halves: tuple[str, ...] = ()
    biases_of_B: tuple[str, ...] = ()
    wholes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    base_weights: tuple[str, ...] = ()
    of_methods: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max((self.rank_of(each) for each in self.factors), default=0)

    def rank_of(self, factors: FactorShapes) -> int:
        """A module's rank; of fused experts that of each, which lie side by side in the file."""
        if not self.is_parameter(factors):
            return factors.rank
        return factors.rank // self.experts_of(factors)

    def experts_of(self, factors: FactorShapes) -> int:
        """How many experts share the factors of one parameter."""
        r = _configured_rank(self.config, self.parameter_name(factors))
        return factors.rank // r if r and factors.rank % r == 0 else 1

    def scaling(self, factors: FactorShapes) -> float:
        """`alpha / r` of a module, or `alpha / sqrt(r)` with rsLoRA."""
        return scaling_in(self.config, factors.module, factors.rank)

    def is_embedding(self, factors: FactorShapes) -> bool:
        """Whether it is the table of an embedding: A is r x rows."""
        return plain_key(factors.keys[0]).endswith(".lora_embedding_A")

    def is_convolution(self, factors: FactorShapes) -> bool:
        """Whether A and B have a kernel."""
        return len(factors.shape_A) > 2

    def is_parameter(self, factors: FactorShapes) -> bool:
        """Whether a parameter is adapted, not a layer: `target_parameters`, such as experts."""
        owners = {
            each.rpartition(".")[0] for each in self.config.get("target_parameters") or () if each
        }
        module = _without_wrappers(factors.module)
        return any(module == owner or module.endswith(f".{owner}") for owner in owners if owner)

    def parameter_name(self, factors: FactorShapes) -> str:
        """The name of what is adapted, as patterns mean it."""
        return _without_wrappers(factors.module)


def read_contents(path_or_id: PathOrId, **where: Any) -> Contents:
    """Sort an adapter's tensors; only headers are read.

    Args:
        path_or_id: a directory or a hub id.
        where: `subfolder`, `revision`, `token` and more; see `lamina.storage.source.find_adapter`.

    Raises:
        CheckpointError: a file is missing or broken, or is a pickle.
        ConfigError: the config can't be honoured.
    """
    files = find_adapter(path_or_id, **where)
    if files.pickle:
        raise CheckpointError(
            f"{files.root} has its weights in a pickle, which could run code.",
            cure="PeftModel.from_pretrained(model, DIR, allow_pickle=True).save_pretrained(NEW) "
            "makes safetensors of it",
        )
    header: dict[str, Mapping[str, Any]] = {}
    metadata: dict[str, str] = {}
    for file in files.weights:
        entries, strings = read_header(file)
        header.update(entries)
        metadata.update(strings)
    config = PeftConfig.from_json_file(files.config)
    # What is wrong in it is told by its own checks, all at once.
    PeftConfig.from_dict(config, source=str(files.config))
    return sort_contents(files.root, config, header, metadata)


def sort_contents(
    source: str,
    config: Mapping[str, Any],
    header: Header,
    metadata: Mapping[str, str] | None = None,
) -> Contents:
    """Sort what a config and the header of a file tell.

    Args:
        source: where they are from, for messages.
        config: the values in `adapter_config.json`.
        header: name -> entry with "shape", as `lamina.checkpoint.header.read_header` gives it.
        metadata: the strings in the header.
    """
    keys = {plain_key(key): key for key in header}
    plain = {name: header[key] for name, key in keys.items()}
    factors, halves = find_factors(plain)
    left = [name for name in plain if split_key(name)[1] not in LEAVES]
    rows = [name for name in left if name.endswith(_ROWS)]
    base_weights = [name for name in left if name.endswith(_BASE_WEIGHT)]
    others = [name for name in left if name not in {*rows, *base_weights}]
    of_methods = [name for name in others if split_key(name)[1] is not None]
    loose = [name.removeprefix(PREFIX) for name in others if split_key(name)[1] is None]
    biases = [name for name in loose if name.endswith("bias") and not _owner(name, config)]
    return Contents(
        source=source,
        config=dict(config),
        shapes={name: tuple(entry["shape"]) for name, entry in plain.items()},
        keys=keys,
        metadata=dict(metadata or {}),
        factors=tuple(factors),
        halves=tuple(halves),
        biases_of_B=tuple(split_key(name)[0] for name in plain if split_key(name)[1] == _BIAS_OF_B),
        wholes=_by_owner([name for name in loose if name not in biases], config),
        biases=tuple(biases),
        rows=tuple(rows),
        base_weights=tuple(base_weights),
        of_methods=tuple(of_methods),
    )


def _by_owner(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    owned: dict[str, tuple[str, ...]] = {}
    for name in names:
        owner = _owner(name, config) or name.rpartition(".")[0] or name
        owned[owner] = (*owned.get(owner, ()), name)
    return owned


def _owner(name: str, config: Mapping[str, Any]) -> str | None:
    """The module of `modules_to_save` that a tensor belongs to."""
    wanted: Sequence[str] = config.get("modules_to_save") or ()
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:end])
        if any(owner.endswith(each) for each in wanted):
            return owner
    return None


def _without_wrappers(module: str) -> str:
    return ".".join(part for part in module.split(".") if part != "base_layer")


def _configured_rank(config: Mapping[str, Any], module: str) -> int:
    return int(first_match(config.get("rank_pattern") or {}, module, config.get("r") or 8))
