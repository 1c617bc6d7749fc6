"""Where what a plan names is: beside the plan's file first, else in the working directory."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from lamina.training.plan.schema import Plan

_PATTERN = re.compile(r"[*?\[]")
_MODELS = ("model_name_or_path", "tokenizer_name_or_path")


def place_of(path: str, root: Path) -> Path:
    """A path of a plan: below the folder of its file, unless it is in the working directory alone.

    Args:
        path: a file, a folder or a pattern such as `data/*.jsonl`.
        root: the folder of the plan's file.
    """
    given = Path(path).expanduser()
    beside = root / given
    return beside if given.is_absolute() or _there(beside) or not _there(given) else given


def is_pattern(path: str) -> bool:
    """Whether a path may stand for several files."""
    return bool(_PATTERN.search(path))


def located(plan: Plan, root: Path) -> Plan:
    """The plan with its base and tokenizer as they are found from anywhere.

    What is no folder is left as it was written: it may be the name of a hub repository.
    """
    changes: dict[str, Any] = {}
    for name in _MODELS:
        written = getattr(plan, name)
        if written and (place := place_of(written, root)).is_dir():
            changes[name] = str(place.resolve())
    return plan.model_copy(update=changes)


def _there(place: Path) -> bool:
    return place.exists() or bool(is_pattern(str(place)) and glob.glob(str(place)))
