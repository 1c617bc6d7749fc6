"""`BufferDict`: buffers by name, as `nn.ParameterDict` holds parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class BufferDict(nn.Module):
    """A dict of tensors that are buffers of a module.

    Args:
        buffers: a mapping, or pairs of names and tensors.
        persistent: whether they are saved with the module.
    """

    def __init__(self, buffers: Any = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> torch.Tensor | None:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: str) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Remove all buffers."""
        self._buffers.clear()

    def pop(self, key: str) -> torch.Tensor | None:
        """Remove a buffer and return it."""
        buffer = self[key]
        del self[key]
        return buffer

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._buffers.keys()

    def items(self) -> Iterable[tuple[str, torch.Tensor | None]]:
        """Names and buffers."""
        return self._buffers.items()

    def values(self) -> Iterable[torch.Tensor | None]:
        """The buffers."""
        return self._buffers.values()

    def update(self, buffers: Any) -> None:
        """Add buffers, in the order given; those of a plain mapping by their names.

        Raises:
            TypeError, ValueError: it is neither a mapping nor pairs.
        """
        if isinstance(buffers, (OrderedDict, BufferDict)):
            pairs: Iterable[Any] = buffers.items()
        elif isinstance(buffers, Mapping):
            pairs = sorted(buffers.items())
        elif isinstance(buffers, Iterable):
            pairs = buffers
        else:
            raise TypeError(f"expected pairs of names and tensors, got a {type(buffers).__name__}")
        for index, pair in enumerate(pairs):
            if not isinstance(pair, Iterable):
                raise TypeError(f"element {index} is no pair, but a {type(pair).__name__}")
            if len(both := tuple(pair)) != 2:
                raise ValueError(f"element {index} has {len(both)} parts; 2 are required")
            self[both[0]] = both[1]

    def extra_repr(self) -> str:
        """A line for each buffer."""
        return "\n".join(
            f"  ({key}): Buffer containing: [{torch.typename(value)} of size "
            f"{'x'.join(map(str, value.shape))}]"
            for key, value in self._buffers.items()
            if value is not None
        )

    def __call__(self, *args: Any) -> Any:
        """Not a layer."""
        raise RuntimeError("BufferDict should not be called.")
