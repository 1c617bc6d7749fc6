"""What became of the tensors of a file when it was loaded, and how it is told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lamina.checkpoint.keys import suggest_mapping
from lamina.errors import KeyMismatchError

# An expert's own layers, in files from before transformers 5.
_SEPARATE_EXPERTS = re.compile(r"\.experts\.\d+\.")
_SHOWN = 6


@dataclass(frozen=True)
class LoadReport:
    """The result of loading one adapter.

    Attributes:
        loaded: names of tensors that landed.
        missing_keys: adapter weights of the model that the file has no tensor for.
        unexpected_keys: tensors of the file that have no place in the model.
        mismatched_keys: (name, shape in the file, shape in the model).
        base_keys: tensors of the file that are weights of the base model, as PEFT saves them
            beside an adapted embedding; they were loaded into the base.
        replaced_keys: those of them that the base had other values for.
        zero_B: names of B matrices that are all zero, so that their layers change nothing.
        count_B: the number of B matrices.
    """

    loaded: tuple[str, ...]
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=list
    )
    base_keys: tuple[str, ...] = ()
    replaced_keys: tuple[str, ...] = ()
    zero_B: tuple[str, ...] = ()
    count_B: int = 0

    @property
    def complete(self) -> bool:
        """Whether every tensor landed and every adapter weight was filled."""
        return not (self.missing_keys or self.unexpected_keys or self.mismatched_keys)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing_keys) + len(self.mismatched_keys)
        parts = [
            f"{len(self.loaded)} of {total} tensors loaded",
            f"{len(self.missing_keys)} missing",
            f"{len(self.unexpected_keys)} unexpected",
        ]
        if self.mismatched_keys:
            parts.append(f"{len(self.mismatched_keys)} of another shape")
        if self.replaced_keys:
            parts.append(f"{len(self.replaced_keys)} weights of the base replaced")
        if self.zero_B:
            parts.append(f"{len(self.zero_B)} of {self.count_B} B matrices all zero")
        return ", ".join(parts)


def mismatch_error(
    report: LoadReport, source: str, file_keys: Sequence[str], model_keys: Sequence[str]
) -> KeyMismatchError:
    """The error for a file whose tensors and a model's adapter weights are not the same set."""
    matched = len(report.loaded) + len(report.mismatched_keys)
    faults = [
        *_listed("the model has, the file lacks", report.missing_keys),
        *_listed("the file has, the model lacks", report.unexpected_keys),
        *(
            f"size mismatch: {key} is {list(theirs)} in the file and {list(ours)} in the model"
            for key, theirs, ours in report.mismatched_keys[:_SHOWN]
        ),
    ]
    mapping = suggest_mapping(report.unexpected_keys, report.missing_keys)
    total = len(model_keys) or len(file_keys)
    what = f"{source}: {matched} of {total} tensors matched"
    if not model_keys:
        what += "; target_modules in its config hit no module of this model"
    if matched == 0 and file_keys and model_keys:
        theirs, ours = _head(file_keys), _head(model_keys)
        if theirs != ours:
            what += f"; the file has prefix {theirs!r}, the model has {ours!r}"
    return KeyMismatchError(f"{what}. ({report})", faults=faults, cure=_cure(report, mapping))


def _cure(report: LoadReport, mapping: dict[str, str]) -> str:
    if any(_SEPARATE_EXPERTS.search(key) for key in report.unexpected_keys):
        return (
            "if it was trained before transformers fused the weights of experts, open it through "
            "lamina.interop.peft, which fuses its factors too, and save it again"
        )
    if mapping and report.unexpected_keys:
        return f"if it is the same model under other names, pass key_mapping={mapping!r}"
    rows = [
        theirs[1]
        for key, theirs, ours in report.mismatched_keys
        if key.endswith("embedding_A") and len(theirs) == 2 and theirs[0] == ours[0]
    ]
    if rows:
        return (
            f"model.resize_token_embeddings({rows[0]}) first, with the new rows that it was "
            "trained over: an adapted embedding holds its update, not its rows"
        )
    if report.mismatched_keys:
        return (
            "load it on the model that it was trained on (same sizes), or pass the config with "
            "the file's ranks"
        )
    return "load it on the model it was trained on; strict=False loads what fits and drops the rest"


def _listed(what: str, keys: Sequence[str]) -> list[str]:
    lines = [f"{what}: {key}" for key in sorted(keys)[:_SHOWN]]
    if len(keys) > _SHOWN:
        lines.append(f"{what}: {len(keys) - _SHOWN} more")
    return lines


def _head(keys: Sequence[str]) -> str:
    """The components that all keys begin with."""
    first, last = min(keys).split("."), max(keys).split(".")
    shared = []
    for a, b in zip(first, last, strict=False):
        if a != b or a.startswith("lora_"):
            break
        shared.append(a)
    return ".".join(shared)
