"""Other strings in a safetensors header; the tensors stay what they are, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lamina.checkpoint import rewrite
from lamina.checkpoint.rewrite import rewrite_strings
from lamina.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.zeros(2, dtype=torch.float8_e4m3fn),
    "d": torch.tensor([True]),
    "e": torch.empty(0, 4),
}


@pytest.mark.parametrize("text", ["", "x", "a longer string, with ü and 日本", "y" * 5000])
def test_only_the_strings_change(tmp_path: Path, text: str) -> None:
    save_file(TENSORS, tmp_path / "old", metadata={"format": "pt", "k": "v"})
    rewrite_strings(tmp_path / "old", tmp_path / "new", {"format": "pt", "k": text})
    with safe_open(tmp_path / "new", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "k": text}
    new = load_file(tmp_path / "new")
    assert new.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert new[key].dtype == tensor.dtype
        assert torch.equal(new[key].view(torch.uint8), tensor.view(torch.uint8))
    content = (tmp_path / "new").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_a_copy_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "old")

    def flip(old: object, new: object) -> None:
        content = bytearray(old.read())  # type: ignore[attr-defined]
        content[0] ^= 1
        new.write(content)  # type: ignore[attr-defined]

    monkeypatch.setattr(rewrite.shutil, "copyfileobj", flip)
    with pytest.raises(CheckpointError, match="differs from it"):
        rewrite_strings(tmp_path / "old", tmp_path / "new", {})
