"""What a save checks: that the tensors are whole, and that the file holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.header import data_start, read_header
from lamina.checkpoint.origin import A_LEAVES, B_LEAVES, split_key
from lamina.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
_SHOWN = 6


def check_whole(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors of which this process has a part only, or nothing.

    ZeRO-3 leaves empty tensors in place of parameters, FSDP flat pieces of them or DTensors, a
    load that was not finished tensors on the meta device.

    Raises:
        CheckpointError: names all of them.
    """
    faults = [f"'{key}' {fault}" for key, tensor in tensors.items() if (fault := _part(tensor))]
    faults = faults or [*_flat(tensors)]
    if faults:
        raise CheckpointError(
            f"{len(faults)} of the {len(tensors)} tensors to save are not whole in this process; "
            "nothing was written.",
            faults=_some(faults),
            cure="gather them before saving (accelerator.get_state_dict(model), handed on as "
            "save_pretrained(..., state_dict=...)), or load what is on the meta device",
        )


def check_written(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Re-open a safetensors file and compare all of it with what is in memory, bit by bit.

    Args:
        path: the file, which nobody else knows yet.
        tensors: name -> contiguous tensor on the CPU.
        metadata: the strings of its header.

    Raises:
        CheckpointError: something in it differs, or there is NaN in it, or a factor has infinity.
    """
    header, strings = read_header(path)
    if strings != dict(metadata):
        raise _differs(path, ["the strings of its header"])
    wanted = {key: (_DTYPES.get(t.dtype), list(t.shape)) for key, t in tensors.items()}
    found = {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()}
    if found != wanted:
        keys = sorted(found.keys() | wanted.keys())
        # What has no name here is new to torch: its bytes are still compared.
        different = [key for key in keys if not _agree(found.get(key), wanted.get(key))]
        if different:
            raise _differs(path, different)
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    spans = _spans(header, data_start(path))
    different = _unequal(content, tensors, spans)
    if different:
        raise _differs(path, different)
    _check_finite(content, tensors, spans)


_Spans = Mapping[str, tuple[int, int]]
_Kind = tuple[str | None, list[int]]


def _agree(found: _Kind | None, wanted: _Kind | None) -> bool:
    if found is None or wanted is None:
        return False
    return found[1] == wanted[1] and wanted[0] in (None, found[0])


def _differs(path: Path, what: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"'{path.name}' was re-opened and differs from what was to be saved; it was not kept.",
        faults=_some([f"'{key}' differs" for key in what]),
        cure="save again; if it happens again, the disk or the memory is damaged",
    )


def _spans(header: Mapping[str, Mapping[str, Any]], start: int) -> dict[str, tuple[int, int]]:
    """Name -> first byte and end in the file, in the file's order."""
    spans = {key: entry["data_offsets"] for key, entry in header.items()}
    return {key: (start + span[0], start + span[1]) for key, span in sorted(spans.items(), key=_by)}


def _by(item: tuple[str, list[int]]) -> list[int]:
    return item[1]


def _unequal(
    content: torch.Tensor, tensors: Mapping[str, torch.Tensor], spans: _Spans
) -> list[str]:
    """The names whose bytes in the file are not those in memory."""
    begins, ends = [begin for begin, _ in spans.values()], [end for _, end in spans.values()]
    if begins[1:] != ends[:-1]:
        return list(spans)
    # Eight bytes at a time, where they lie so.
    unit = torch.uint8 if any(edge % 8 for edge in (*begins, *ends)) else torch.int64
    sizes = [(end - begin) // unit.itemsize for begin, end in spans.values()]
    pieces = content[begins[0] : ends[-1]].view(unit).split(sizes) if sizes else ()
    return [
        key
        for key, piece in zip(spans, pieces, strict=True)
        if not torch.equal(piece, tensors[key].reshape(-1).view(unit))
    ]


def _check_finite(
    content: torch.Tensor, tensors: Mapping[str, torch.Tensor], spans: _Spans
) -> None:
    """Look through runs of tensors of one dtype first: one look is quicker than hundreds."""
    runs: list[tuple[torch.dtype, list[str]]] = []
    for key in spans:
        dtype = tensors[key].dtype
        if not dtype.is_floating_point or not tensors[key].numel():
            continue
        if not runs or runs[-1][0] != dtype or spans[runs[-1][1][-1]][1] != spans[key][0]:
            runs.append((dtype, []))
        runs[-1][1].append(key)
    faults: list[str] = []
    for dtype, keys in runs:
        run = content[spans[keys[0]][0] : spans[keys[-1]][1]]
        aligned = run if run.storage_offset() % dtype.itemsize == 0 else run.clone()
        if not _is_finite(aligned.view(dtype)):
            faults += [f"'{key}' {fault}" for key in keys if (fault := _not_finite(key, tensors))]
    if faults:
        raise CheckpointError(
            f"{len(faults)} of the {len(tensors)} tensors to save are not numbers; nothing was "
            "saved.",
            faults=_some(faults),
            cure="the training has diverged: go back to an earlier checkpoint, lower the "
            "learning rate or clip gradients",
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    extremes = torch.aminmax(tensor.float() if tensor.dtype in _NARROW else tensor)
    return bool(torch.isfinite(torch.stack(list(extremes))).all())


def _not_finite(key: str, tensors: Mapping[str, torch.Tensor]) -> str | None:
    tensor = tensors[key].float()
    nans, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nans:
        return f"has NaN in {nans:,} of {tensor.numel():,} entries"
    # A module trained whole may have a mask of -inf among its tensors.
    if infinite and _leaf(key) is not None:
        return f"has infinity in {infinite:,} of {tensor.numel():,} entries"
    return None


def _part(tensor: torch.Tensor) -> str | None:
    if hasattr(tensor, "full_tensor"):
        return f"is sharded over processes, {tuple(tensor.shape)} in all (a DTensor)"
    if tensor.is_meta:
        return "is on the meta device"
    return None


def _flat(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for key, tensor in tensors.items():
        if tensor.dim() >= 2 and tensor.numel():
            continue
        leaf = _leaf(key)
        # A layer whose ranks all went to others has factors of the shapes (0, in) and (out, 0).
        if tensor.numel() == 0 and (leaf is None or tensor.dim() < 2):
            yield f"'{key}' is empty, of the shape {tuple(tensor.shape)}"
        elif leaf in (*A_LEAVES, *B_LEAVES) and tensor.dim() < 2:
            yield f"'{key}' is a flat piece, of the shape {tuple(tensor.shape)}"


def _leaf(key: str) -> str | None:
    return split_key(key)[1]


def _some(faults: Sequence[str]) -> list[str]:
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return [*faults[:_SHOWN], *more]
