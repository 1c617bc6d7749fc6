"""One stage as another tool's file has it, and what could not be carried over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.training.plan.document import Document

Special = Callable[[Any], None]


@dataclass(frozen=True)
class Note:
    """Something that a plan doesn't say, or says otherwise.

    Attributes:
        source: the file.
        line: in it; None if it is about the file as a whole.
        key: as the other tool calls it.
        why: it is not carried over as it is.
        cure: what to do about it.
    """

    source: str
    line: int | None
    key: str
    why: str
    cure: str

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return f"{where}: {self.key}: {self.why}; {self.cure}"


@dataclass
class Draft:
    """One stage of a plan to be.

    Attributes:
        source: the file.
        top: settings of the plan as a whole.
        settings: of the stage.
        output_dir: where the other tool puts its adapter.
        parent: the adapter that it begins on; None for the base itself.
        new_adapter: whether it trains a new one on that, rather than that one on.
        follows: whether it builds on the draft before it in the same file.
        notes: what could not be carried over.
    """

    source: str
    top: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    parent: str | None = None
    new_adapter: bool = False
    follows: bool = False
    notes: list[Note] = field(default_factory=list)

    def note(self, line: int | None, key: str, why: str, cure: str) -> None:
        """Tell of something that is not carried over."""
        self.notes.append(Note(self.source, line, key, why, cure))

    def passed_on(self, name: str, value: Any) -> None:
        """Give an argument to TRL's config as it is."""
        self.settings.setdefault("trainer_args", {})[name] = value


@dataclass(frozen=True)
class Keys:
    """What another tool's keys mean.

    Attributes:
        top: its key -> that of the plan as a whole.
        settings: its key -> that of a stage.
        passed_on: keys that TRL's config has by the same name.
        without: its key -> why a plan has no such thing, and what to do.
    """

    top: Mapping[str, str]
    settings: Mapping[str, str]
    passed_on: frozenset[str]
    without: Mapping[str, tuple[str, str]]


# Arguments of transformers' trainer that a plan has no setting of its own for.
TRAINER_ARGUMENTS = frozenset(
    {
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "data_seed",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_find_unused_parameters",
        "ddp_timeout",
        "full_determinism",
        "include_num_input_tokens_seen",
        "label_smoothing_factor",
        "lr_scheduler_kwargs",
        "optim_args",
        "remove_unused_columns",
        "tf32",
        "torch_compile",
        "use_liger_kernel",
    }
)


def carry(draft: Draft, document: Document, keys: Keys, special: Mapping[str, Special]) -> None:
    """Go through every key of a file once: carried over, passed on, or noted."""
    for key, value in document.values.items():
        line = document.line_of((key,))
        if value is None or value == "":
            continue
        if key in special:
            special[key](value)
        elif key in keys.top:
            draft.top[keys.top[key]] = value
        elif key in keys.settings:
            draft.settings[keys.settings[key]] = value
        elif key in keys.passed_on:
            draft.passed_on(key, value)
        elif key in keys.without:
            draft.note(line, key, *keys.without[key])
        elif value is not False:
            cure = "if the method's TRL config has it, put it under trainer_args"
            draft.note(line, key, f"{value!r} has no counterpart in a plan", cure)


def words(value: Any) -> list[str]:
    """A list, or a text with commas, as a list of texts."""
    if isinstance(value, list):
        return [str(each) for each in value]
    return [each.strip() for each in str(value).split(",") if each.strip()]
