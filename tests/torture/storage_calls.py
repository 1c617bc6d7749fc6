"""Something befalls this process right before its n-th call that changes the disk."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from typing import Any

import safetensors.torch

from lamina.storage import exchange

NAMES = (
    "chmod",
    "copy_file_range",
    "fsync",
    "ftruncate",
    "link",
    "mkdir",
    "pwrite",
    "rename",
    "replace",
    "rmdir",
    "symlink",
    "unlink",
)


class Calls:
    """Counts what changes the disk from here on, in this process.

    Files that are written count when they are opened, and those that safetensors writes as one.

    Args:
        at: the call before which something happens, from 1; 0 never.
        happen: what; it may raise.
    """

    def __init__(self, at: int, happen: Callable[[], None]) -> None:
        self.at, self.happen = at, happen
        self.count = 0

    def begin(self) -> None:
        """Put itself in front of the calls."""
        for name in NAMES:
            if hasattr(os, name):
                setattr(os, name, self._counted(getattr(os, name)))
        os.open = self._counted(os.open, lambda path, flags, *_, **__: flags & os.O_CREAT)
        opened = self._counted(io.open, lambda path, mode="r", *_, **__: set(mode) & set("wax+"))
        io.open = builtins.open = opened
        serialize = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._counted(serialize)
        if exchange._swap_call(exchange._libc()) is not None:
            exchange.exchange = self._counted(exchange.exchange)

    def _counted(
        self, call: Callable[..., Any], counts: Callable[..., Any] = lambda *_, **__: True
    ) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if counts(*args, **kwargs):
                self.count += 1
                if self.count == self.at:
                    self.happen()
            return call(*args, **kwargs)

        return wrapper
