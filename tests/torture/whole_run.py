"""A run of a plan that is interrupted, and what it came to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import load_file

from tests.torture.amounts import amount
from tests.torture.cases import Case

NAME = "tests.torture.whole_run:WholeRun"
WEIGHTS = "adapter_model.safetensors"
LOCK, CARD = ".run.lock", "README.md"
# When and how fast something was done, in how much memory, and where.
_TIMES = re.compile(r"seconds|time|memory|created|files|runtime|_per_second|output_dir")
STAGES: list[dict[str, Any]] = [
    {"name": "domain", "method": "pt", "lora_dropout": 0.2},
    # A line of the log is of steps before and after a checkpoint.
    {"name": "chat", "method": "sft", "mode": "stack", "lora_dropout": 0.2, "logging_steps": 3},
    {"name": "taste", "method": "dpo", "mode": "continue"},
]
EVALS = {
    "texts": {"datasets": "pt.jsonl"},
    "pairs": {"datasets": "dpo.jsonl", "metric": "accuracy"},
}


class WholeRun(Case):
    """Domain, instructions, preferences, with what they are judged by; out-NUMBER is a run."""

    told = "a run of three stages"

    def prepare(self, work: Path) -> None:
        # Late: other cases need none of what trains.
        from tests.training.run import plans

        defaults = {**plans.QUICK, "max_steps": amount(full=10, short=4)}
        plans.write_plan(work, STAGES, defaults=defaults, evals=EVALS, prompts=["w1 w2"])

    def act(self, work: Path, number: int) -> None:
        from lamina.training.run.told import Told
        from tests.training.run import plans

        told: Told = _marked(work / f"phase-{number}")
        result = plans.run(work / "plan.yaml", f"output_dir={work / f'out-{number}'}", console=told)
        if result.interrupted:
            raise Interrupted


class Interrupted(Exception):
    """The run was asked to stop, and did."""


def _marked(file: Path) -> Any:
    """What writes into a file how far the run is, for whoever kills it."""
    from transformers import Trainer

    from lamina.training.run import stage
    from lamina.training.run.told import Told

    def mark(phase: str) -> None:
        os.pwrite(there, phase.ljust(_WIDTH).encode(), 0)

    def marking(owner: Any, name: str, phase: str, then: str = "") -> None:
        call = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            mark(phase)
            try:
                return call(*args, **kwargs)
            finally:
                if then:
                    mark(then)

        setattr(owner, name, marked)

    class Marking(Told):
        def begins(self, *_: Any) -> None:
            mark("beginning")

        def stage_begins(self, *_: Any) -> None:
            mark("preparing a stage")

        def training_begins(self, *_: Any) -> None:
            mark("training")

        def judging_begins(self, *_: Any) -> None:
            mark("judging")

    there = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
    mark("reading the plan")
    marking(Trainer, "_save_checkpoint", "writing a checkpoint", "training")
    marking(stage, "_save", "saving a stage")
    return Marking()


_WIDTH = 32


def phase_of(work: Path, number: int) -> str:
    """How far a run was when it ended."""
    with suppress(OSError):
        return (work / f"phase-{number}").read_text().strip()
    return "importing"


def end_of(out: Path) -> dict[str, Any]:
    """All that a run left, but for when, how fast and where it was done.

    Without the report: it is made of the rest, with times on it.
    """
    files = sorted(path for path in out.rglob("*") if path.is_file())
    found = {str(file.relative_to(out)): file for file in files if file.name not in (LOCK, CARD)}
    return {name: _content(file) for name, file in found.items() if not name.startswith("report/")}


def _content(file: Path) -> Any:
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": _weights,
        ".json": lambda file: _timeless(json.loads(file.read_text())),
        ".jsonl": lambda file: list(_lines(file)),
    }
    return readers.get(file.suffix, Path.read_bytes)(file)


def _weights(file: Path) -> Any:
    tensors = {
        name: (str(each.dtype), each.shape, each.tobytes())
        for name, each in load_file(file).items()
    }
    with safe_open(file, "np") as opened:
        metadata = {
            key: json.loads(text) if text[:1] == "{" else text
            for key, text in (opened.metadata() or {}).items()
        }
    return _timeless(metadata), tensors


def _lines(file: Path) -> Iterator[Any]:
    for line in map(json.loads, file.read_text().splitlines()):
        # The trainer's own summary is of its last start only.
        if "train_runtime" not in line:
            yield _timeless(line)


def _timeless(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: _timeless(each) for key, each in told.items() if not _TIMES.search(key)}
    return [_timeless(each) for each in told] if isinstance(told, list) else told
