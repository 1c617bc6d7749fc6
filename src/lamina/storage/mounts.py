"""Filesystems mounted at a directory or inside it, bind mounts of single files among them."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")


def mounts_within(directory: Path) -> list[Path]:
    """The mount points at or below `directory` (a resolved path), as far as the system tells.

    Source: proc_pid_mountinfo(5), whose fifth field is the mount point with octal escapes.
    Elsewhere only a mount at the directory itself is found.
    """
    try:
        lines = os.fsdecode(_TABLE.read_bytes()).splitlines()
    except OSError:
        return [directory] if os.path.ismount(directory) else []
    points = {Path(_unescaped(line.split(" ")[4])) for line in lines if line.count(" ") > 4}
    return sorted(point for point in points if point.is_relative_to(directory))


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
