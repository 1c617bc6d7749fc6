"""A disk that has no room, or breaks, while a run is going on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.errors import LaminaError, RunError
from lamina.storage.disk import refusal


@contextmanager
def disk_faults_told(directory: Path) -> Iterator[None]:
    """Whoever writes into a run's directory inside, the disk's refusal is one error of the run.

    Raises:
        RunError: the disk refused to be written.
    """
    try:
        yield
    except LaminaError:
        raise
    except Exception as error:
        found = refusal(error, directory)
        if found is None:
            raise
        raise RunError(
            f"{found.what} to go on with the run in '{directory}'.",
            faults=found.faults,
            cure=f"{found.cure} and give the same command: what is finished is kept, and a stage "
            "that was cut off goes on from its last whole checkpoint",
        ) from error
