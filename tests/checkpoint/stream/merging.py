"""Bases and adapters on disk, merged in both ways."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lamina import LoraConfig, get_peft_model
from lamina.stages.merged import MergeReport, save_merged
from tests import adapters


def saved(
    base: Any,
    directory: Path,
    config: LoraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    adapt: Callable[[Any], Any] | None = None,
    loader: Any = None,
) -> Path:
    """`base` and `adapter` in a directory; the adapter is filled with noise."""
    size = 12_000 if shards else "50GB"
    base.to(dtype).save_pretrained(directory / "base", max_shard_size=size)
    loader = loader or type(base)
    again = loader.from_pretrained(directory / "base", dtype=dtype)
    if adapt is not None:
        adapt(again)
    model = get_peft_model(again, config)
    adapters.fill(model)
    model.save_pretrained(directory / "adapter")
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of a model's directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return found


def differing(one: Path, other: Path) -> list[str]:
    """Names of weights that aren't the same bit for bit, in dtype and shape."""
    ours, theirs = tensors_of(one), tensors_of(other)
    wrong = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            wrong.append(name)
    return wrong


def hashes(directory: Path) -> dict[str, tuple[str, int]]:
    """name -> (SHA-256, time of last change) of all files."""
    return {
        str(file.relative_to(directory)): (
            hashlib.sha256(file.read_bytes()).hexdigest(),
            file.stat().st_mtime_ns,
        )
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def merged_both_ways(directory: Path, **options: Any) -> tuple[MergeReport, MergeReport]:
    """`streamed` and `whole` in the directory, and the reports of both."""
    given = {"base": str(directory / "base"), "verify": "samples", **options}
    streamed = save_merged(directory / "adapter", directory / "streamed", streaming=True, **given)
    given.pop("verify")
    whole = save_merged(
        directory / "adapter", directory / "whole", streaming=False, verify="none", **given
    )
    return streamed, whole
