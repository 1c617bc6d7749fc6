"""How examples can be laid out, which of it a method learns from, and finding out which it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from lamina.errors import DataError, nearest
from lamina.training.data.conversation import is_messages
from lamina.training.plan.settings import Data

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A layout of examples.

    Attributes:
        name: as in a plan.
        needs: the columns that it can't be without; alternatives.
        takes: further columns that it reads.
        fits: whether an example with these columns has the right kind of values.
        told: what it looks like.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    takes: tuple[str, ...]
    fits: Callable[[Example], bool]
    told: str


def _text_or_messages(value: Any) -> bool:
    return isinstance(value, (str, dict)) or is_messages(value) or is_messages(value, "from")


def _talk(row: Example, key: str) -> bool:
    return any(is_messages(row.get(name), key) for name in ("messages", "conversations"))


def _boolean(value: Any) -> bool:
    return value in (0, 1) or str(value).lower() in {"true", "false", "0", "1"}


_TALKS = (("messages",), ("conversations",))
FORMATS = {
    each.name: each
    for each in (
        Format("text", (("text",),), (), lambda row: isinstance(row.get("text"), str), "text"),
        Format(
            "messages",
            _TALKS,
            ("system", "tools"),
            lambda row: _talk(row, "role"),
            "messages: a list of {role, content}",
        ),
        Format(
            "sharegpt",
            _TALKS,
            ("system", "tools"),
            lambda row: _talk(row, "from"),
            "conversations: a list of {from, value}; system if there is one",
        ),
        Format(
            "alpaca",
            (("instruction", "output"),),
            ("input", "system", "history"),
            lambda row: isinstance(row.get("output"), str),
            "instruction, output; input, system and history if there are any",
        ),
        Format(
            "prompt_completion",
            (("prompt", "completion"),),
            ("tools",),
            lambda row: all(_text_or_messages(row.get(key)) for key in ("prompt", "completion")),
            "prompt, completion: texts or lists of messages",
        ),
        Format(
            "preference",
            (("chosen", "rejected"),),
            ("prompt", "instruction", "input", "system", "conversations", "tools"),
            lambda row: all(_text_or_messages(row.get(key)) for key in ("chosen", "rejected")),
            "chosen, rejected: texts or lists of messages; prompt, unless they begin with it",
        ),
        Format(
            "unpaired_preference",
            (("prompt", "completion", "label"),),
            ("tools",),
            lambda row: _boolean(row.get("label")),
            "prompt, completion, label: true or false",
        ),
        Format(
            "prompt_only",
            (("prompt",),),
            (),
            lambda row: _text_or_messages(row.get("prompt")),
            "prompt: a text or a list of messages",
        ),
    )
}
# What a method learns from, likeliest first.
LEARNS_FROM: dict[str, tuple[str, ...]] = {
    "pt": ("text",),
    "sft": ("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    "dpo": ("preference",),
    "orpo": ("preference",),
    "reward": ("preference",),
    "kto": ("unpaired_preference", "preference"),
    "grpo": ("prompt_only",),
}
# A format that says more about the same columns -> those that it rules out.
_SAYS_MORE = {
    "unpaired_preference": ("prompt_completion", "prompt_only"),
    "prompt_completion": ("prompt_only",),
    "preference": ("prompt_only", "sharegpt"),
}
# What others call the same, for hints only.
_MEANS = {
    "prompt": ("question", "query", "input", "instruction", "problem", "user", "context"),
    "completion": ("answer", "response", "reply", "output", "target", "assistant", "solution"),
    "text": ("content", "document", "body", "article"),
    "messages": ("conversation", "dialog", "dialogue", "chat"),
    "chosen": ("preferred", "accepted", "winner", "better"),
    "rejected": ("refused", "loser", "worse"),
}
_WHY_NOT = {
    ("sft", "preference"): "sft learns one answer: say format: prompt_completion and "
    "columns: {completion: chosen}",
    ("sft", "unpaired_preference"): "some of these answers are unwanted; to train on all of them, "
    "say format: prompt_completion",
    ("sft", "prompt_only"): "there is no answer to learn",
    ("pt", "messages"): "pt learns plain text; sft learns conversations",
    ("pt", "sharegpt"): "pt learns plain text; sft learns conversations",
}


@dataclass(frozen=True)
class Layout:
    """What a source's columns are.

    Attributes:
        format: the name of the format.
        columns: those of the data, after `columns` of the plan has renamed them.
        used: those that are read.
        renamed: the data's name -> the name here.
    """

    format: str
    columns: tuple[str, ...]
    used: tuple[str, ...]
    renamed: Mapping[str, str]

    @property
    def dropped(self) -> tuple[str, ...]:
        """Columns that are not read."""
        return tuple(each for each in self.columns if each not in self.used)

    def named(self, row: Example) -> dict[str, Any]:
        """A row under the names that are expected."""
        return renamed(row, self.renamed)


def renamed(row: Example, names: Mapping[str, str]) -> dict[str, Any]:
    """A row with its columns renamed; what is renamed wins over what had that name."""
    kept = {key: value for key, value in row.items() if key not in names}
    return {**kept, **{new: row[old] for old, new in names.items() if old in row}}


def find_layout(data: Data, method: str, rows: Sequence[Example]) -> Layout:
    """What the columns of data are, by their names and the first example.

    Args:
        data: says so itself, if `format` isn't "auto".
        method: of the stage.
        rows: the first examples.

    Raises:
        DataError: no format fits, or several do, or the method can't learn from it.
    """
    names = _names(data, method, rows)
    named = [renamed(row, names) for row in rows]
    columns = tuple(dict.fromkeys(key for row in named for key in row))
    found = _found(named, columns)
    chosen = _told(data, found, columns, named) if data.format != "auto" else None
    if chosen is None:
        chosen = _choose(data, method, found, columns, named)
    _check_method(data, method, chosen)
    form = FORMATS[chosen]
    need = next(each for each in form.needs if set(each) <= set(columns))
    takes = columns if method == "grpo" else form.takes
    used = tuple(each for each in columns if each in need or each in takes)
    return Layout(chosen, columns, used, names)


def _names(data: Data, method: str, rows: Sequence[Example]) -> dict[str, str]:
    """The data's name -> the expected one, of `columns`."""
    there = {key for row in rows for key in row}
    expected = {
        name for form in FORMATS.values() for each in (*form.needs, form.takes) for name in each
    }
    faults = []
    for new, old in data.columns.items():
        if old not in there:
            faults.append(f"{new}: {old!r}: there is no such column{_meant(old, there)}")
        if new not in expected and method != "grpo":
            faults.append(f"{new!r} is the name of no column of a format{_meant(new, expected)}")
    if faults:
        cure = f"columns: {{expected: there}}; there are {', '.join(sorted(there))}"
        raise DataError(f"{data.path}: columns are named wrongly.", faults=faults, cure=cure)
    return {old: new for new, old in data.columns.items()}


def _meant(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f"; did you mean {close[0]!r}?" if close else ""


def _found(rows: Sequence[Example], columns: tuple[str, ...]) -> list[str]:
    """All formats that the columns fit, and any of the first examples, which may be broken."""
    there = set(columns)
    return [
        form.name
        for form in FORMATS.values()
        if any(set(need) <= there for need in form.needs) and any(map(form.fits, rows))
    ]


def _told(
    data: Data, found: Sequence[str], columns: tuple[str, ...], rows: Sequence[Example]
) -> str:
    if data.format in found:
        return data.format
    needs = " or ".join(", ".join(need) for need in FORMATS[data.format].needs)
    raise DataError(
        f"{data.path} isn't laid out as {data.format}, which needs {needs}.",
        faults=_seen(columns, rows),
        cure=_cure(found, columns),
    )


def _choose(
    data: Data,
    method: str,
    found: Sequence[str],
    columns: tuple[str, ...],
    rows: Sequence[Example],
) -> str:
    if method == "grpo" and "prompt_only" in found:
        return "prompt_only"
    left = [name for name in found if not any(name in _SAYS_MORE.get(other, ()) for other in found)]
    usable = [name for name in LEARNS_FROM[method] if name in left]
    if len(usable) == 1 or (not usable and left):
        return (usable or left)[0]
    if usable:
        several = ", ".join(usable)
        cure = f"say which: format: {usable[0]}"
        told = _seen(columns, rows)
        raise DataError(f"{data.path} can be read as {several}.", faults=told, cure=cure)
    raise DataError(
        f"{data.path} is laid out as nothing that {method} knows.",
        faults=[
            *_seen(columns, rows),
            *(f"as {name}: {FORMATS[name].told}" for name in LEARNS_FROM[method]),
        ],
        cure=_cure(LEARNS_FROM[method], columns),
    )


def _check_method(data: Data, method: str, chosen: str) -> None:
    if chosen in LEARNS_FROM[method]:
        return
    forms = " or ".join(LEARNS_FROM[method])
    raise DataError(
        f"{data.path} is laid out as {chosen}, which {method} can't learn from.",
        cure=_WHY_NOT.get((method, chosen), f"{method} learns from {forms}"),
    )


def _seen(columns: Sequence[str], rows: Sequence[Example]) -> list[str]:
    return [f"its columns: {', '.join(map(str, columns))}", f"its first example: {shown(rows[0])}"]


def shown(row: Example, width: int = 60) -> str:
    """An example with its values cut."""
    told = []
    for key, value in row.items():
        text = json.dumps(value, ensure_ascii=False, default=str)
        told.append(f"{key}: {text if len(text) <= width else text[: width - 3] + '...'}")
    return "{" + ", ".join(told) + "}"


def _cure(names: Sequence[str], columns: Sequence[str]) -> str:
    """Rename the columns that are nearest to those of a format."""
    needs = [need for name in names for need in FORMATS[name].needs]
    if not needs:
        return "columns: {expected: there}"
    need = max(needs, key=lambda each: sum(_likeness(name, columns) for name in each) / len(each))
    free = [name for name in columns if name not in need]
    pairs = [f"{name}: {_meaning(name, free)}" for name in need if name not in columns]
    return f"columns: {{{', '.join(pairs) or 'expected: there'}}}"


def _likeness(name: str, columns: Sequence[str]) -> float:
    if name in columns or any(each.lower() in _MEANS.get(name, ()) for each in columns):
        return 1.0
    return max(SequenceMatcher(None, name, each).ratio() for each in columns)


def _meaning(name: str, free: Sequence[str]) -> str:
    """The column that a name stands for: one that means the same, or is spelled like it."""
    same = [each for each in free if each.lower() in _MEANS.get(name, ())]
    return (same or nearest(name, free) or ["..."])[0]
