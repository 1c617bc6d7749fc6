"""What the lm-eval harness found, as one figure per task and one of all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.errors import PlanError

_PREFERRED = "acc_norm"
_ERROR = "_stderr"


@dataclass(frozen=True)
class Figure:
    """The figure of a task or a group.

    Attributes:
        metric: as the harness names it.
        value: of it.
        error: its standard error, as the harness estimates it; None if it doesn't.
        higher_is_better: as the task says.
    """

    metric: str
    value: float
    error: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Figures:
    """All of a measurement.

    Attributes:
        asked: of the tasks and groups that were asked for.
        tasks: of each single task.
        examples: that all tasks have together.
    """

    asked: Mapping[str, Figure]
    tasks: Mapping[str, Figure]
    examples: int

    @property
    def value(self) -> float:
        """The mean over `asked`."""
        return math.fsum(each.value for each in self.asked.values()) / len(self.asked)

    @property
    def error(self) -> float | None:
        """Its standard error, tasks being independent: the root of the sum of squares, over k."""
        errors = [each.error for each in self.asked.values()]
        known = [each for each in errors if each is not None]
        return math.hypot(*known) / len(known) if len(known) == len(errors) else None

    @property
    def higher_is_better(self) -> bool:
        """Of all of them."""
        return all(each.higher_is_better for each in self.asked.values())


def figures_of(results: Mapping[str, Any], names: Sequence[str]) -> Figures:
    """One figure of each task: `acc_norm` where it has that, else the first that it lists.

    Where a task filters answers in several ways, the first of them is taken. A group that says how
    its tasks are put together has a figure of its own; any other is the mean of its tasks.

    Args:
        results: of `simple_evaluate`.
        names: of the tasks and groups that were asked for.

    Raises:
        PlanError: a higher figure is better of some, a lower one of others.
    """
    members: Mapping[str, Sequence[str]] = results.get("group_subtasks") or {}
    tasks = {
        name: figure
        for name in results["results"]
        if name not in members and (figure := _figure(results, name)) is not None
    }
    asked = {name: _asked(results, name, members) for name in names}
    better = {name: each.higher_is_better for name, each in asked.items()}
    if len(set(better.values())) > 1:
        faults = [
            f"{name}: of {asked[name].metric}, {'higher' if up else 'lower'} is better"
            for name, up in better.items()
        ]
        raise PlanError(
            "These tasks have no mean.", faults=faults, cure="put them into evals of their own"
        )
    counts = results.get("n-samples") or {}
    return Figures(asked, tasks, sum(counts[name]["effective"] for name in tasks))


def _asked(results: Mapping[str, Any], name: str, members: Mapping[str, Sequence[str]]) -> Figure:
    own = _figure(results, name)
    if own is not None:
        return own
    leaves = [_figure(results, each) for each in dict.fromkeys(_leaves(name, members))]
    found = [each for each in leaves if each is not None]
    if not found:
        raise PlanError(f"The task {name} gives no number.", cure="take it out of lm_eval")
    errors = [each.error for each in found]
    known = [each for each in errors if each is not None]
    return Figure(
        metric=found[0].metric,
        value=math.fsum(each.value for each in found) / len(found),
        error=math.hypot(*known) / len(known) if len(known) == len(found) else None,
        higher_is_better=all(each.higher_is_better for each in found),
    )


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if name not in members:
        yield name
    for each in members.get(name, ()):
        yield from _leaves(each, members)


def _figure(results: Mapping[str, Any], name: str) -> Figure | None:
    """Of a task's `metric,filter` -> number, the one that counts."""
    row = results["results"].get(name, {})
    keys = [key for key, value in row.items() if "," in key and _is_number(value)]
    keys = [key for key in keys if not key.partition(",")[0].endswith(_ERROR)]
    if not keys:
        return None
    key = next((each for each in keys if each.partition(",")[0] == _PREFERRED), keys[0])
    metric, _, chosen = key.partition(",")
    error = row.get(f"{metric}{_ERROR},{chosen}")
    better = results["higher_is_better"].get(name, {}).get(metric)
    return Figure(
        metric=metric,
        value=float(row[key]),
        error=float(error) if _is_number(error) else None,
        # Most of its metrics are shares; those that aren't say so.
        higher_is_better=better is not False,
    )


def _is_number(value: Any) -> bool:
    return not isinstance(value, (str, bool)) and hasattr(value, "__float__")
