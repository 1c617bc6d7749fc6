"""The evals of a plan, with their data read and checked: all faults before anything is trained."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lamina.errors import LaminaError, PlanError
from lamina.stages.tokenizers import describe_tokenizer
from lamina.training.data.refusals import cure_of, lines_of
from lamina.training.evaluate import exact, functions, harness, losses, preferences
from lamina.training.evaluate.held_out import Asked
from lamina.training.evaluate.material import Material
from lamina.training.plan import Plan
from lamina.training.plan.evals import faults_of_eval
from lamina.training.plan.schema import Eval

# Changes where the same model would be given another score of the same data.
_VERSION = 1
_PACKAGES = ("lamina", "torch", "transformers")


@dataclass(frozen=True)
class Prepared:
    """An eval that a model can be measured on.

    Attributes:
        name: in the plan.
        eval: what the plan says.
        hash: SHA-256 of all that its scores depend on beside the model.
        material: its data, and how it is measured.
    """

    name: str
    eval: Eval
    hash: str
    material: Material


def prepare_evals(
    plan: Plan, *, tokenizer: Any, root: str | os.PathLike[str]
) -> dict[str, Prepared]:
    """Read and check the data of all evals; no model is loaded.

    Args:
        plan: the plan.
        tokenizer: with its chat template.
        root: the folder of the plan's file.

    Raises:
        PlanError: with all that is wrong with any of them.
    """
    found: dict[str, Prepared] = {}
    faults: list[str] = []
    errors: list[LaminaError] = []
    for name, told in plan.evals.items():
        asked = Asked(name, told, plan, tokenizer, Path(root))
        try:
            found[name] = _prepared(asked)
        except LaminaError as error:
            faults += [f"{name}: {line}" for line in lines_of(error)]
            errors.append(error)
    if errors:
        raise PlanError(
            "The evals can't be measured as asked.", faults=faults, cure=cure_of(errors)
        )
    return found


def _prepared(asked: Asked) -> Prepared:
    faults = [
        ": ".join(filter(None, (".".join(map(str, where)), what)))
        for where, what in faults_of_eval(asked.eval.model_dump(exclude_unset=True))
    ]
    if faults:
        raise PlanError("It can't be measured so.", faults=faults, cure="leave these out")
    metric = asked.eval.metric
    prepare = harness.prepare if asked.eval.lm_eval else _BY_METRIC.get(metric, functions.prepare)
    material = prepare(asked)
    told = json.dumps(dict(_depends(asked, material)), sort_keys=True)
    return Prepared(asked.name, asked.eval, hashlib.sha256(told.encode()).hexdigest(), material)


def _depends(asked: Asked, material: Material) -> Iterator[tuple[str, Any]]:
    """All that scores depend on beside the model."""
    yield "version", _VERSION
    yield "metric", asked.eval.metric
    yield "content", material.content
    yield "tokenizer", describe_tokenizer(asked.tokenizer)
    for package in _PACKAGES:
        yield f"version of {package}", version(package)


_BY_METRIC: dict[str, Callable[[Asked], Material]] = {
    "loss": losses.prepare,
    "accuracy": preferences.prepare,
    "exact_match": exact.prepare,
}
