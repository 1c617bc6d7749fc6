"""Answers of base and stages to the same prompts, side by side; needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lamina.errors import RunError, nearest
from lamina.training.evaluate.matrix import BASE
from lamina.training.evaluate.scores import FILE, Answer, Evaluation
from lamina.training.run.state import FILE as STATE
from lamina.training.run.state import RunState


@dataclass(frozen=True)
class StageAnswer:
    """What base or a stage answered.

    Attributes:
        stage: its name, or "base".
        text: the answer, without special tokens.
        tokens: how many.
        ended: whether it came to an end by itself.
        agreement: the share of the prompt's tokens after which it takes the same next token to be
            the likeliest as the one before it in the list; None of the first, and where it wasn't
            measured.
        kl: KL(before || this) of the next token, in nats, the mean over the prompt's tokens.
    """

    stage: str
    text: str
    tokens: int
    ended: bool
    agreement: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class PromptAnswers:
    """All answers to one prompt.

    Attributes:
        prompt: its text.
        answers: one for each that was asked, in order.
    """

    prompt: str
    answers: tuple[StageAnswer, ...]


@dataclass(frozen=True)
class Compared:
    """Answers of all to all.

    Attributes:
        path: the directory.
        base: what the base was loaded from; "" where nothing was loaded.
        asked: "base" and the stages, in order.
        prompts: in theirs.
        recorded: whether these are the answers on record, of a run that was made before.
        notes: what is to be known beside that, a line each.
    """

    path: str
    base: str
    asked: tuple[str, ...]
    prompts: tuple[PromptAnswers, ...]
    recorded: bool = False
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def recorded(path: str | Path, stages: Sequence[str] | None = None) -> Compared | None:
    """The answers to a plan's prompts that its run recorded; None where there are none.

    Args:
        path: the directory of the run.
        stages: those that are wanted, "base" among them; None takes all that the end is made of.

    Raises:
        RunError: a file is broken, or there are no answers of a stage that is wanted.
    """
    folder = Path(path).expanduser()
    if not (folder / FILE).is_file() or not (folder / STATE).is_file():
        return None
    evaluation = Evaluation.read(folder)
    answers = {BASE: evaluation.base.answers} | {
        name: each.answers for name, each in evaluation.stages.items()
    }
    there = {name: each for name, each in answers.items() if each}
    if not there:
        return None
    chain = RunState.read(folder).chain
    asked = tuple(stages) if stages else tuple(n for n in (BASE, *chain) if n in there)
    _check_there(asked, tuple(there), folder)
    keyed = {name: dict(_keyed(there[name])) for name in asked}
    return Compared(
        path=str(folder),
        base="",
        asked=asked,
        prompts=tuple(
            PromptAnswers(
                key[0],
                tuple(_told(name, keyed[name][key]) for name in asked if key in keyed[name]),
            )
            for key in dict.fromkeys(key for name in asked for key in keyed[name])
        ),
        recorded=True,
    )


def _keyed(answers: Sequence[Answer]) -> Iterator[tuple[tuple[str, int], Answer]]:
    """By its prompt, and which of those with the same text."""
    seen: Counter[str] = Counter()
    for each in answers:
        yield (each.prompt, seen[each.prompt]), each
        seen[each.prompt] += 1


def _told(name: str, answer: Answer) -> StageAnswer:
    return StageAnswer(name, answer.text, answer.tokens, answer.ended)


def _check_there(asked: Sequence[str], there: Sequence[str], folder: Path) -> None:
    missing = [name for name in asked if name not in there]
    if missing:
        close = nearest(missing[0], there)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RunError(
            f"In {folder} there are no answers on record of {', '.join(map(repr, missing))}.",
            faults=[f"there are some of {', '.join(there)}{hint}"],
            cure="give prompts, and they are asked now",
        )
