"""What is done of a run, in `run.json`: written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lamina.storage.atomic import ADAPTER_FILES
from lamina.storage.whole import write_whole
from lamina.training.noted import read_notes
from lamina.training.run.identity import digest

FILE = "run.json"
FORMAT = 1
_CURE = "move it and the stages' directories away, and all are run anew; or give another output_dir"


@dataclass(frozen=True)
class Judgement:
    """What a stage's gate says of it.

    Attributes:
        passed: whether the stage counts.
        on_failure: what the gate does with a stage that doesn't: "stop", "rollback" or "retry".
        faults: a sentence for every bound that was broken.
        told: one for every bound that was kept.
    """

    passed: bool
    on_failure: str
    faults: tuple[str, ...] = ()
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Retry:
    """A try whose result the gate refused, and that was made again.

    Attributes:
        learning_rate: that it was made at.
        faults: what it cost.
    """

    learning_rate: float
    faults: tuple[str, ...]


@dataclass(frozen=True)
class StageState:
    """What is known of one stage.

    Attributes:
        status: how far it is.
        hash: of what it depends on.
        inputs: what that is, to tell what changed.
        files: name -> sha256 of the adapter's files, once finished.
        weights: the digest of its tensors, which is the same if it is made again.
        metrics: as in its record.
        steps: optimizer steps that it took.
        seconds: that it took, all runs together.
        why: what stopped it, where something did.
        built_on: the stage that it was begun on; None is the base. A stage that was rolled back is
            none that another is built on.
        first: the hash of its first try; another one is told by `hash` only.
        retries: the tries before the one that `hash` is of.
        gate: what its gate says; None without one, or before it was judged.
    """

    status: Literal["running", "interrupted", "failed", "finished"]
    hash: str
    inputs: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    weights: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    why: str = ""
    built_on: str | None = None
    first: str = ""
    retries: tuple[Retry, ...] = ()
    gate: Judgement | None = None

    @property
    def identity(self) -> str:
        """What it is to stages that are built on it."""
        return digest({"hash": self.hash, "weights": self.weights})

    @property
    def counts(self) -> bool:
        """Whether it is finished, and its gate lets it be built on."""
        return self.status == "finished" and (self.gate is None or self.gate.passed)

    @property
    def diverged(self) -> bool:
        """Whether its training came to no numbers, which its gate was told of."""
        return self.status == "failed" and self.gate is not None

    @property
    def standing(self) -> str:
        """The status, with what a gate made of a stage's end: "rolled back" or "refused"."""
        ended = self.status == "finished" or self.diverged
        if not ended or self.gate is None or self.gate.passed:
            return self.status
        return "rolled back" if self.gate.on_failure == "rollback" else "refused"

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> StageState:
        """Of its JSON."""
        retries = tuple(
            Retry(each["learning_rate"], tuple(each["faults"])) for each in told.get("retries", ())
        )
        gate = told.get("gate")
        if gate is not None:
            lists = {key: tuple(gate[key]) for key in ("faults", "told")}
            gate = Judgement(**{**gate, **lists})
        return cls(**{**told, "retries": retries, "gate": gate})


@dataclass(frozen=True)
class RunState:
    """What is known of a run.

    Attributes:
        stages: name -> what is known of it.
        order: all stages of the plan.
        base: as the plan names it.
    """

    stages: dict[str, StageState] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    base: str = ""

    @property
    def chain(self) -> tuple[str, ...]:
        """The stages that the newest one that counts is made of, oldest first."""
        return tuple(name for name in self._standing() if self.stages[name].counts)

    @property
    def outdated(self) -> frozenset[str]:
        """Finished stages that are on something else than a run would build them on now.

        They are what an earlier plan came to: a stage before them was made again since, has to be,
        or was taken out.
        """
        finished = {
            name
            for name in self.order
            if name in self.stages and self.stages[name].status == "finished"
        }
        return frozenset(finished - set(self._standing()))

    def _standing(self) -> Iterator[str]:
        """Finished stages, each on the last before it that counts, as far as that goes."""
        below: str | None = None
        for name in self.order:
            stage = self.stages.get(name)
            if stage is not None and stage.diverged and stage.standing == "rolled back":
                continue
            if stage is None or stage.status != "finished" or not self._is_on(stage, below):
                return
            yield name
            if stage.standing == "refused":
                return
            below = name if stage.counts else below

    def _is_on(self, stage: StageState, below: str | None) -> bool:
        if "parent" not in stage.inputs:
            return stage.built_on == below
        found: bool = stage.inputs["parent"] == (self.stages[below].identity if below else None)
        return found

    def having(self, name: str, stage: StageState) -> RunState:
        """With another state of one stage."""
        return replace(self, stages={**self.stages, name: stage})

    def write(self, directory: Path) -> None:
        """Put it into `directory`, durably."""
        document = {
            "format": FORMAT,
            "base": self.base,
            "order": list(self.order),
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
        }
        write_whole(directory / FILE, json.dumps(document, indent=2, default=str) + "\n")

    @classmethod
    def read(cls, directory: Path) -> RunState:
        """What was written; nothing where nothing was.

        Raises:
            RunError: the file is broken, or from a newer version.
        """
        file = directory / FILE
        if not file.is_file():
            return cls()
        return read_notes(file, FORMAT, cls._from_dict, cure=_CURE)

    @classmethod
    def _from_dict(cls, told: dict[str, Any]) -> RunState:
        stages = {name: StageState.from_dict(each) for name, each in told["stages"].items()}
        return cls(stages, tuple(told["order"]), told.get("base", ""))


def adapter_digests(directory: Path) -> dict[str, str]:
    """Name -> sha256 of what makes up an adapter."""
    files = sorted({file for pattern in ADAPTER_FILES for file in directory.glob(pattern)})
    return {file.name: _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    told = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            told.update(chunk)
    return told.hexdigest()
