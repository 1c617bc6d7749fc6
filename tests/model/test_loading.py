from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamina.config import LoraConfig
from lamina.errors import (
    AlreadyAdaptedError,
    CheckpointError,
    ConfigError,
    MissingFileError,
)
from lamina.model import PeftModel, PeftModelForSequenceClassification, get_peft_model
from tests import models
from tests.adapters import (
    WEIGHTS,
    fill,
    flags,
    llama_adapter,
    llama_config,
    logits,
    renamed,
    rewrite,
    same,
    trained,
    weights,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama_adapter().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(path: Path, **options: object) -> PeftModel:
    return PeftModel.from_pretrained(models.tiny_llama(), path, **options)  # type: ignore[arg-type]


def test_what_was_saved_comes_back_frozen(saved: Path) -> None:
    model = load(saved)
    assert torch.equal(logits(model), logits(llama_adapter()))
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert trained(model) == set()
    assert model.peft_config["default"].inference_mode is True
    assert not model.training


def test_or_trainable_when_asked(saved: Path) -> None:
    model = load(saved, is_trainable=True, adapter_name="sft")
    assert trained(model) == {
        f"base_model.model.model.layers.{i}.self_attn.{proj}.lora_{factor}.sft.weight"
        for i in (0, 1)
        for proj in ("q_proj", "v_proj")
        for factor in "AB"
    }
    assert model.peft_config["sft"].inference_mode is False


def test_a_folder_of_an_adapter_can_be_opened(tmp_path: Path) -> None:
    model = llama_adapter()
    model.add_adapter("sft", llama_config(r=2))
    fill(model, "sft", seed=5)
    model.set_adapter("sft")
    model.save_pretrained(tmp_path)
    for path, options in ((tmp_path / "sft", {}), (tmp_path, {"subfolder": "sft"})):
        assert torch.equal(logits(load(path, **options)), logits(model))


def test_a_second_adapter_waits_until_it_is_activated(saved: Path) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config(target_modules=["o_proj"])).eval()
    fill(model, seed=8)
    before, asked = logits(model), trained(model)
    report = model.load_adapter(saved, "second")
    assert report.complete
    assert torch.equal(logits(model), before)
    assert trained(model) == asked
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(llama_adapter()))
    assert trained(model) == set()
    model.load_adapter(saved, "third", is_trainable=True)
    model.set_adapter(["second", "third"])
    assert {name.split(".")[-2] for name in trained(model)} == {"third"}


def test_loading_over_an_adapter_replaces_its_weights_and_nothing_else(saved: Path) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config()).eval()
    fill(model, seed=8)
    asked = trained(model)
    report = model.load_adapter(saved, "default")
    assert report.complete
    assert torch.equal(logits(model), logits(llama_adapter()))
    assert trained(model) == asked


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lora_alpha": 16}, "lora_alpha: 8 in .*saved, 16 in the model"),
        ({"use_rslora": True}, "use_rslora: False in .*saved, True in the model"),
        ({"alpha_pattern": {"q_proj": 4}}, r"alpha_pattern: {} in .*saved, {'q_proj': 4} in"),
    ],
)
def test_weights_of_another_config_are_kept_out_of_an_adapter(
    saved: Path, change: dict[str, Any], told: str
) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config(**change))
    before = weights(model)
    with pytest.raises(ConfigError, match=told):
        model.load_adapter(saved, "default")
    assert same(weights(model), before)


def test_an_adapted_model_is_refused(saved: Path) -> None:
    with pytest.raises(AlreadyAdaptedError, match="'default'"):
        PeftModel.from_pretrained(load(saved).get_base_model(), saved)


def test_a_config_can_be_given(saved: Path) -> None:
    config = llama_config(lora_alpha=16)
    model = load(saved, config=config)
    assert config == llama_config(lora_alpha=16)
    louder = llama_adapter(lora_alpha=16)
    assert torch.equal(logits(model), logits(louder))


def test_options_that_are_not_known_are_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="'is_trainabel'"):
        load(saved, is_trainabel=True)
    model = load(saved, low_cpu_mem_usage=True, torch_device="cpu", autocast_adapter_dtype=True)
    assert torch.equal(logits(model), logits(llama_adapter()))


def test_files_that_are_not_there(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(MissingFileError):
        load(tmp_path)
    (saved / WEIGHTS).unlink()
    base = models.tiny_llama()
    before = flags(base)
    with pytest.raises(MissingFileError):
        PeftModel.from_pretrained(base, saved)
    assert flags(base) == before


def test_a_damaged_file_is_refused(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut off"):
        load(saved)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "module."),
        ("", "_orig_mod."),
        ("", "_fsdp_wrapped_module."),
        ("", "module._orig_mod."),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "base_model.model._fsdp_wrapped_module."),
        ("base_model.model.model.", "base_model.model.model._checkpoint_wrapped_module."),
        ("base_model.model.", ""),
    ],
)
def test_wrappers_in_the_names_do_not_matter(saved: Path, old: str, new: str) -> None:
    renamed(saved, old, new)
    assert torch.equal(logits(load(saved)), logits(llama_adapter()))


def test_adapter_names_in_the_names_do_not_matter(saved: Path) -> None:
    rewrite(
        saved,
        lambda file: {
            key.replace(".weight", ".whatever.weight"): value for key, value in file.items()
        },
    )
    assert torch.equal(logits(load(saved)), logits(llama_adapter()))


def test_shards_are_read_by_their_index(saved: Path) -> None:
    import json

    file = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    index = {}
    for number, keys in enumerate((list(file)[:3], list(file)[3:]), start=1):
        name = f"adapter_model-0000{number}-of-00002.safetensors"
        save_file({key: file[key] for key in keys}, saved / name)
        index |= dict.fromkeys(keys, name)
    (saved / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(logits(load(saved)), logits(llama_adapter()))
    (saved / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError, match="00002-of-00002"):
        load(saved)


def test_a_pickle_is_read_only_when_asked(saved: Path) -> None:
    file = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    torch.save(file, saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load(saved)
    assert torch.equal(logits(load(saved, allow_pickle=True)), logits(llama_adapter()))


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_cannot_run_code(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    (saved / WEIGHTS).unlink()
    torch.save({"x": Harmful()}, saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="can't be read as weights"):
        load(saved, allow_pickle=True)
    assert not (saved / "harmed").exists()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_come_back(tmp_path: Path, bias: str) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], bias=bias)
    model = get_peft_model(models.tiny_bert_classifier(), config).eval()
    fill(model)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / WEIGHTS)
    assert ("base_model.model.bert.pooler.dense.bias" in file) == (bias == "all")
    loaded = PeftModel.from_pretrained(models.tiny_bert_classifier(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(models.tiny_bert_classifier()))
    base_weights = weights(models.tiny_bert_classifier())
    assert same(weights(loaded.unload()), base_weights)


@pytest.mark.parametrize("biases", [("all", "lora_only"), ("lora_only", "all"), ("all", "none")])
def test_adapters_with_different_biases_are_saved_apart(
    tmp_path: Path, biases: tuple[str, str]
) -> None:
    model = None
    for seed, (name, bias) in enumerate(zip(("one", "two"), biases, strict=True)):
        config = LoraConfig(target_modules=[["query", "value"][seed]], bias=bias)
        if model is None:
            model = get_peft_model(models.tiny_bert_classifier(), config, name).eval()
        else:
            model.add_adapter(name, config)
        fill(model, name, seed=seed)
    assert model is not None
    model.save_pretrained(tmp_path)
    for name in ("one", "two"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(models.tiny_bert_classifier(), tmp_path / name)
        assert torch.equal(logits(loaded), logits(model))


def test_heads_come_back(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny_bert_classifier(), LoraConfig(task_type="SEQ_CLS")).eval()
    fill(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.tiny_bert_classifier(seed=0), tmp_path)
    assert type(loaded) is PeftModelForSequenceClassification
    assert torch.equal(logits(loaded), logits(model))
    retrained = PeftModel.from_pretrained(
        models.tiny_bert_classifier(), tmp_path, is_trainable=True
    )
    assert "base_model.model.classifier.modules_to_save.default.weight" in trained(retrained)


def test_modules_to_save_come_back(tmp_path: Path) -> None:
    model = llama_adapter(modules_to_save=["lm_head", "norm"])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(models.tiny_llama()))


def test_a_half_precision_base_gets_fp32_adapters_unless_asked_otherwise(saved: Path) -> None:
    base = models.tiny_llama().bfloat16()
    model = PeftModel.from_pretrained(base, saved)
    factors = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert factors == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    lower = PeftModel.from_pretrained(
        models.tiny_llama().bfloat16(), saved, autocast_adapter_dtype=False
    )
    assert {p.dtype for n, p in lower.named_parameters() if "lora_" in n} == {torch.bfloat16}
    torch.testing.assert_close(logits(lower), logits(model), rtol=0.05, atol=0.05)


def test_a_good_load_says_nothing(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(saved)
