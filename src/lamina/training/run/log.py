"""The log of a stage: a line of JSON for every entry."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamina.storage.whole import write_whole


class Log:
    """A file that lines are added to.

    Args:
        file: where it is.
        step: the step that a run goes on from; lines of later steps are taken out, since these
            steps are done again.
    """

    def __init__(self, file: Path, step: int) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(file) if step and line.get("step", 0) <= step]
        write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Add a line; numbers that JSON has no words for are null."""
        told = {key: _plain(value) for key, value in values.items()}
        with self._file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(told, default=str) + "\n")


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, without one that was cut off."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict):
            yield told


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
