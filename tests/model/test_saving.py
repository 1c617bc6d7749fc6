from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lamina.config import LoraConfig, PeftConfig
from lamina.errors import AdapterNameError, CheckpointError
from lamina.model import PeftModel, get_peft_model, get_peft_model_state_dict
from tests import models
from tests.adapters import WEIGHTS, fill, llama_adapter, llama_config, logits, same, weights

CONFIG = "adapter_config.json"


def three_adapters() -> PeftModel:
    model = llama_adapter(seed=1)
    for seed, name in enumerate(("sft", "sft2"), start=2):
        model.add_adapter(name, llama_config(r=seed))
        fill(model, name, seed=seed)
    return model


def files(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_default_lies_at_the_root_and_others_in_folders(tmp_path: Path) -> None:
    model = three_adapters()
    model.save_pretrained(tmp_path / "out")
    assert files(tmp_path / "out") == {
        f"{folder}{name}" for folder in ("", "sft/", "sft2/") for name in (CONFIG, WEIGHTS)
    }
    for name, folder in {"default": ".", "sft": "sft", "sft2": "sft2"}.items():
        saved = load_file(tmp_path / "out" / folder / WEIGHTS)
        own = get_peft_model_state_dict(model, adapter_name=name)
        assert saved.keys() == own.keys()
        assert all(torch.equal(saved[key], own[key]) for key in own)
        assert not any(name in key.split(".") for key in saved)


def test_only_what_is_selected_is_written(tmp_path: Path) -> None:
    model = three_adapters()
    model.save_pretrained(tmp_path / "out", selected_adapters=["sft"])
    assert files(tmp_path / "out") == {f"sft/{CONFIG}", f"sft/{WEIGHTS}"}
    model.save_pretrained(tmp_path / "root", selected_adapters=["default"])
    assert files(tmp_path / "root") == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("unknown", ["sf", "sft3", "s"])
def test_names_are_compared_whole(tmp_path: Path, unknown: str) -> None:
    with pytest.raises(AdapterNameError, match=repr(unknown)):
        three_adapters().save_pretrained(tmp_path / "out", selected_adapters=["default", unknown])
    assert not (tmp_path / "out").exists()


def test_no_pickle_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors only"):
        llama_adapter().save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    llama_adapter().save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_the_config_on_disk(tmp_path: Path) -> None:
    base = models.tiny_llama()
    base.name_or_path = "someone/tiny"
    model = get_peft_model(base, llama_config(rank_pattern={"v_proj": 2}, lora_alpha=16))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["peft_type"] == "LORA"
    assert written["task_type"] == "CAUSAL_LM"
    assert written["base_model_name_or_path"] == "someone/tiny"
    assert written["inference_mode"] is True
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["rank_pattern"] == {"v_proj": 2}
    assert model.peft_config["default"].inference_mode is False
    read = PeftConfig.from_pretrained(tmp_path)
    read.inference_mode, read.peft_version = False, None
    assert read == model.peft_config["default"]


def test_all_linear_is_written_as_names(tmp_path: Path) -> None:
    model = llama_adapter(target_modules="all-linear")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert model.peft_config["default"].target_modules == "all-linear"
    loaded = PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_saving_again_replaces_the_adapter_and_keeps_the_neighbours(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    llama_adapter(seed=1).save_pretrained(tmp_path / "out")
    second = llama_adapter(seed=2)
    second.save_pretrained(tmp_path / "out")
    assert files(tmp_path / "out") == {CONFIG, WEIGHTS, "tokenizer.json"}
    loaded = PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(second))


def test_saving_touches_nothing_in_the_model(tmp_path: Path) -> None:
    model = three_adapters()
    model.set_adapter(["sft", "sft2"], train=["sft2"])
    before, config = weights(model), copy.deepcopy(model.peft_config)
    model.save_pretrained(tmp_path)
    assert same(weights(model), before)
    assert model.peft_config == config
    assert model.active_adapters == ["sft", "sft2"]


def test_what_is_written_does_not_depend_on_what_is_active_or_folded(tmp_path: Path) -> None:
    model = three_adapters()
    model.save_pretrained(tmp_path / "plain")
    model.set_adapter("sft")
    model.merge_adapter()
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    model.save_pretrained(tmp_path / "folded")
    for name in files(tmp_path / "plain"):
        expected = (tmp_path / "plain" / name).read_bytes()
        assert (tmp_path / "folded" / name).read_bytes() == expected
        assert (tmp_path / "disabled" / name).read_bytes() == expected


def wrapped(prefix: str) -> Any:
    return lambda state: {prefix + key: tensor for key, tensor in state.items()}


def fsdp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace("layers.", "layers._fsdp_wrapped_module.", 1): tensor
        for key, tensor in state.items()
    }


@pytest.mark.parametrize(
    "gather",
    [
        lambda state: state,
        wrapped("module."),
        wrapped("_orig_mod."),
        wrapped("_fsdp_wrapped_module."),
        wrapped("module._orig_mod."),
        fsdp,
        lambda state: {
            key.removeprefix("base_model.model."): tensor for key, tensor in state.items()
        },
    ],
    ids=["plain", "ddp", "compiled", "fsdp-root", "ddp-compiled", "fsdp-layers", "inner"],
)
def test_a_gathered_state_dict_is_what_is_saved(tmp_path: Path, gather: Any) -> None:
    model = llama_adapter(seed=1)
    elsewhere = {key: tensor.clone() for key, tensor in llama_adapter(seed=2).state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gather(elsewhere))
    saved = load_file(tmp_path / WEIGHTS)
    expected = get_peft_model_state_dict(llama_adapter(seed=2))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_a_gathered_state_dict_with_holes_is_refused(tmp_path: Path) -> None:
    model = llama_adapter()
    state = {key: value for key, value in model.state_dict().items() if "layers.1" not in key}
    with pytest.raises(CheckpointError, match="lacks 4 of the 8 tensors of 'default'"):
        model.save_pretrained(tmp_path / "out", state_dict=state)
    assert not (tmp_path / "out").exists()


def test_a_state_dict_is_read_by_whole_names(tmp_path: Path) -> None:
    model = three_adapters()
    model.save_pretrained(tmp_path, selected_adapters=["sft"], state_dict=model.state_dict())
    saved = load_file(tmp_path / "sft" / WEIGHTS)
    own = get_peft_model_state_dict(model, adapter_name="sft")
    assert all(torch.equal(saved[key], own[key]) for key in own)


def test_a_state_dict_with_heads_and_biases_of_several_adapters(tmp_path: Path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_bias=True)
    model = get_peft_model(models.tiny_bert_classifier(), config, "default")
    model.add_adapter("other", config)
    fill(model, "default", seed=1)
    fill(model, "other", seed=2)
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for name in ("default", "other"):
        folder = "." if name == "default" else name
        own = load_file(tmp_path / "own" / folder / WEIGHTS)
        given = load_file(tmp_path / "given" / folder / WEIGHTS)
        assert "base_model.model.classifier.weight" in own
        assert same(own, given)


def test_a_compiled_model_saves_and_loads_by_plain_names(tmp_path: Path) -> None:
    model = llama_adapter()
    expected = load_keys(model)
    compiled: Any = torch.compile(model, backend="eager")
    compiled.save_pretrained(tmp_path / "outer")
    assert set(load_file(tmp_path / "outer" / WEIGHTS)) == expected
    assert set(get_peft_model_state_dict(compiled)) == expected

    inside = models.tiny_llama()
    inside.model = torch.compile(inside.model, backend="eager")
    inner = get_peft_model(inside, llama_config())
    fill(inner, seed=1)
    inner.save_pretrained(tmp_path / "inner")
    assert set(load_file(tmp_path / "inner" / WEIGHTS)) == expected
    written = json.loads((tmp_path / "inner" / CONFIG).read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"]

    loaded = PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "inner")
    assert torch.equal(logits(loaded), logits(model))
    target = models.tiny_llama()
    target.model = torch.compile(target.model, backend="eager")
    again = PeftModel.from_pretrained(target, tmp_path / "outer")
    assert again.get_layer_status()
    report = again.load_adapter(tmp_path / "outer", "second")
    assert report.complete


def load_keys(model: PeftModel) -> set[str]:
    return set(get_peft_model_state_dict(model))


def test_a_data_parallel_wrapper_leaves_no_trace(tmp_path: Path) -> None:
    model = llama_adapter()
    parallel = nn.DataParallel(model)
    assert set(get_peft_model_state_dict(parallel)) == load_keys(model)
    parallel.module.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == load_keys(model)


def test_weights_that_are_not_there_yet_are_not_saved(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config(), low_cpu_mem_usage=True)
    with pytest.raises(CheckpointError, match="meta device"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_dtype_on_disk_is_the_dtype_in_memory(
    tmp_path: Path, autocast: bool, dtype: torch.dtype
) -> None:
    model = get_peft_model(
        models.tiny_llama().bfloat16(), llama_config(), autocast_adapter_dtype=autocast
    )
    fill(model)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    loaded = PeftModel.from_pretrained(
        models.tiny_llama().bfloat16(), tmp_path, autocast_adapter_dtype=autocast
    )
    assert torch.equal(logits(loaded), logits(model.eval()))
