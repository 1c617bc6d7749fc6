"""What a run found, in numbers, for docs/reliability.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[2] / "docs" / "reliability.json"
PACKAGES = ("lamina", "torch", "safetensors", "transformers")


class Figures:
    """Rows of numbers by section; a section that was run again replaces the old one."""

    def __init__(self) -> None:
        self.sections: dict[str, list[dict[str, Any]]] = {}

    def note(self, section: str, **row: Any) -> None:
        """Add a row, with the name of what was done first."""
        self.sections.setdefault(section, []).append(row)

    @contextmanager
    def timed(self, section: str, **row: Any) -> Iterator[dict[str, Any]]:
        """A row to be filled in; noted with its seconds at a clean end."""
        began = time.perf_counter()
        yield row
        self.note(section, **row, seconds=round(time.perf_counter() - began, 1))

    def write(self, path: Path = FILE) -> None:
        """Put the sections of this run into the file, beside those of others."""
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        run = {"date": datetime.date.today().isoformat(), "machine": machine()}
        known.update({name: {**run, "rows": rows} for name, rows in self.sections.items()})
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """The kind of machine, not which one."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()}
    found["python"] = platform.python_version()
    return found | {package: version(package) for package in PACKAGES}


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
