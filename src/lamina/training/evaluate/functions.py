"""Scores of answers by a function of the user's, with the signature of a grpo reward."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.errors import PlanError, nearest
from lamina.training.evaluate.held_out import Asked
from lamina.training.evaluate.material import Way
from lamina.training.evaluate.prompted import Prompts, figures, read_prompts
from lamina.training.evaluate.scores import Answer, Score
from lamina.training.run.identity import source_digest
from lamina.training.trainers.functions import find_function

ANSWER = "answer"
_TOLD = 5
_OWN = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class Judgement:
    """Prompts, and a function that judges what a model answers to them.

    The function is called once, with all prompts: `function(prompts=..., completions=...,
    answer=..., **columns)`, every argument a list with one entry per prompt. Prompts that are
    conversations are lists of messages, and so are the completions, of one message each. `answer`
    is what the data expects (a completion, or the last that the assistant says), unless the data
    has a column of that name itself; its other columns are passed by their names. It gives one
    number per prompt, or a single one.

    Attributes:
        name: `package.module:function`.
        function: itself.
        prompts: at least one.
        higher_is_better: of its numbers.
        source: a digest of its module.
    """

    name: str
    function: Callable[..., Any]
    prompts: Prompts
    higher_is_better: bool
    source: str

    @property
    def content(self) -> str:
        """A digest of prompts, columns and function."""
        return f"{self.prompts.content} {self.source} {self.higher_is_better}"

    def measure(self, model: Any, tokenizer: Any, way: Way) -> Score | None:
        """The mean of the function's numbers, with its standard error; or its one number.

        Raises:
            PlanError: the function fails, or gives what are no such numbers.
        """
        if way.head != "language":
            return None
        answers, ids = self.prompts.answers(model, tokenizer, way.batch_size)
        values = self._values(answers, ids)
        several = len(values) > 1
        return Score(
            metric=self.name,
            value=math.fsum(values) / len(values),
            higher_is_better=self.higher_is_better,
            examples=len(answers),
            error=statistics.stdev(values) / math.sqrt(len(values)) if several else None,
            details=figures(answers),
        )

    def _values(self, answers: Sequence[Answer], ids: Sequence[Sequence[int]]) -> list[float]:
        prompts = [each.asked for each in self.prompts.prompts]
        said = [
            each.text if isinstance(prompt, str) else [{"role": "assistant", "content": each.text}]
            for prompt, each in zip(prompts, answers, strict=True)
        ]
        own = dict(zip(_OWN, (prompts, said, ids), strict=True))
        try:
            given = self.function(**_taken(self.function, {**own, **columns_of(self.prompts)}))
        except Exception as error:
            # A function of the user's may raise anything.
            raise PlanError(f"{self.name} ends in {error!r}.", cure="mend the function") from error
        return _numbers(given, len(answers), self.name)


def prepare(asked: Asked) -> Judgement:
    """Import the function, and read prompts with all columns that it may want.

    Raises:
        PlanError: the function can't be imported, or wants what the data doesn't have.
        DataError: the data is missing, broken or of another kind.
    """
    name = asked.eval.metric
    try:
        function = find_function(name)
    except PlanError:
        raise
    except Exception as error:
        # A module of the user's may raise anything.
        raise PlanError(
            f"{name}: importing it ends in {error!r}.", cure="mend the module"
        ) from error
    prompts = read_prompts(asked, all_expected=False)
    _check(function, name, prompts)
    return Judgement(name, function, prompts, asked.eval.higher_is_better, source_digest(name))


def columns_of(prompts: Prompts) -> dict[str, list[Any]]:
    """All columns of the data as lists, `answer` among them; None where a source has none."""
    rows = [each.columns for each in prompts.prompts]
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row.get(name) for row in rows] for name in names}
    expected = [each.expected for each in prompts.prompts]
    if ANSWER not in found and any(each is not None for each in expected):
        found[ANSWER] = expected
    return found


def _check(function: Callable[..., Any], name: str, prompts: Prompts) -> None:
    """Refuse what would fail when it is called, after all prompts have been answered."""
    columns = columns_of(prompts)
    faults = [
        f"column {each}: functions are given these by Lamina" for each in _OWN if each in columns
    ]
    if inspect.iscoroutinefunction(function):
        faults.append("it is async, and evals call plain functions")
    there = (*_OWN, *columns)
    wants = [each.name for each in _parameters(function) if _is_needed(each)]
    faults += [f"it wants {each!r}{_meant(each, there)}" for each in wants if each not in there]
    if faults:
        cure = f"it can be given {', '.join(there)}"
        raise PlanError(f"{name} can't be called.", faults=faults, cure=cure)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        # Some that are written in C say nothing.
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def _is_needed(parameter: inspect.Parameter) -> bool:
    several = parameter.kind in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}
    return parameter.default is parameter.empty and not several


def _meant(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return f"; did you mean {close[0]!r}?" if close else ""


def _taken(function: Callable[..., Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that a function takes."""
    parameters = _parameters(function)
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return dict(told)
    names = {each.name for each in parameters}
    return {name: value for name, value in told.items() if name in names}


def _numbers(given: Any, count: int, name: str) -> list[float]:
    """What a function gave, as numbers."""
    values = given.tolist() if hasattr(given, "tolist") else given
    single = isinstance(values, (int, float))
    if not single and not isinstance(values, (list, tuple)):
        raise _no_score(name, count, f"it gave {type(given).__name__}")
    if not single and len(values) != count:
        raise _no_score(name, count, f"it gave {len(values):,} numbers for {count:,} answers")
    numbers: list[float] = []
    wrong: list[str] = []
    for place, value in enumerate([values] if single else values, 1):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            wrong.append(f"number {place} is {value!r}")
    if wrong:
        more = [f"and {len(wrong) - _TOLD:,} more"] if len(wrong) > _TOLD else []
        raise _no_score(name, count, *wrong[:_TOLD], *more)
    return numbers


def _no_score(name: str, count: int, *faults: str) -> PlanError:
    return PlanError(
        f"What {name} gives is no score.",
        faults=faults,
        cure=f"let it return {count:,} finite numbers, one per answer, or a single one",
    )
