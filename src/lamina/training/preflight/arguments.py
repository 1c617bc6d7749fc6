"""What a plan asks of transformers and TRL, checked against the releases that are installed."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lamina.errors import LaminaError, PlanError
from lamina.training.plan import Plan
from lamina.training.plan.document import Document, Fault
from lamina.training.plan.messages import hint
from lamina.training.preflight.places import place_of
from lamina.training.trainers import METHODS
from lamina.training.trainers.arguments import arguments_for, faults_of
from lamina.training.trainers.functions import find_function, importable

# Beginning of an optimizer's name -> the package that brings it.
_OPTIMIZERS = {"8bit": "bitsandbytes", "paged": "bitsandbytes", "galore": "galore_torch"}
# Of reporting: name -> module, where they differ.
_REPORTING = {"comet_ml": "comet_ml", "azure_ml": "azureml", "dvclive": "dvclive"}
_WORD = re.compile(r"`[\"'](\w+)[\"']`")


def faults_of_arguments(plan: Plan, document: Document) -> list[Fault]:
    """Settings that the installed releases don't know, and trainers that refuse theirs."""
    faults = list(_of_reporting(plan))
    for place, stage in enumerate(plan.stages):
        settings = plan.settings_of(stage)
        found = [*_of_words(document, place, settings)]
        for told in faults_of(settings, stage.name):
            name, _, what = told.removeprefix(f"{stage.name}: ").partition(": ")
            setting = name.partition("=")[0].split(".")
            found.append((place_of(document, place, *setting), what))
        # What has been told is what the config would refuse first.
        faults += found or _of_config(plan, place)
    return faults


def faults_of_functions(plan: Plan, document: Document, root: Path) -> list[Fault]:
    """Functions of the user's that can't be imported."""
    asked: list[tuple[Any, str]] = []
    for place, stage in enumerate(plan.stages):
        for number, name in enumerate(plan.settings_of(stage).reward_functions or ()):
            where = place_of(document, place, "reward_functions")
            deeper = (*where, number)
            asked.append((deeper if deeper in document.lines else where, name))
    asked += [
        (("evals", name, "metric"), each.metric)
        for name, each in plan.evals.items()
        if ":" in each.metric
    ]
    faults: list[Fault] = []
    with importable(root.resolve(), Path.cwd()):
        for where, name in asked:
            try:
                find_function(name)
            except LaminaError as error:
                faults.append((where, error.what))
            except Exception as error:
                # A module of the user's may raise anything.
                faults.append((where, f"{name}: importing it ends in {error!r}"))
    return faults


def _of_config(plan: Plan, place: int) -> Iterator[Fault]:
    stage = plan.stages[place]
    with tempfile.TemporaryDirectory() as folder:
        try:
            arguments_for(plan, stage, Path(folder))
        except PlanError as error:
            told = error.what.partition("can't be trained as asked: ")[2] or error.what
            yield ("stages", place), told


def _of_words(document: Document, place: int, settings: Any) -> Iterator[Fault]:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    known = {
        "optim": [each.value for each in OptimizerNames],
        "lr_scheduler_type": [each.value for each in SchedulerType],
        "loss_type": _losses(settings.method),
    }
    for key, names in known.items():
        word = getattr(settings, key)
        if word is not None and names and word not in names:
            yield place_of(document, place, key), _not_among(word, names)
    for part, package in _OPTIMIZERS.items():
        if part in (settings.optim or "") and not _installed(package):
            told = f"{settings.optim!r} needs {package}: pip install {package}"
            yield place_of(document, place, "optim"), told


def _losses(method: str) -> list[str]:
    """The losses that TRL's config of a method documents; none if it doesn't."""
    text = METHODS[method].config_class().__doc__ or ""
    section = re.search(r"^( +)loss_type \(.*?(?=^\1\w+ \(|\Z)", text, re.M | re.S)
    return sorted(set(_WORD.findall(section[0]))) if section else []


def _not_among(word: str, names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names) if len(names) <= 20 else f"the {len(names)} that are known"
    return f"{word!r} is none of {shown}{hint(word, names)}"


def _of_reporting(plan: Plan) -> Iterator[Fault]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = [*INTEGRATION_TO_CALLBACK, "none"]
    for name in plan.report_to:
        if name not in known:
            yield ("report_to",), _not_among(name, known)
        elif name == "tensorboard":
            if not any(map(_installed, ("tensorboard", "tensorboardX"))):
                yield ("report_to",), "'tensorboard' isn't installed: pip install tensorboard"
        elif name != "none" and not _installed(_REPORTING.get(name, name)):
            yield ("report_to",), f"{name!r} isn't installed: pip install {name}"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
