"""The digest of an adapter's tensors: of bytes, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lamina.checkpoint.digest import files_digest, tensors_digest


def some() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randn(4, 2, generator=generator).bfloat16(),
        "c": torch.tensor(2.5),
        "d": torch.zeros(0, 3),
        "e": torch.randn(6, 4, generator=generator).to(torch.float8_e4m3fn),
        "f": torch.arange(7),
    }


def test_it_is_sha256_of_names_dtypes_shapes_and_bytes() -> None:
    tensors = {"x": torch.tensor([[1.0, -2.0]]), "w": torch.tensor([3], dtype=torch.int16)}
    expected = hashlib.sha256(
        b"w\0I16\x001\0" + b"\x03\x00" + b"x\0F32\x001x2\0" + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    )
    assert tensors_digest(tensors) == expected.hexdigest()


def test_files_have_that_of_the_tensors_in_them(tmp_path: Path) -> None:
    tensors = some()
    save_file(tensors, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    assert files_digest([tmp_path / "whole.safetensors"]) == tensors_digest(tensors)
    names = sorted(tensors)
    for index, shard in enumerate((names[1::2], names[::2])):
        save_file({name: tensors[name] for name in shard}, tmp_path / f"{index}.safetensors")
    shards = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    assert files_digest(shards) == tensors_digest(tensors)
    assert files_digest(shards[:1]) != tensors_digest(tensors)


def test_how_a_tensor_lies_in_memory_does_not_count() -> None:
    tensors = some()
    turned = {**tensors, "b": tensors["b"].T.contiguous().T}
    assert not turned["b"].is_contiguous()
    assert tensors_digest(dict(reversed(turned.items()))) == tensors_digest(tensors)


@pytest.mark.parametrize("what", ["bit", "name", "dtype", "shape", "gone"])
def test_every_change_is_seen(what: str) -> None:
    tensors, changed = some(), some()
    if what == "bit":
        changed["b"].view(torch.int32)[1, 1] ^= 1
    elif what == "name":
        changed["g"] = changed.pop("f")
    elif what == "dtype":
        changed["f"] = changed["f"].view(torch.float64)
    elif what == "shape":
        changed["b"] = changed["b"].reshape(5, 3)
    else:
        del changed["c"]
    assert tensors_digest(changed) != tensors_digest(tensors)
