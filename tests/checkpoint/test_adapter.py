"""The two files of an adapter: written whole, read without trust."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lamina.checkpoint.adapter import WEIGHTS_NAME, read_adapter, write_adapter
from lamina.config import LoraConfig
from lamina.errors import CheckpointError, ConfigError, MissingFileError

CONFIG = LoraConfig(r=2, target_modules=["q_proj"])


def write(directory: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    write_adapter(directory, CONFIG, tensors, metadata)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(2).bfloat16(),
        "c": torch.randn(()).half(),
        "d.lora_A.weight": torch.zeros(0, 5),
        "e": torch.arange(4),
    }
    write(tmp_path / "x" / "y", tensors, lamina="{}", note="mine")
    file = read_adapter(tmp_path / "x" / "y")
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.tensors[name].dtype == tensor.dtype
        assert torch.equal(file.tensors[name], tensor)
    assert file.metadata == {"format": "pt", "lamina": "{}", "note": "mine"}
    assert file.config.to_dict() == CONFIG.to_dict()
    assert file.source == str(tmp_path / "x" / "y")


def test_a_config_may_be_given(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(1)})
    other = LoraConfig(r=7)
    assert read_adapter(tmp_path, config=other).config is other


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": whole.T,
        "columns": whole[:, 2:4],
        "rows": whole[1:3],
        "strided": whole[::2],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    write(tmp_path, tensors)
    stored = load_file(tmp_path / WEIGHTS_NAME)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    # A slice must not drag its whole storage along.
    assert (tmp_path / WEIGHTS_NAME).stat().st_size < 1000


def test_tensors_may_share_their_memory(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    tied = torch.nn.Parameter(torch.randn(2, 3))
    tensors = {
        "first": whole,
        "again": whole,
        "half": whole[:3],
        "reshaped": whole.view(2, 3),
        "tied.weight": tied,
        "head.weight": tied,
    }
    write(tmp_path, tensors)
    stored = load_file(tmp_path / WEIGHTS_NAME)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_writing_leaves_the_tensors_alone(tmp_path: Path) -> None:
    tensor = torch.nn.Parameter(torch.randn(4, 3).T)
    write(tmp_path, {"a": tensor})
    assert tensor.requires_grad
    assert tensor.stride() == (1, 3)


def test_nothing_on_meta_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="meta device"):
        write(tmp_path, {"a": torch.empty(2, device="meta")})
    assert not (tmp_path / WEIGHTS_NAME).exists()


def stored(tmp_path: Path) -> Path:
    write(tmp_path, {"a": torch.randn(30, 4)})
    return tmp_path / WEIGHTS_NAME


@pytest.mark.parametrize("size", [0, 4, 8, 60, 300])
def test_a_file_that_was_cut_off(tmp_path: Path, size: int) -> None:
    weights = stored(tmp_path)
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors is (not a safetensors file|cut off)"
    ) as caught:
        read_adapter(tmp_path)
    assert "download or save the file again" in str(caught.value)


@pytest.mark.parametrize("content", [b"not weights at all, but text", b"\xff" * 64, b"\0" * 64])
def test_a_file_of_something_else(tmp_path: Path, content: bytes) -> None:
    stored(tmp_path).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_adapter(tmp_path)


def test_a_pickle_under_the_name_of_safetensors(tmp_path: Path) -> None:
    weights = stored(tmp_path)
    torch.save({"a": torch.ones(1)}, weights)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_adapter(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_adapter(tmp_path / "nowhere")
    stored(tmp_path).unlink()
    with pytest.raises(MissingFileError):
        read_adapter(tmp_path)
    stored(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(MissingFileError):
        read_adapter(tmp_path)


def test_a_config_that_is_none(tmp_path: Path) -> None:
    stored(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_adapter(tmp_path)


# --- pickles ---------------------------------------------------------------------------------


def pickled(tmp_path: Path, content: Any) -> Path:
    stored(tmp_path).unlink()
    torch.save(content, tmp_path / "adapter_model.bin")
    return tmp_path


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_a_pickle_is_read_only_when_asked_for(tmp_path: Path) -> None:
    path = pickled(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        read_adapter(path)
    file = read_adapter(path, allow_pickle=True)
    assert torch.equal(file.tensors["a"], torch.ones(2))
    assert file.metadata == {}


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = pickled(tmp_path, {"a": Bomb(mark)})
    with pytest.raises(CheckpointError, match="can't be read as weights"):
        read_adapter(path, allow_pickle=True)
    assert not mark.exists()
    # The bomb is live: an ordinary unpickler sets it off.
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.ones(2), {"a": {"b": torch.ones(1)}}])
def test_a_pickle_of_something_else(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match="something other than named tensors"):
        read_adapter(pickled(tmp_path, content), allow_pickle=True)


def test_safetensors_are_taken_before_a_pickle(tmp_path: Path) -> None:
    pickled(tmp_path, {"a": torch.ones(2)})
    write(tmp_path, {"a": torch.zeros(2)})
    assert torch.equal(read_adapter(tmp_path, allow_pickle=True).tensors["a"], torch.zeros(2))


def test_shards(tmp_path: Path) -> None:
    stored(tmp_path).unlink()
    names = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, key in zip(names, "ab", strict=True):
        save_file({key: torch.full((2,), ord(key))}, tmp_path / name, metadata={key: "here"})
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    file = read_adapter(tmp_path)
    assert {key: int(tensor[0]) for key, tensor in file.tensors.items()} == {"a": 97, "b": 98}
    assert file.metadata == {"a": "here", "b": "here"}


def test_the_header_says_the_format(tmp_path: Path) -> None:
    with safe_open(stored(tmp_path), framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def sharded(tmp_path: Path, weight_map: dict[str, int], *files: dict[str, float]) -> Path:
    stored(tmp_path).unlink()
    names = [f"adapter_model-{n}.safetensors" for n in range(len(files))]
    for name, values in zip(names, files, strict=True):
        save_file({key: torch.full((2,), value) for key, value in values.items()}, tmp_path / name)
    index = {"weight_map": {key: names[number] for key, number in weight_map.items()}}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path, {"a": 0, "b": 1}, {"a": 1.0}, {"a": 2.0, "b": 3.0})
    with pytest.raises(CheckpointError, match=r"'a' is in 'adapter_model-0\.safetensors' and in"):
        read_adapter(path)


def test_an_index_that_knows_other_tensors_than_its_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path, {"a": 0, "c": 1, "b": 0}, {"a": 1.0, "x": 2.0}, {"b": 3.0})
    with pytest.raises(CheckpointError, match="contradict each other or their index") as caught:
        read_adapter(path)
    assert caught.value.faults == (
        "'c' is to be in 'adapter_model-1.safetensors', and isn't",
        "'b' is to be in 'adapter_model-0.safetensors', and isn't",
        "'x' is in 'adapter_model-0.safetensors', not in the index",
    )
