"""Which rows of a batch go to which adapters, and from which token on an adapter acts.

A `Routing` stands in the shared state for the time of one forward, or one generation. Its tensors
are made once, when the first layer asks for them, and serve all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lamina.errors import RoutingError

BASE = "__base__"


@dataclass(frozen=True, eq=False)
class Routing:
    """What one batch asks for.

    Attributes:
        names: an adapter for each row, `"__base__"` for none; None lets the active adapters act on
            all rows.
        offsets: adapter -> for each row, how many tokens from the end on it acts; None in a row
            where it doesn't act at all. Only for adapters that act from a token on; rows that
            `names` sends elsewhere don't count.
        expansion: how many rows a generation makes of one: beams, or several answers. Layers may
            see the batch so, or (in an encoder) as it was given.
        length: tokens of the prompt, where every step of a generation sees the whole sequence,
            growing; None where it sees the new tokens only.
    """

    names: tuple[str, ...] | None = None
    offsets: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    expansion: int = 1
    length: int | None = None
    _rows: dict[tuple[str, int, torch.device, bool], torch.Tensor] = field(
        default_factory=dict, repr=False
    )
    _masks: dict[tuple[str, int, int, torch.device], torch.Tensor] = field(
        default_factory=dict, repr=False
    )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that rows go to, in order of appearance."""
        return tuple(name for name in dict.fromkeys(self.names or ()) if name != BASE)

    def repeats(self, batch: int) -> int:
        """How often each given row is repeated in a batch of this size.

        Raises:
            RoutingError: the batch is not the one that `names` were given for.
        """
        given = len(self.names or ())
        if batch == given:
            return 1
        if batch == given * self.expansion:
            return self.expansion
        raise RoutingError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{given} and {batch} respectively.",
            cure=f"one name for each row of the batch, {BASE!r} where no adapter should act",
        )

    def rows(self, adapter: str, batch: int, device: torch.device) -> torch.Tensor:
        """The rows of an adapter in a batch of this size: indices, in order."""
        return self._found(adapter, batch, device, inside=True)

    def rows_without(self, adapter: str, batch: int, device: torch.device) -> torch.Tensor:
        """All rows that are not an adapter's."""
        return self._found(adapter, batch, device, inside=False)

    def _found(
        self, adapter: str, batch: int, device: torch.device, *, inside: bool
    ) -> torch.Tensor:
        key = (adapter, batch, device, inside)
        if key not in self._rows:
            repeats = self.repeats(batch)
            found = [
                row * repeats + copy
                for row, name in enumerate(self.names or ())
                if (name == adapter) is inside
                for copy in range(repeats)
            ]
            self._rows[key] = torch.tensor(found, dtype=torch.long, device=device)
        return self._rows[key]

    def acting(
        self, adapter: str, batch: int, length: int, device: torch.device
    ) -> torch.Tensor | None:
        """Where an adapter that acts from a token on does: batch x length, bool; None: nowhere.

        Raises:
            RoutingError: offsets were given for another number of rows.
        """
        offsets = self.offsets.get(adapter)
        if offsets is None or all(offset is None for offset in offsets):
            return None
        key = (adapter, batch, length, device)
        if key not in self._masks:
            repeats = self._repeats_of_offsets(len(offsets), batch)
            grown = 0 if self.length is None else max(length - self.length, 0)
            own = [name == adapter for name in self.names or [adapter] * len(offsets)]
            counts = torch.tensor(
                [
                    offset + grown if here and offset is not None else 0
                    for here, offset in zip(own, offsets, strict=True)
                ],
                device=device,
            )
            begins = (length - counts.repeat_interleave(repeats)).unsqueeze(1)
            self._masks[key] = torch.arange(length, device=device) >= begins
        return self._masks[key]

    def _repeats_of_offsets(self, given: int, batch: int) -> int:
        if self.names is not None and len(self.names) != given:
            raise RoutingError(
                f"There are adapter_names for {len(self.names)} rows, and alora_offsets for "
                f"{given}.",
                cure="one name and one offset for each row of the batch",
            )
        for repeats in (1, self.expansion):
            if batch == given * repeats:
                return repeats
        raise RoutingError(
            f"There are alora_offsets for {given} rows, and {batch} rows in the batch.",
            cure="one offset for each row, None where the adapter should not act",
        )
