"""What must hold between parts of a plan; on values as they are written, whatever they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from lamina.training.plan.adapters import FIELDS
from lamina.training.plan.document import Fault, Where
from lamina.training.plan.evals import faults_of_eval
from lamina.training.plan.gates import faults_of_gates
from lamina.training.plan.messages import hint
from lamina.training.plan.schema import ONE_OF
from lamina.training.plan.settings import Method, Mode

_WITH_REFERENCE = ("dpo", "kto", "grpo")
# Setting -> the methods that it means something to.
ONLY = {
    "beta": ("dpo", "kto", "orpo", "grpo"),
    "loss_type": ("sft", "dpo", "kto", "grpo"),
    "reference": _WITH_REFERENCE,
    "reward_functions": ("grpo",),
    "num_generations": ("grpo",),
    "max_completion_length": ("grpo",),
    "temperature": ("grpo",),
    "assistant_only_loss": ("sft",),
    "completion_only_loss": ("sft",),
    "packing": ("pt", "sft"),
}

# Names that no stage can have.
TAKEN = {
    "base": "what the first stage is built on",
    "parent": "whatever a stage is built on",
    "logs": "the folder of the logs",
    "report": "the folder of the report",
}


def faults_between(values: Any) -> Iterator[Fault]:
    """Everything that contradicts something else in the plan."""
    if not isinstance(values, dict):
        return
    stages = values.get("stages")
    stages = stages if isinstance(stages, list) else []
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    shared = values.get("defaults")
    defaults: dict[str, Any] = shared if isinstance(shared, dict) else {}
    yield from _twice(names)
    yield from _taken(names)
    yield from _of_base(values)
    yield from _of_ends(stages, defaults)
    yield from _one_of(("defaults",), defaults)
    yield from _given_twice(("defaults",), defaults)
    for place, stage in enumerate(stages):
        if isinstance(stage, dict):
            where = ("stages", place)
            yield from _of_mode(where, stage, place, values)
            yield from _of_method(where, stage, defaults, names[:place])
            yield from _of_data(where, stage, defaults)
            yield from _given_twice(where, stage)
    yield from faults_of_gates(stages, defaults, values.get("evals"))
    yield from _of_evals(values.get("evals"), names)


def _twice(names: list[Any]) -> Iterator[Fault]:
    for place, name in enumerate(names):
        if name is not None and name in names[:place]:
            yield ("stages", place, "name"), f"{name!r} is the name of an earlier stage too"


def _taken(names: list[Any]) -> Iterator[Fault]:
    for place, name in enumerate(names):
        if name in TAKEN:
            yield ("stages", place, "name"), f"{name!r} is the name of {TAKEN[name]}"


def _of_base(values: dict[str, Any]) -> Iterator[Fault]:
    if values.get("load_in_4bit") is True and values.get("load_in_8bit") is True:
        yield ("load_in_8bit",), "a base is loaded in 4 bits or in 8, not in both"


def _of_ends(stages: list[Any], defaults: dict[str, Any]) -> Iterator[Fault]:
    """A reward model has another head than one that writes: nothing else is trained on it."""
    methods = [_either("method", each, defaults) for each in stages if isinstance(each, dict)]
    for place, method in enumerate(methods):
        if method != "reward" and "reward" in methods[:place]:
            told = "the stages before it end in a reward model, whose head writes no text"
            yield ("stages", place), f"{told}: train that in a plan of its own"
            return


def _of_mode(
    where: Where, stage: dict[str, Any], place: int, values: dict[str, Any]
) -> Iterator[Fault]:
    mode = stage.get("mode")
    if place == 0 and mode is not None:
        yield (*where, "mode"), "the first stage has no parent, and so no mode: leave it out"
    if place > 0 and mode is None:
        ways = ", ".join(get_args(Mode))
        yield where, f"say how this stage is begun on the one before: mode: {ways}"
    quantised = [key for key in ("load_in_4bit", "load_in_8bit") if values.get(key) is True]
    if mode == "merge" and quantised:
        told = f"merge folds the parent into dense weights, and {quantised[0]} leaves none; "
        yield (*where, "mode"), f"{told}stack computes the same"
    if mode == "continue":
        for key in FIELDS:
            if stage.get(key) is not None:
                yield (*where, key), "continue trains the parent's ranks on, with their settings"


def _of_method(
    where: Where, stage: dict[str, Any], defaults: dict[str, Any], earlier: list[Any]
) -> Iterator[Fault]:
    method = stage.get("method", defaults.get("method"))
    if method is None:
        yield where, f"say what it does: method: {', '.join(get_args(Method))}"
        return
    for key, methods in ONLY.items():
        if stage.get(key) is not None and method in get_args(Method) and method not in methods:
            yield (*where, key), f"means nothing to {method}; it is for {', '.join(methods)}"
    if method == "grpo" and not _either("reward_functions", stage, defaults):
        yield where, "grpo needs reward_functions: [package.module:function]"
    if method in _WITH_REFERENCE:
        yield from _of_reference(where, stage, defaults, earlier)
    yield from _of_numbers(where, stage, defaults)


def _of_reference(
    where: Where, stage: dict[str, Any], defaults: dict[str, Any], earlier: list[Any]
) -> Iterator[Fault]:
    reference = _either("reference", stage, defaults)
    known = ["parent", "base", *filter(None, earlier)]
    place = where if stage.get("reference") is not None else ("defaults",)
    if reference is not None and reference not in known:
        told = f"{reference!r} is neither parent, base nor an earlier stage{hint(reference, known)}"
        yield (*place, "reference"), told
    elif stage.get("mode") == "merge" and reference in earlier[:-1]:
        told = f"merge folds {reference!r} into the base together with the stages after it"
        yield (*place, "reference"), f"{told}: mode: stack, or reference: parent or base"


def _given_twice(where: Where, settings: dict[str, Any]) -> Iterator[Fault]:
    """What stands among a trainer's arguments too would be overruled by these in silence."""
    arguments = settings.get("trainer_args")
    for name in arguments if isinstance(arguments, dict) else ():
        if settings.get(name) is not None:
            yield (*where, "trainer_args", name), f"{name} is given beside trainer_args too"


def _of_numbers(where: Where, stage: dict[str, Any], defaults: dict[str, Any]) -> Iterator[Fault]:
    held_out = _either("eval_datasets", stage, defaults) or _either(
        "eval_fraction", stage, defaults
    )
    for key in ("early_stopping_patience", "eval_steps"):
        if _either(key, stage, defaults) and not held_out:
            place = where if stage.get(key) is not None else ("defaults",)
            yield (*place, key), f"needs eval_datasets or eval_fraction in {_called(stage)}"
    yield from _one_of(where, stage)


def _one_of(where: Where, settings: dict[str, Any]) -> Iterator[Fault]:
    """Pairs of which a stage has one; where the defaults have the other, the stage's own holds."""
    for first, second in ONE_OF:
        if settings.get(first) is not None and settings.get(second) is not None:
            yield (*where, second), f"{first} is given too; one of them is enough"


def _called(stage: dict[str, Any]) -> str:
    name = stage.get("name")
    return f"stage {name!r}" if isinstance(name, str) else "the stage"


def _of_data(where: Where, stage: dict[str, Any], defaults: dict[str, Any]) -> Iterator[Fault]:
    found = _either("datasets", stage, defaults)
    if found is None:
        yield where, "it has no datasets to train on"
        return
    streamed = [d for d in _dicts(found) if d.get("streaming") is True]
    if streamed and _either("max_steps", stage, defaults) is None:
        yield (*where, "datasets"), "streaming data has no end that is known: give max_steps"
    if len({d.get("weight") is None for d in _dicts(found)} | _paths_alone(found)) > 1:
        yield (*where, "datasets"), "give every one of a mixture a weight, or none"
    if streamed and len(streamed) < len(found):
        yield (*where, "datasets"), "either all of a mixture is streaming, or none"


def _of_evals(evals: Any, stages: list[Any]) -> Iterator[Fault]:
    for name, each in evals.items() if isinstance(evals, dict) else ():
        if not isinstance(each, dict):
            continue
        stage = each.get("stage")
        if stage is not None and stage not in stages:
            told = f"there is no stage {stage!r}{hint(stage, [*filter(None, stages)])}"
            yield ("evals", name, "stage"), told
        for where, what in faults_of_eval(each):
            yield ("evals", name, *where), what


def _either(key: str, stage: dict[str, Any], defaults: dict[str, Any]) -> Any:
    value = stage.get(key)
    return defaults.get(key) if value is None else value


def _paths_alone(found: Any) -> set[bool]:
    """{True}, for without a weight, if any data is a path and nothing else."""
    return {True} if isinstance(found, list) and any(isinstance(d, str) for d in found) else set()


def _dicts(found: Any) -> list[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
