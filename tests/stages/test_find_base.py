"""The base that a stage is loaded on: found by what is on record, compared with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamina.config import LoraConfig
from lamina.errors import (
    CheckpointError,
    ConfigError,
    LaminaError,
    MissingFileError,
    StageError,
)
from lamina.stages import begin_stage, load, save_stage
from lamina.stages.merged import save_merged
from tests import models
from tests.stages.chains import (
    answer,
    distance,
    fill_trainable,
    llama_lora,
    rewrite_record,
    run_stage,
)


def without_sketch(path: Path) -> None:
    """As stages were recorded before bases were known by their weights."""
    rewrite_record(path, lambda record: record["stages"][-1]["base"].pop("sketch"))


def test_the_base_is_found_by_its_recorded_name(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    base = type(models.tiny_llama()).from_pretrained(tmp_path / "base").eval()
    model = begin_stage(base, name="one", config=llama_lora()).eval()
    fill_trainable(model)
    save_stage(model, tmp_path / "one")
    assert distance(answer(load(tmp_path / "one")), answer(model)) < 1e-6
    moved = (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingFileError, match="no such directory") as caught:
        load(tmp_path / "one")
    assert "lamina.load(path, base=" in str(caught.value.cure)
    again = load(tmp_path / "one", str(moved))
    assert distance(answer(again), answer(model)) < 1e-6


def test_the_base_of_a_stage_without_a_task_is_found_by_its_class(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    base = type(models.tiny_llama()).from_pretrained(tmp_path / "base").eval()
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = begin_stage(base, name="one", config=config).eval()
    fill_trainable(model)
    save_stage(model, tmp_path / "one")
    again = load(tmp_path / "one")
    assert type(again.get_base_model()).__name__ == "LlamaForCausalLM"
    assert distance(answer(again), answer(model)) < 1e-6


def test_the_base_from_the_cache_of_the_hub_is_the_same(tmp_path: Path) -> None:
    cached = "/root/hub/models--someone--tiny/snapshots/0123456789abcdef"
    for began, opened in (("someone/tiny", cached), (cached, "someone/tiny"), (cached, ".")):
        bases = [models.tiny_llama(), models.tiny_llama()]
        bases[0].name_or_path, bases[1].name_or_path = began, opened
        model = begin_stage(bases[0], name="one", config=llama_lora())
        fill_trainable(model)
        save_stage(model, tmp_path / "one")
        without_sketch(tmp_path / "one")
        load(tmp_path / "one", bases[1])
    other = models.tiny_llama()
    other.name_or_path = cached.replace("tiny", "other")
    with pytest.raises(StageError, match="other"):
        load(tmp_path / "one", other)


def test_options_for_a_base_that_is_loaded_already(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    with pytest.raises(StageError, match="is_trainable=True") as caught:
        load(tmp_path / "one", models.tiny_llama(), dtype="auto", is_trainable=True)
    assert len(caught.value.faults) == 2


def test_the_recorded_revision_is_not_asked_of_another_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", revision="v2")
    model = begin_stage(models.tiny_llama(), name="domain", config=config)
    fill_trainable(model, seed=1)
    save_stage(model, tmp_path / "domain")
    asked: list[tuple[str, str | None]] = []

    def from_pretrained(name: str, *, revision: str | None = None, **options: Any) -> object:
        asked.append((name, revision))
        return models.tiny_llama()

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    load(tmp_path / "domain", "someone/other")
    assert asked == [("someone/other", None)]


@pytest.mark.parametrize("kind", ["utils", "TrainingArguments", "pipeline", "__loader__", 7, {}])
def test_a_file_opens_no_class_but_that_of_a_model(tmp_path: Path, kind: object) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    model = begin_stage(models.tiny_llama(), name="one", config=config)
    save_stage(model, tmp_path / "one")
    path = tmp_path / "one" / "adapter_config.json"
    mapping = {"base_model_class": kind, "parent_library": "transformers.models"}
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "auto_mapping": mapping}))
    with pytest.raises(ConfigError, match="transformers has no such model"):
        load(tmp_path / "one", str(tmp_path))


def test_a_base_of_strange_settings_is_an_error_of_ours(tmp_path: Path) -> None:
    model = begin_stage(
        models.tiny_llama(),
        name="one",
        config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    save_stage(model, tmp_path / "one")
    models.tiny_llama().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    values = json.loads(path.read_text())
    for change in ({"hidden_act": ""}, {"intermediate_size": []}, {"architectures": [None, 1]}):
        path.write_text(json.dumps({**values, **change}))
        if "architectures" not in change:
            with pytest.raises(CheckpointError, match="can't be opened"):
                load(tmp_path / "one", str(tmp_path / "base"))
        with pytest.raises(LaminaError):
            save_merged(
                tmp_path / "one", tmp_path / "out", base=str(tmp_path / "base"), streaming=True
            )
    assert not (tmp_path / "out").exists()
