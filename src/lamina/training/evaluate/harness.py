"""Tasks of the lm-eval harness, which bring their own data, prompts and metrics."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch

from lamina.errors import LaminaError, PlanError
from lamina.extras import require
from lamina.training.evaluate.generating import root_of
from lamina.training.evaluate.harness_results import figures_of
from lamina.training.evaluate.harness_tasks import Tasks, find_tasks, keeping_quiet
from lamina.training.evaluate.held_out import Asked
from lamina.training.evaluate.material import Way
from lamina.training.evaluate.scores import Score

# Draws of the bootstrap, for metrics whose standard error has no closed form.
_DRAWS = 1_000
_POOLS = "DISABLE_MULTIPROC"


@dataclass(frozen=True)
class Harness:
    """Tasks, and how they are put to a model.

    Attributes:
        tasks: to be measured.
        num_fewshot: examples that are shown; None for as many as a task says.
        limit: the first so many examples of each task.
        max_length: tokens of a request, cut from its left; None is what the model can read.
        digest: of local tasks, with their data.
    """

    tasks: Tasks
    num_fewshot: int | None = None
    limit: int | None = None
    max_length: int | None = None
    digest: str = ""

    @property
    def content(self) -> str:
        """A digest of tasks and settings, and the version of the harness."""
        told = [self.tasks.names, self.num_fewshot, self.limit, self.max_length, self.digest]
        return json.dumps([*told, version("lm_eval")])

    def measure(self, model: Any, tokenizer: Any, way: Way) -> Score | None:
        """The mean over tasks of what `figures_of` takes of each.

        Raises:
            PlanError: the harness fails, or can't do what is asked.
        """
        if way.head != "language":
            return None
        lm_eval, wrapper = _harness()
        with keeping_quiet(), _one_process():
            try:
                # The harness gives a tokenizer a padding token if it has none.
                asked = wrapper(
                    pretrained=_Unchanged(model),
                    tokenizer=copy.deepcopy(tokenizer),
                    backend="causal",
                    batch_size=way.batch_size,
                    max_length=self.max_length,
                    softmax_dtype=torch.float32,
                )
                results = self._results(lm_eval, asked)
            except LaminaError:
                raise
            except Exception as error:
                # Tasks are code of many authors, and read data from anywhere.
                raise _failed(self.tasks, error) from error
        found = figures_of(results, self.tasks.names)
        return Score(
            metric="lm_eval",
            value=found.value,
            higher_is_better=found.higher_is_better,
            examples=found.examples,
            error=found.error,
            details={name: each.value for name, each in {**found.asked, **found.tasks}.items()},
        )

    def _results(self, lm_eval: ModuleType, asked: Any) -> Mapping[str, Any]:
        """What `lm_eval run` would find, without its asking git and pip about themselves."""
        random.seed(0)
        found: Mapping[str, Any] = lm_eval.evaluate(
            lm=asked,
            task_dict=self.tasks.load(self.num_fewshot),
            limit=self.limit,
            bootstrap_iters=_DRAWS,
            log_samples=False,
        )
        return found


class _Unchanged:
    """A model that the harness can ask, but not change: it would tie weights anew."""

    def __init__(self, model: Any) -> None:
        self._model, self._root = model, root_of(model)
        self.config = self._root.config
        self.device = next(model.parameters()).device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, use_cache=False, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.generate(*args, **kwargs)


def prepare(asked: Asked) -> Harness:
    """Find tasks by their names; those that lie beside the plan are opened with their data.

    Data of other tasks is found, and maybe downloaded, when the base is measured.

    Raises:
        PlanError: with every name that is unknown; a local task can't be opened.
        MissingExtraError: the harness isn't installed.
    """
    _harness()
    told = asked.eval
    tasks = find_tasks(told.lm_eval or (), asked.root)
    given = "max_length" in told.model_fields_set
    return Harness(
        tasks,
        num_fewshot=told.num_fewshot,
        limit=told.max_samples,
        max_length=told.max_length if given else None,
        digest=_digest(tasks, told.num_fewshot) if tasks.folders else "",
    )


def _digest(tasks: Tasks, num_fewshot: int | None) -> str:
    """SHA-256 of tasks that are defined beside the plan: what they say, and their documents."""
    whole = hashlib.sha256()
    with keeping_quiet():
        try:
            loaded = tasks.local.load(num_fewshot)["tasks"]
            documents = [each for _, task in sorted(loaded.items()) for each in _documents(task)]
        except LaminaError:
            raise
        except Exception as error:
            # Tasks of the user's may hold anything.
            raise _failed(tasks.local, error) from error
    for told in (*tasks.local.names, *tasks.local.definitions(), *documents):
        whole.update(json.dumps(told, sort_keys=True, default=str).encode() + b"\0")
    return whole.hexdigest()


def _documents(task: Any) -> Iterator[Any]:
    yield from task.eval_docs
    if task.has_training_docs() or task.has_validation_docs():
        yield from task.fewshot_docs()


def _harness() -> tuple[ModuleType, Any]:
    """The harness, and its wrapper of models."""
    with keeping_quiet():
        module = require("lm_eval", "eval")
        return module, require("lm_eval.models.huggingface", "eval").HFLM


def _failed(tasks: Tasks, error: Exception) -> PlanError:
    return PlanError(
        f"The lm-eval harness ends in {type(error).__name__}: {error}",
        cure=f"see `lm_eval run --tasks {','.join(tasks.names)}`; a task's data lies beside the "
        "plan, in the working directory, or on the hub",
    )


@contextmanager
def _one_process() -> Iterator[None]:
    """No bootstrapping in forks of a process that may hold a GPU."""
    before = os.environ.get(_POOLS)
    os.environ[_POOLS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_POOLS]
        else:
            os.environ[_POOLS] = before
