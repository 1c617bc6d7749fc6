"""What is done of a run, in `run.json`: written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lamina.errors import RunError
from lamina.storage.atomic import ADAPTER_FILES
from lamina.storage.whole import write_whole

FILE = "run.json"
FORMAT = 1


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


@dataclass(frozen=True)
class RunState:
    """What is known of a run.

    Attributes:
        stages: name -> what is known of it.
        order: all stages of the plan.
    """

    stages: dict[str, StageState] = field(default_factory=dict)
    order: tuple[str, ...] = ()

    def having(self, name: str, stage: StageState) -> RunState:
        """With another state of one stage."""
        return replace(self, stages={**self.stages, name: stage})

    def write(self, directory: Path) -> None:
        """Put it into `directory`, durably."""
        document = {
            "format": FORMAT,
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
        try:
            document = json.loads(file.read_text())
            known = document["format"]
            if known != FORMAT:
                raise ValueError(f"it has format {known}, this version reads {FORMAT}")
            stages = {name: StageState(**each) for name, each in document["stages"].items()}
            return cls(stages, tuple(document["order"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"{file} can't be read: {error}.",
                cure="delete it, and all stages are run anew; or give another output_dir",
            ) from error


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
