"""A run while it goes on: lines in a pipe, a view that is drawn over and over in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lamina.amounts import duration, size
from lamina.cli.matrix import in_figures
from lamina.cli.terminal import console
from lamina.training.evaluate.scores import Score
from lamina.training.run.state import Judgement
from lamina.training.run.told import StageResult, Told

_MARKS = {
    "waiting": " ",
    "preparing": "*",
    "training": "*",
    "judging": "*",
    "kept": "=",
    "interrupted": "!",
    "refused": "!",
    "rolled back": "-",
}


@contextmanager
def teller(*, shown: bool) -> Iterator[Told]:
    """What shows a run on the error stream; the standard output is for its result."""
    errors = console(stderr=True)
    if not shown:
        yield Told()
    elif errors.is_terminal:
        view = View()
        with Live(view, console=errors, refresh_per_second=4):
            yield view
    else:
        yield Lines(errors)


class Lines(Told):
    """A line for every event."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._count = 0

    def begins(self, stages: Sequence[str], directory: str) -> None:
        """Where, and how many."""
        self._count = len(stages)
        self._say(f"{len(stages)} stages to {directory}: {' -> '.join(stages)}")

    def stage_begins(self, name: str, number: int, why: str) -> None:
        """Which, and why again."""
        again = f", again: {why}" if why else ""
        self._say(f"{name} ({number + 1} of {self._count}){again}")

    def training_begins(self, name: str, step: int, steps: int) -> None:
        """From which step on."""
        if step:
            self._say(f"{name} goes on from step {step} of {steps}")

    def logged(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Loss and what else there is."""
        told = numbers(values)
        if told:
            self._say(f"{name} {step}/{values.get('steps', '?')}  {told}")

    def judging_begins(self, name: str, missing: Sequence[str]) -> None:
        """What is measured."""
        if missing:
            self._say(f"{name} is measured on {', '.join(missing)}")

    def measured(self, name: str, eval_name: str, score: Score | None) -> None:
        """The score."""
        self._say(f"{name} {eval_name}: {scored(score)}")

    def gate(self, name: str, judgement: Judgement) -> None:
        """What it says."""
        self._say(f"{name} {judged(judgement)}")

    def retried(self, name: str, learning_rate: float) -> None:
        """At which rate."""
        self._say(f"{name} is made again at learning_rate {learning_rate:.3g}")

    def stage_ends(self, result: StageResult) -> None:
        """How it ended."""
        took = f" in {duration(result.seconds)}" if result.seconds else ""
        self._say(f"{result.name} {result.status}{took}")

    def _say(self, text: str) -> None:
        self._out.print(Text(text), soft_wrap=True)


@dataclass
class _Row:
    """What is known of a stage.

    Attributes:
        status: how far it is.
        step: done.
        steps: of all.
        began: when training began, and at which step.
        loss: the last one.
        note: why it is run again, or what else there is to say.
        gate: the bounds that it broke.
    """

    status: str = "waiting"
    step: int = 0
    steps: int = 0
    began: tuple[float, int] | None = None
    loss: float | None = None
    note: str = ""
    gate: str = ""


class View(Told):
    """All stages, one a line, as they are now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._now = clock
        self._rows: dict[str, _Row] = {}
        self._stages: frozenset[str] = frozenset()
        self._memory: int | None = None
        self._last = ""

    def __rich__(self) -> RenderableType:
        """The view as it is now."""
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for column in range(6):
            shown.add_column(no_wrap=True, justify="right" if column == 3 else "left")
        for name, row in self._rows.items():
            mark = _MARKS.get(row.status, "+")
            bar: RenderableType = ""
            if row.steps:
                bar = ProgressBar(total=row.steps, completed=row.step, width=10)
            shown.add_row(
                Text(f"{mark} {name}", style="bold" if row.status == "training" else ""),
                Text(row.status, style="dim"),
                bar,
                Text(f"{row.step:,}/{row.steps:,}" if row.steps else ""),
                Text("" if row.loss is None else f"loss {row.loss:.4f}"),
                Text(_pace(row, self._now()) or row.note, style="dim", overflow="ellipsis"),
            )
        memory = "" if self._memory is None else f"{size(self._memory)} of memory at most"
        below = "   ".join(filter(None, (self._last, memory)))
        if not below:
            return shown
        return Group(shown, Text(f"  {below}", style="dim", no_wrap=True, overflow="ellipsis"))

    def begins(self, stages: Sequence[str], directory: str) -> None:
        """A line for each."""
        self._rows = {name: _Row() for name in stages}
        self._stages = frozenset(stages)

    def stage_begins(self, name: str, number: int, why: str) -> None:
        """It is loaded, and its data are tokenized."""
        self._base_is_done()
        self._rows[name] = _Row("preparing", note=f"again: {why}" if why else "")

    def training_begins(self, name: str, step: int, steps: int) -> None:
        """Its bar begins."""
        row = self._rows[name]
        row.status, row.step, row.steps = "training", step, steps
        row.began = (self._now(), step)

    def step(self, name: str, step: int, steps: int) -> None:
        """Its bar moves."""
        self._rows[name].step = step

    def logged(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Its loss."""
        row = self._rows[name]
        row.loss = values.get("loss", row.loss)
        if values.get("eval_loss") is not None:
            self._last = f"{name}, held out: loss {values['eval_loss']:.4f}"
        self._memory = max(values.get("memory") or 0, self._memory or 0) or None

    def judging_begins(self, name: str, missing: Sequence[str]) -> None:
        """It is opened again."""
        if name not in self._rows:
            # The base has a line only if it is measured.
            self._rows = {name: _Row(), **self._rows}
        if name in self._stages:
            self._base_is_done()
        row = self._rows[name]
        row.status, row.began = "judging", None

    def measured(self, name: str, eval_name: str, score: Score | None) -> None:
        """The last score."""
        self._last = f"{name}, {eval_name}: {scored(score)}"

    def gate(self, name: str, judgement: Judgement) -> None:
        """The broken bounds."""
        self._rows[name].gate = "" if judgement.passed else judged(judgement)

    def retried(self, name: str, learning_rate: float) -> None:
        """At which rate."""
        self._rows[name] = _Row("preparing", note=f"again at learning_rate {learning_rate:.3g}")

    def stage_ends(self, result: StageResult) -> None:
        """How it ended."""
        self._base_is_done()
        row = self._rows[result.name]
        row.status, row.began = result.status, None
        row.step = row.steps = result.steps
        row.loss = (result.metrics or {}).get("train_loss", row.loss)
        took = duration(result.seconds) if result.seconds else ""
        row.note = ", ".join(filter(None, (took, row.gate or row.note)))

    def _base_is_done(self) -> None:
        """Whatever it was measured on: with prompts alone no score tells of its end."""
        for name in self._rows.keys() - self._stages:
            self._rows[name].status = "measured"


def _pace(row: _Row, now: float) -> str:
    """Steps per second, and how long those that are left take at that."""
    if row.began is None:
        return ""
    began, first = row.began
    done, spent = row.step - first, now - began
    if not done or spent <= 0:
        return ""
    left = (row.steps - row.step) * spent / done
    return f"{done / spent:,.1f}/s, {duration(left)} left"


def scored(score: Score | None) -> str:
    """A score in words: `loss 2.313`, `exact_match 41.2%`."""
    if score is None:
        return "can't be measured on this model"
    return f"{score.metric} {in_figures(score, score.value)}"


def judged(judgement: Judgement) -> str:
    """What a gate says, in words."""
    told = "; ".join(judgement.faults or judgement.told)
    return f"passes its gate: {told}" if judgement.passed else f"doesn't pass its gate: {told}"


def numbers(values: Mapping[str, Any]) -> str:
    """The numbers of a line of a log that a person looks at first."""
    shown = ("loss", "eval_loss", "learning_rate", "grad_norm", "reward", "rewards/accuracies")
    told = [
        f"{name} {values[name]:.4g}" for name in shown if isinstance(values.get(name), (int, float))
    ]
    return "  ".join(told)
