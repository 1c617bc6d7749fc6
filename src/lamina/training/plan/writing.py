"""A plan to begin with: every setting with its default, and one line on what it is."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from lamina.errors import PlanError, nearest
from lamina.training.plan.editors import SCHEMA_NAME
from lamina.training.plan.explained import described
from lamina.training.plan.rules import ONLY
from lamina.training.plan.schema import BUILT_IN, LEARNING_RATES, Eval, Plan, StagePlan
from lamina.training.plan.settings import Data, Gate, Method, Mode, Settings

NAMES = {"pt": "domain", "sft": "chat", "dpo": "preference", "kto": "preference", "orpo": "aligned"}
_WIDTH, _COLUMN = 100, 36
# Settings that only one stage has, and stand there.
_OF_A_STAGE = ("method", "datasets", "eval_datasets", "gate")
_HEAD = """\
# A plan of stages for `lamina run`. `lamina validate` says whether it can be run, and what
# each stage would train. What is commented out has the value that is shown, or none.
"""


@dataclass(frozen=True)
class NewStage:
    """A stage of a plan to be written.

    Attributes:
        name: of the stage.
        method: what it does.
        datasets: paths of its data.
        mode: how it is begun on the one before; None for the first.
    """

    name: str
    method: str
    datasets: tuple[str, ...]
    mode: str | None


def new_stages(methods: Sequence[str], data: Sequence[str], mode: str = "stack") -> list[NewStage]:
    """Stages by their methods, with one of `data` each, in their order.

    Args:
        methods: "pt", "sft" ...
        data: a path for each of them; none at all puts names of files to be made.
        mode: of all stages but the first.

    Raises:
        PlanError: a method or mode that is none, or not as many paths as stages.
    """
    faults = [*_unknown(methods, get_args(Method)), *_unknown([mode], get_args(Mode))]
    if not methods:
        faults.append("there is no stage: say which, such as pt, sft, dpo")
    if data and len(data) != len(methods):
        faults.append(f"{len(data)} data for {len(methods)} stages: give one for each")
    if faults:
        raise PlanError(
            "No plan can be made of this.",
            faults=faults,
            cure="lamina init --model BASE --stages pt,sft --data manual.txt --data chat.jsonl",
        )
    seen: Counter[str] = Counter()
    found = []
    for place, method in enumerate(methods):
        name = NAMES.get(method, method)
        seen[name] += 1
        name += "" if seen[name] == 1 else str(seen[name])
        path = data[place] if data else f"data/{name}.{'txt' if method == 'pt' else 'jsonl'}"
        found.append(NewStage(name, method, (path,), mode if place else None))
    return found


def _unknown(words: Iterable[str], known: tuple[str, ...]) -> Iterator[str]:
    for word in words:
        if word not in known:
            close = nearest(word, known)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"{word!r} is none of {', '.join(known)}{hint}"


def write_plan(path: str | Path, text: str, *, overwrite: bool = False) -> Path:
    """Put a plan into a file, whole or not at all.

    Raises:
        PlanError: there is a file already, or it can't be written.
    """
    file = Path(path).expanduser()
    if file.exists() and not overwrite:
        raise PlanError(f"'{file}' is there already.", cure="choose another name, or --force")
    draft = file.with_name(f".{file.name}.draft")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise PlanError(
            f"'{file}' can't be written: {error.strerror}.", cure="choose another place"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return file


def plan_text(
    model: str, stages: Sequence[NewStage], *, output_dir: str = "runs", schema: bool = False
) -> str:
    """A plan with every setting, explained; those that keep their default commented out.

    Args:
        model: the base.
        stages: what it goes through.
        output_dir: for the stages' directories.
        schema: name the schema that lies beside the plan, for editors.
    """
    lines = [f"# yaml-language-server: $schema={SCHEMA_NAME}"] if schema else []
    lines += _HEAD.splitlines()
    given = {"model_name_or_path": model, "output_dir": output_dir}
    lines += _settings(Plan, given, _defaults_of(Plan), without=("defaults", "evals", "stages"))
    lines += ["", "# Settings of all stages that don't say otherwise.", "defaults:"]
    shared = (*_OF_A_STAGE, *ONLY)
    lines += _settings(Settings, {"lora_r": BUILT_IN["lora_r"]}, _built_in(), "  ", without=shared)
    lines += ["", *_evals(), "", "stages:"]
    told = _Told(StagePlan, Gate)
    for stage in stages:
        lines += _stage(stage, told)
    return "\n".join(lines) + "\n"


def _built_in() -> dict[str, Any]:
    return {**BUILT_IN, "lora_alpha": 2 * BUILT_IN["lora_r"], "learning_rate": None}


class _Told:
    """What every setting is, told once: the second stage has it as the first."""

    def __init__(self, *parts: type[BaseModel]) -> None:
        self._texts = {name: text for part in parts for name, text in described(part).items()}

    def once(self, name: str) -> str:
        return self._texts.pop(name, "")


def _stage(stage: NewStage, told: _Told) -> Iterator[str]:
    data = stage.datasets[0] if len(stage.datasets) == 1 else list(stage.datasets)
    given = {"mode": stage.mode, "method": stage.method, "datasets": data}
    if stage.method == "grpo":
        given["reward_functions"] = "rewards:score"
    yield f"  - name: {stage.name}"
    for name, value in given.items():
        if value is not None:
            yield from _wrapped("    ", name, value, told.once(name))
    rate = f"of {stage.method}, if neither stage nor defaults say"
    yield from _wrapped("    # ", "learning_rate", LEARNING_RATES[stage.method], rate)
    for name, methods in ONLY.items():
        if stage.method in methods and name not in given:
            default = "parent" if name == "reference" else None
            yield from _wrapped("    # ", name, default, told.once(name))
    yield from _wrapped("    # ", "eval_datasets", None, told.once("eval_datasets"))
    yield "    # gate:"
    for name, value in {**_defaults_of(Gate), "may_lose": {"held_out": "5%"}}.items():
        yield from _wrapped("    #   ", name, value, told.once(name))


def _evals() -> Iterator[str]:
    yield "# Held-out sets that every stage is measured on."
    yield "# evals:"
    yield "#   held_out:"
    defaults = {**_defaults_of(Eval), "datasets": "data/held_out.jsonl"}
    yield from _settings(Eval, {}, defaults, "#     ", mark="", without=("lm_eval", "num_fewshot"))
    yield "# Data may have settings too: datasets: [{path: a.jsonl, weight: 0.5}]"
    data = {**_defaults_of(Data), "path": "data/held_out.jsonl"}
    yield from _settings(Data, {}, data, "#   ", mark="")


def _settings(
    part: type[BaseModel],
    given: dict[str, Any],
    defaults: dict[str, Any],
    indent: str = "",
    *,
    mark: str = "# ",
    without: Iterable[str] = (),
) -> Iterator[str]:
    for name, text in described(part).items():
        if name in given:
            yield from _wrapped(indent, name, given[name], text)
        elif name not in without:
            yield from _wrapped(indent + mark, name, defaults.get(name), text)


def _defaults_of(part: type[BaseModel]) -> dict[str, Any]:
    fields = {name: field for name, field in part.model_fields.items() if not field.is_required()}
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def _explained(indent: str, name: str, value: Any, text: str) -> str:
    return f"{indent}{name}: {_inline(value)}".ljust(_COLUMN) + f" # {text}"


def _wrapped(indent: str, name: str, value: Any, text: str) -> Iterator[str]:
    """`name: value  # what it is`, in as many lines as it takes."""
    first = _explained(indent, name, value, "").rstrip("# ").ljust(_COLUMN)
    if not text:
        yield first.rstrip()
    lead = indent.partition("#")[0] + "#" if "#" in indent else ""
    for place, part in enumerate(textwrap.wrap(text, _WIDTH - _COLUMN - 3)):
        yield (first if place == 0 else lead.ljust(_COLUMN)) + f" # {part}"


def _inline(value: Any) -> str:
    """A value as YAML in one line; nothing for None."""
    if value is None:
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("...").strip()
