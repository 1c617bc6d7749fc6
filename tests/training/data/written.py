"""Data files with known content."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lamina.training.data import Examples, open_data, read_examples
from lamina.training.plan.settings import Data


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """A file with one value on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, method: str, **settings: Any) -> Examples:
    """A file's examples, as a method's trainer takes them."""
    return read_examples(open_data(Data(path=str(path), **settings)), method)


def converted(folder: Path, row: dict[str, Any], method: str, **settings: Any) -> dict[str, Any]:
    """One example in the columns of a method."""
    (made,) = read(jsonl(folder / "one.jsonl", [row]), method, **settings).dataset
    return dict(made)


def said(role: str, content: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": content}
