"""A filesystem in memory whose size can be changed while it is in use."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PAGE = 4096
_MANY = 1_000_000


class Disk:
    """A tmpfs mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self) -> bool:
        """Whether it could be mounted."""
        return self._run("mount", "-t", "tmpfs", "-o", "size=256m,mode=755", "none", str(self.path))

    def unmount(self) -> None:
        """Take it away with all in it."""
        self._run("umount", str(self.path))

    def leave(self, pages: int) -> None:
        """Make it so small that this many pages are free."""
        status = os.statvfs(self.path)
        used = status.f_blocks - status.f_bfree
        self._remount(f"size={(used + pages) * PAGE}")

    def leave_files(self, count: int) -> None:
        """Leave room for this many more files."""
        status = os.statvfs(self.path)
        self._remount(f"nr_inodes={status.f_files - status.f_ffree + count}")

    def free(self) -> None:
        """Make it large again."""
        self._remount(f"size=256m,nr_inodes={_MANY}")

    def read_only(self, on: bool) -> None:
        """Let it take no changes."""
        self._remount("ro" if on else "rw")

    def _remount(self, options: str) -> None:
        assert self._run("mount", "-o", f"remount,{options}", str(self.path)), options

    def _run(self, *command: str) -> bool:
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False
