"""Errors that libraries and the user's functions raise in a stage, told without their depths."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.errors import LaminaError, RunError
from lamina.storage.disk import refusal


@contextmanager
def told(stage: str, logs: Path) -> Iterator[None]:
    """Put the traceback of what is raised inside into a file, and raise one error that names it.

    Args:
        stage: that is being run.
        logs: the folder of the run's logs.

    Raises:
        RunError: something was raised that is neither Lamina's nor the disk's.
    """
    try:
        yield
    except LaminaError:
        raise
    except Exception as error:
        if refusal(error, logs.parent) is not None:
            raise
        file = logs / f"{stage}.traceback.txt"
        logs.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise RunError(
            f"Stage {stage!r} ended in {type(error).__name__}" + (f": {lines[0]}" if lines else ""),
            faults=[f"in {where.name}, {where.filename}, line {where.lineno}"],
            cure=f"the whole traceback is in {file}; what was done is kept, and the same command "
            "goes on from there",
        ) from error
