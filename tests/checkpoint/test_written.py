"""A save refuses tensors that are not whole or not numbers, and re-opens what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.device_mesh import init_device_mesh

from lamina.checkpoint import adapter as adapter_module
from lamina.checkpoint.adapter import WEIGHTS_NAME, write_adapter
from lamina.checkpoint.written import check_whole, check_written
from lamina.config import LoraConfig
from lamina.errors import CheckpointError
from lamina.model import PeftModel, get_peft_model
from lamina.stages import begin_stage, save_stage
from tests import models
from tests.stages.chains import llama_lora

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG = LoraConfig(r=2, target_modules=["q_proj"])
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
    torch.bool,
]


def of_every_dtype() -> dict[str, Tensor]:
    tensors = {f"{dtype}": (torch.arange(15).view(3, 5) % 2).to(dtype) for dtype in DTYPES}
    return {**tensors, "x.lora_A": torch.zeros(0, 7), "scalar": torch.tensor(3.0)}


def test_a_file_as_it_was_written_passes(tmp_path: Path) -> None:
    path, tensors = tmp_path / "file.safetensors", of_every_dtype()
    save_file(tensors, path, metadata={"note": "mine"})
    check_written(path, tensors, {"note": "mine"})
    save_file({}, path, metadata={"note": "mine"})
    check_written(path, {}, {"note": "mine"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_changed_entry_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    path, tensors = tmp_path / "file.safetensors", of_every_dtype()
    save_file(tensors, path, metadata={"note": "mine"})
    changed = tensors[str(dtype)].float()
    changed[1, 2] = 1 - changed[1, 2]
    memory = {**tensors, str(dtype): changed.to(dtype)}
    with pytest.raises(CheckpointError, match=f"'{dtype}' differs") as caught:
        check_written(path, memory, {"note": "mine"})
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {**t, "b": torch.zeros(4)}, "'b' differs"),
        (lambda t: {**t, "b": torch.zeros(2, dtype=torch.int32)}, "'b' differs"),
        (lambda t: {**t, "c": torch.zeros(2)}, "'c' differs"),
        (lambda t: {"a": t["a"]}, "'b' differs"),
    ],
)
def test_another_shape_dtype_or_set_of_names_is_found(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(2)}
    path = tmp_path / "file.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=told):
        check_written(path, change(tensors), {})
    with pytest.raises(CheckpointError, match="strings of its header"):
        check_written(path, tensors, {"lamina": "{}"})


def test_a_disk_that_loses_a_bit_fails_the_save_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(models.tiny_llama(), llama_lora())
    model.save_pretrained(tmp_path / "run")
    before = (tmp_path / "run" / WEIGHTS_NAME).read_bytes()

    def lossy(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(adapter_module, "save_file", lossy)
    with pytest.raises(CheckpointError, match="was re-opened and differs"):
        model.save_pretrained(tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS_NAME).read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_numbers_are_not_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        KEY: torch.ones(2, 8, dtype=dtype),
        KEY.replace("_A", "_B"): torch.ones(8, 2, dtype=dtype),
        "score.weight": torch.ones(3, 8),
        "mask": torch.full((4,), float("-inf")),
        "ids": torch.arange(4),
    }
    write_adapter(tmp_path / "good", CONFIG, tensors)
    assert torch.equal(load_file(tmp_path / "good" / WEIGHTS_NAME)["mask"], tensors["mask"])
    tensors[KEY][0, 3] = float("inf")
    tensors["score.weight"][1, :2] = float("nan")
    with pytest.raises(CheckpointError, match="2 of the 5 tensors to save are not num") as caught:
        write_adapter(tmp_path / "bad", CONFIG, tensors)
    assert set(caught.value.faults) == {
        f"'{KEY}' has infinity in 1 of 16 entries",
        "'score.weight' has NaN in 2 of 24 entries",
    }


# Pieces of sharded models


def empty(tensor: Tensor) -> Tensor:
    """As ZeRO-3 leaves a parameter between its uses."""
    return torch.empty(0, dtype=tensor.dtype)


def flat(tensor: Tensor) -> Tensor:
    """As FSDP leaves one of which this rank has a piece."""
    return tensor.flatten()[: tensor.numel() // 2]


def stage() -> PeftModel:
    return begin_stage(models.tiny_llama(), name="sft", config=llama_lora())


def placed(model: nn.Module, change: Callable[[Tensor], Tensor], pattern: str) -> int:
    count = 0
    for name, parameter in model.named_parameters():
        if pattern in name and parameter.requires_grad:
            parameter.data = change(parameter.data)
            count += 1
    return count


@pytest.mark.parametrize("save", [save_stage, PeftModel.save_pretrained])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (empty, r"lora_A.weight' is empty, of the shape \(0,\)"),
        (flat, r"lora_A.weight' is a flat piece, of the shape \(64,\)"),
    ],
)
def test_placeholders_of_sharded_training_are_never_saved(
    tmp_path: Path,
    save: Callable[[PeftModel, Path], object],
    change: Callable[[Tensor], Tensor],
    told: str,
) -> None:
    model = stage()
    save(model, tmp_path / "run")
    before = (tmp_path / "run" / WEIGHTS_NAME).read_bytes()
    assert placed(model, change, "lora_A") == 4
    with pytest.raises(CheckpointError, match=told) as caught:
        save(model, tmp_path / "run")
    assert "4 of the 8 tensors to save are not whole" in caught.value.what
    assert len(caught.value.faults) == 4
    assert (tmp_path / "run" / WEIGHTS_NAME).read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("change", [empty, flat])
def test_placeholders_in_a_state_dict_are_never_saved(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    model = get_peft_model(models.tiny_llama(), llama_lora())
    gathered = model.state_dict()
    partly = {key: change(t) if "lora_B" in key else t for key, t in gathered.items()}
    with pytest.raises(CheckpointError, match="4 of the 8 tensors to save are not whole"):
        model.save_pretrained(tmp_path / "run", state_dict=partly)
    assert not (tmp_path / "run").exists()
    placed(model, empty, "lora_")
    model.save_pretrained(tmp_path / "run", state_dict=gathered)
    stored = load_file(tmp_path / "run" / WEIGHTS_NAME)
    assert len(stored) == 8
    assert all(torch.equal(t, gathered[_in_model(key)]) for key, t in stored.items())


def _in_model(key: str) -> str:
    return key.replace(".weight", ".default.weight")


def test_many_faults_are_counted_and_a_few_are_shown() -> None:
    with pytest.raises(CheckpointError, match="9 of the 9") as caught:
        check_whole({f"layers.{turn}.lora_A.weight": torch.empty(0) for turn in range(9)})
    assert caught.value.faults[-1] == "and 3 more"


def test_a_dtensor_is_named(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.ones(4, 8), mesh, [Shard(0)])
        assert isinstance(sharded, DTensor)
        with pytest.raises(CheckpointError, match=r"sharded over processes, \(4, 8\) in all"):
            check_whole({KEY: sharded})
        whole = distribute_tensor(torch.ones(4, 8), mesh, [Replicate()]).full_tensor()
        check_whole({KEY: whole})
    finally:
        torch.distributed.destroy_process_group()
