"""Fail when a Python file is longer than one sitting: over 400 lines."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 400


def too_long(roots: list[Path]) -> list[tuple[Path, int]]:
    """The Python files under `roots` with more than `LIMIT` lines, and how many they have."""
    files = sorted(file for root in roots for file in root.rglob("*.py"))
    lengths = [(file, len(file.read_text(encoding="utf-8").splitlines())) for file in files]
    return [(file, lines) for file, lines in lengths if lines > LIMIT]


def main() -> int:
    """Print every file that is too long; 1 if there is one."""
    faults = too_long([Path(argument) for argument in sys.argv[1:]])
    for file, lines in faults:
        print(f"{file}: {lines} lines, at most {LIMIT}: split it by idea")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
