"""How far a stage moved each module away from where it found it: from factors, never dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.checkpoint.difference import effective_rank, update_size
from lamina.engine.fold import as_base
from lamina.engine.layers import LoraLayer
from lamina.engine.names import Place, places
from lamina.engine.weights import weight_of
from lamina.stages.change import UpdateChange, WholeChange, change_of
from lamina.training.evaluate.generating import root_of
from lamina.training.evaluate.scores import ModuleDrift

# Entries of a weight that are summed at a time, in fp64.
_AT_A_TIME = 1 << 18
# All singular values of a matrix with a longer shorter side take too long.
_DECOMPOSED = 512
_MAGNITUDE = ".lora_magnitude_vector"


def drift_of(stage: Path, before: Path | None, model: Any) -> tuple[ModuleDrift, ...]:
    """What a stage changed, module by module, against the stage that it was built on.

    D is taken from the factors of both files: ranks that the stage left alone drop out, so that a
    stacked stage is measured by its own ranks, a continued one by what became of them. All is
    computed in fp64 through QR of factors, O((out + in) R^2).

    What was trained otherwise is told too, each by the name of its parameter: modules trained
    whole, biases, replaced rows of a table (by the table's name). Their D is the difference to
    the stage before, else to the base. A task's head that no stage before had is drawn at random
    with every base, so all of it counts as changed. With DoRA, a module's D is that of B @ A
    alone, without what the magnitudes make of it; those are told beside it, against the norms
    of the base's rows.

    Args:
        stage: the stage's directory.
        before: that of the stage before; None is the base.
        model: the base, adapted or not; it is left as it is. Its weights are read for their norms,
            quantised ones one at a time.

    Raises:
        CheckpointError: a file can't be read, or has NaN or infinity.
    """
    change = change_of(stage, before)
    with torch.no_grad(), _bare(model):
        base = _BaseWeights(model)
        found = [_of_update(each, base) for each in change.updates]
        wholes = [_of_whole(each, base) for each in change.wholes if each.now.numel()]
    # The file keeps what earlier stages trained whole, too.
    return (*found, *(each for each in wholes if each.norm))


def _bare(model: Any) -> AbstractContextManager[None]:
    state = getattr(model, "adapter_state", None)
    return nullcontext() if state is None else as_base(root_of(model), state)


def _of_update(each: UpdateChange, base: _BaseWeights) -> ModuleDrift:
    size = update_size(each.change, each.before, blocks=each.blocks)
    return ModuleDrift(
        module=each.module,
        norm=size.norm,
        weight_norm=base.norm(each.module),
        effective_rank=size.effective_rank,
        rank=size.rank,
        input_overlap=size.input_overlap,
        output_overlap=size.output_overlap,
    )


def _of_whole(each: WholeChange, base: _BaseWeights) -> ModuleDrift:
    had = base.like(each)
    before = each.before if each.before is not None else had
    now = each.now.double()
    change = now if before is None else now - before.to(now.device).double()
    # A vector is one row.
    matrix = change.reshape(change.shape[0], -1) if change.dim() > 1 else change.reshape(1, -1)
    return ModuleDrift(
        module=each.name,
        norm=float(change.norm()),
        weight_norm=base.table_norm(each.name) if each.rows is not None else _norm(had),
        effective_rank=_effective_rank(matrix),
        rank=min(matrix.shape),
    )


def _effective_rank(matrix: torch.Tensor) -> float | None:
    return effective_rank(matrix) if min(matrix.shape) <= _DECOMPOSED else None


class _BaseWeights:
    """A base's own weights by the plain names of its modules."""

    def __init__(self, model: Any) -> None:
        self._places: dict[str, Place] = {place.name: place for place in places(root_of(model))}

    def norm(self, module: str) -> float | None:
        """Frobenius norm of the weight that an update is added to."""
        read = self._reader(module)
        return None if read is None else _norm(read())

    def table_norm(self, table: str) -> float | None:
        """Of a table with replaced rows."""
        return _norm(self._parameter(f"{table}.weight"))

    def like(self, each: WholeChange) -> torch.Tensor | None:
        """The base's own values of what a stage trained."""
        if each.name.endswith(_MAGNITUDE):
            found = self._row_norms(each.name.removesuffix(_MAGNITUDE), each.now.numel())
            return None if found is None else found.view_as(each.now)
        if not each.owned_by_base:
            return None
        if each.rows is not None:
            return self._rows(each.name, each.rows, each.rows_before)
        found = self._parameter(each.name)
        return found if found is not None and found.shape == each.now.shape else None

    def _rows(
        self, table: str, rows: Sequence[int], replaced: Mapping[int, torch.Tensor]
    ) -> torch.Tensor | None:
        """Rows of a table as a stage found them."""
        own = self._parameter(f"{table}.weight")
        if own is None:
            return None
        found = _exact(own[list(rows)])
        for place, row in enumerate(rows):
            if row in replaced:
                found[place] = replaced[row].to(found)
        return found

    def _parameter(self, name: str) -> torch.Tensor | None:
        module, _, leaf = name.rpartition(".")
        place = self._places.get(module)
        if place is None:
            return None
        if leaf == "weight":
            read = _reader(place.original)
            return None if read is None else read()
        return place.original._parameters.get(leaf, place.original._buffers.get(leaf))

    def _reader(self, module: str) -> Callable[[], torch.Tensor] | None:
        """How to read the weight of a module; of several adapted parameters, its own."""
        plain = module.replace(".base_layer", "")
        place = self._places.get(plain)
        if place is None:
            return None
        layer = place.module
        for _ in range(module.count(".base_layer")):
            layer = getattr(layer, "base_layer", layer)
        return _reader(layer)

    def _row_norms(self, module: str, rows: int) -> torch.Tensor | None:
        """The norm of what makes each output, which DoRA's magnitudes begin as."""
        read = self._reader(module)
        if read is None:
            return None
        weight = read()
        place = self._places[module]
        turned = isinstance(place.original, nn.Embedding) or _in_by_out(place.module)
        matrix = weight.T if turned else weight.flatten(1)
        if matrix.shape[0] != rows:
            return None
        parts = matrix.split(max(1, _AT_A_TIME // matrix.shape[1]))
        return torch.cat([_exact(part).norm(dim=1) for part in parts])


def _in_by_out(module: nn.Module) -> bool:
    return bool(getattr(module, "fan_in_fan_out", False))


def _reader(module: nn.Module) -> Callable[[], torch.Tensor] | None:
    view = module.weight_view if isinstance(module, LoraLayer) else weight_of(module)
    if view.why_not_readable is not None or view.device.type == "meta":
        return None
    return view.read


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In fp64, which MPS doesn't have."""
    return (tensor.cpu() if tensor.is_mps else tensor).double()


def _norm(weight: torch.Tensor | None) -> float | None:
    if weight is None or weight.is_meta:
        return None
    return math.sqrt(sum(_squares(weight)))


def _squares(weight: torch.Tensor) -> Iterator[float]:
    rows = weight if weight.dim() > 1 else weight[None]
    for part in rows.split(max(1, _AT_A_TIME // max(1, rows[0].numel()))):
        yield float(torch.linalg.vector_norm(_exact(part))) ** 2
