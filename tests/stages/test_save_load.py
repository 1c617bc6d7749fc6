"""What a stage's file holds, and what comes back out of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lamina.config import LoraConfig
from lamina.errors import StageError
from lamina.model import PeftModel, get_peft_model
from lamina.stages import begin_stage, lineage, load, save_stage
from tests import models
from tests.adapters import trained
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    answer,
    config_of,
    distance,
    fill_trainable,
    llama_lora,
    metadata_of,
    open_with_peft,
    own_factors,
    run_chain,
    run_stage,
    tensors_of,
    ulps,
)

FOUR: list[tuple[str, str | None, LoraConfig | None]] = [
    ("domain", None, llama_lora(target_modules="all-linear")),
    (
        "chat",
        "stack",
        llama_lora(r=6, lora_alpha=6, target_modules=["q_proj", "v_proj", "embed_tokens"]),
    ),
    ("polish", "continue", None),
    (
        "dpo",
        "merge",
        llama_lora(
            r=5,
            lora_alpha=7,
            use_rslora=True,
            target_modules=["o_proj", "v_proj"],
            rank_pattern={"1.self_attn.v_proj": 3},
        ),
    ),
]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    return run_chain(tmp_path_factory.mktemp("four"), FOUR)


def test_four_stages_in_mixed_modes(four: tuple[PeftModel, Path]) -> None:
    model, path = four
    expected = answer(model)
    assert distance(answer(load(path, models.tiny_llama())), expected) < 1e-6
    assert distance(answer(open_with_peft(path)), expected) < 1e-6
    record = lineage(path)
    assert [(s.name, s.mode) for s in record.stages] == [
        ("domain", "fresh"),
        ("chat", "stack"),
        ("polish", "continue"),
        ("dpo", "merge"),
    ]
    assert [lamina.stage for lamina in record.laminae] == ["domain", "polish", "dpo"]
    module = "model.layers.1.self_attn.v_proj"
    assert [lamina.ranks.get(module) for lamina in record.laminae] == [4, 6, 3]
    assert len(record.laminae[0].ranks) == 14
    assert record.laminae[1].ranks["model.embed_tokens"] == 6


def test_only_the_files_of_an_adapter_are_written(four: tuple[PeftModel, Path]) -> None:
    assert {file.name for file in four[1].iterdir()} == {CONFIG, WEIGHTS}


def test_the_scaling_is_one_number_and_r_the_largest_rank(four: tuple[PeftModel, Path]) -> None:
    config = config_of(four[1])
    assert config["r"] == 15
    assert config["use_rslora"] is False
    scaling = 7 / math.sqrt(5)
    assert config["lora_alpha"] / config["r"] == pytest.approx(scaling, rel=1e-14)
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    for name, rank in config["rank_pattern"].items():
        assert config["alpha_pattern"][name] / rank == pytest.approx(scaling, rel=1e-14)
        assert rank <= config["r"]


def test_the_record_of_a_stage(tmp_path: Path) -> None:
    base = models.tiny_llama()
    base.name_or_path = "someone/tiny"
    model = begin_stage(base.bfloat16(), name="domain", config=llama_lora())
    data = {"files": ["a.jsonl", "b.jsonl"], "rows": 12, "shuffled": True}
    metrics = {"loss": 1.5, "steps": 30, "f1": np.float32(0.25)}
    written = save_stage(model, tmp_path / "domain", metrics=metrics, data=data)
    record = lineage(tmp_path / "domain")
    assert record == written
    (stage,) = record.stages
    assert stage.metrics == {"loss": 1.5, "steps": 30.0, "f1": 0.25}
    assert stage.data == data
    assert stage.versions["torch"] == torch.__version__
    assert stage.versions.keys() == {"lamina", "torch", "transformers"}
    assert stage.created is not None
    assert stage.created.endswith("+00:00")
    assert stage.base.name_or_path == "someone/tiny"
    assert stage.base.model_class == "LlamaForCausalLM"
    assert stage.base.dtype == "bfloat16"
    assert stage.base.quantization is None
    assert stage.base.vocab_size == 64
    assert stage.base.parameters == sum(p.numel() for p in models.tiny_llama().parameters())
    assert len(stage.base.shapes or "") == 64
    assert config_of(tmp_path / "domain")["base_model_name_or_path"] == "someone/tiny"
    (lamina,) = record.laminae
    assert lamina.config["lora_alpha"] == 8
    assert lamina.config["target_modules"] == ["q_proj", "v_proj"]
    assert set(lamina.ranks.values()) == {4}


def test_earlier_stages_keep_what_they_recorded(tmp_path: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="one", config=llama_lora())
    first = save_stage(model, tmp_path / "one", metrics={"loss": 2.0}, data=["a"])
    model = begin_stage(models.tiny_llama(), name="two", parent=tmp_path / "one", mode="continue")
    second = save_stage(model, tmp_path / "two", metrics={"loss": 1.0})
    # The sketch of the base is there once.
    assert first.stages[0].base.sketch == second.newest.base.sketch
    kept = first.stages[0].base.model_copy(update={"sketch": None})
    assert second.stages[0] == first.stages[0].model_copy(update={"base": kept})
    assert second.stages[1].metrics == {"loss": 1.0}


def test_the_newest_factors_are_stored_untouched(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    model = run_stage(
        tmp_path / "two",
        llama_lora(r=5, lora_alpha=7, target_modules="all-linear"),
        parent=tmp_path / "one",
        mode="stack",
    )
    stored = tensors_of(tmp_path / "two")
    for module, (a, b) in own_factors(model, "two").items():
        prefix = f"base_model.model.{module}"
        assert torch.equal(stored[f"{prefix}.lora_A.weight"][-5:], a)
        assert torch.equal(stored[f"{prefix}.lora_B.weight"][:, -5:], b)


@pytest.mark.parametrize(
    ("first", "second", "exact"),
    [
        ({"r": 4, "lora_alpha": 8}, {"r": 6, "lora_alpha": 12}, True),
        ({"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 4}, True),
        ({"r": 3, "lora_alpha": 5}, {"r": 12, "lora_alpha": 5}, True),
        ({"r": 5, "lora_alpha": 7, "use_rslora": True}, {"r": 5, "lora_alpha": 7}, False),
        ({"r": 4, "lora_alpha": 8}, {"r": 3, "lora_alpha": 5}, False),
    ],
)
def test_reopening_restores_the_stages_own_factors(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], exact: bool
) -> None:
    one = run_stage(tmp_path / "one", llama_lora(**first))
    run_stage(tmp_path / "two", llama_lora(**second), parent=tmp_path / "one", mode="stack")
    original, parent = own_factors(one, "one"), tmp_path / "two"
    for turn in range(1, 4):
        name = f"more{turn}"
        again = begin_stage(models.tiny_llama(), name=name, parent=parent, mode="continue")
        for module, (a, b) in own_factors(again, "one").items():
            assert torch.equal(a, original[module][0])
            assert ulps(b, original[module][1]) <= (0 if exact else turn)
        newest = own_factors(again, name)
        save_stage(again, tmp_path / name)
        parent = tmp_path / name
        stored = own_factors(
            begin_stage(models.tiny_llama(), name="x", parent=parent, mode="continue"), "x"
        )
        for module, (a, b) in newest.items():
            assert torch.equal(a, stored[module][0])
            assert torch.equal(b, stored[module][1])


def test_continue_twice_in_a_row(tmp_path: Path) -> None:
    model, path = run_chain(
        tmp_path,
        [("one", None, llama_lora()), ("two", "continue", None), ("three", "continue", None)],
    )
    record = lineage(path)
    assert [stage.name for stage in record.stages] == ["one", "two", "three"]
    assert [lamina.stage for lamina in record.laminae] == ["three"]
    assert set(record.laminae[0].ranks.values()) == {4}
    assert record.laminae[0].config["r"] == 4
    assert distance(answer(load(path, models.tiny_llama())), answer(model)) < 1e-6
    again = begin_stage(models.tiny_llama(), name="four", parent=path, mode="continue")
    assert len(trained(again)) == 8


def test_a_tool_that_drops_the_record_still_gives_the_right_answers(
    four: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    model, path = four
    (tmp_path / CONFIG).write_bytes((path / CONFIG).read_bytes())
    save_file(tensors_of(path), tmp_path / WEIGHTS)
    assert distance(answer(load(tmp_path, models.tiny_llama())), answer(model)) < 1e-6
    assert [stage.name for stage in lineage(tmp_path).stages] == ["imported"]
    # Peft opens it and saves it in its own way: still the same, as one stage.
    peft_model: Any = open_with_peft(path)
    peft_model.save_pretrained(str(tmp_path / "resaved"), save_embedding_layers=False)
    assert "lamina" not in metadata_of(tmp_path / "resaved")
    resaved = load(tmp_path / "resaved", models.tiny_llama())
    assert distance(answer(resaved), answer(model)) < 1e-6
    nxt = begin_stage(
        models.tiny_llama(),
        name="next",
        parent=tmp_path / "resaved",
        mode="stack",
        config=llama_lora(),
    )
    assert distance(answer(nxt), answer(model)) < 1e-6


def test_a_model_without_a_stage(tmp_path: Path) -> None:
    for model in (
        get_peft_model(models.tiny_llama(), llama_lora()),
        load(saved(tmp_path / "one"), models.tiny_llama()),
    ):
        with pytest.raises(StageError, match=r"begin_stage\("):
            save_stage(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def saved(path: Path) -> Path:
    run_stage(path, llama_lora())
    return path


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"metrics": {"loss": "low"}}, r"metrics\['loss'\]='low'"),
        ({"metrics": {"ok": True}}, r"metrics\['ok'\]=True"),
        ({"metrics": {"loss": None}}, r"metrics\['loss'\]=None"),
        ({"metrics": {"loss": math.nan}}, r"metrics\['loss'\]=nan"),
        ({"metrics": {"perplexity": math.inf}}, r"metrics\['perplexity'\]=inf"),
        ({"data": {"rows": object()}}, "data can't be written as JSON"),
        ({"data": torch.ones(2)}, "data can't be written as JSON"),
        ({"data": [math.nan]}, "data can't be written as JSON"),
    ],
)
def test_what_cant_be_recorded_is_refused_before_writing(
    tmp_path: Path, bad: dict[str, Any], line: str
) -> None:
    path = saved(tmp_path / "one")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    model = begin_stage(models.tiny_llama(), name="two", parent=path, mode="continue")
    fill_trainable(model, seed=3)
    with pytest.raises(StageError, match=line):
        save_stage(model, path, **bad)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_everything_that_cant_be_recorded_at_once(tmp_path: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="one", config=llama_lora())
    with pytest.raises(StageError) as caught:
        save_stage(model, tmp_path / "x", metrics={"a": "b", "c": [1]}, data=object())
    assert len(caught.value.faults) == 3


def test_a_chain_whose_adapter_was_deleted_is_not_saved(tmp_path: Path) -> None:
    path = saved(tmp_path / "one")
    model = begin_stage(
        models.tiny_llama(), name="two", parent=path, mode="stack", config=llama_lora()
    )
    model.delete_adapter("one")
    with pytest.raises(StageError, match="no longer has 'one'"):
        save_stage(model, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_model_whose_adapters_were_taken_out_is_not_saved(tmp_path: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="one", config=llama_lora())
    model.merge_and_unload()
    with pytest.raises(StageError, match="taken out"):
        save_stage(model, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_saving_over_the_parents_own_directory(tmp_path: Path) -> None:
    path = saved(tmp_path / "run")
    (path / "notes.txt").write_text("mine")
    model = begin_stage(models.tiny_llama(), name="two", parent=path, mode="continue").eval()
    fill_trainable(model, seed=9)
    save_stage(model, path)
    save_stage(model, path)
    assert distance(answer(load(path, models.tiny_llama())), answer(model)) < 1e-6
    assert [stage.name for stage in lineage(path).stages] == ["run", "two"]
    assert (path / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_saving_changes_nothing_in_the_model(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, _ = four
    before, expected = model.state_dict(), answer(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    grads, active = trained(model), model.active_adapters
    save_stage(model, tmp_path / "again")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert (trained(model), model.active_adapters) == (grads, active)
    assert torch.equal(answer(model), expected)


def test_loading_freezes_and_names_after_the_newest(four: tuple[PeftModel, Path]) -> None:
    model = load(four[1], models.tiny_llama(), allow_base_mismatch=True)
    assert model.active_adapters == ["dpo"]
    assert trained(model) == set()
    assert not any(module.training for module in model.modules())


def test_an_adapter_beside_the_chain_is_not_left_out_silently(tmp_path: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="one", config=llama_lora())
    model.add_adapter("extra", llama_lora())
    save_stage(model, tmp_path / "idle")
    model.set_adapter(["one", "extra"], train=["extra"])
    with pytest.raises(StageError, match="'extra'") as caught:
        save_stage(model, tmp_path / "one")
    assert not (tmp_path / "one").exists()
    call = str(caught.value.cure).partition(";")[0]
    assert call == "model.set_adapter(['one'], train=['one'])"
    model.set_adapter(["one"], train=["one"])
    save_stage(model, tmp_path / "one")


def test_names_of_metrics_are_strings(tmp_path: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="one", config=llama_lora())
    metrics: Any = {1: 0.5, "loss": math.nan}
    with pytest.raises(StageError) as caught:
        save_stage(model, tmp_path / "one", metrics=metrics)
    assert len(caught.value.faults) == 2


def test_the_record_is_json_in_the_header(four: tuple[PeftModel, Path]) -> None:
    values = json.loads(metadata_of(four[1])["lamina"])
    assert values["format_version"] == 1
    assert metadata_of(four[1])["format"] == "pt"


def test_patterns_keep_their_order_on_disk(tmp_path: Path) -> None:
    # The first that matches counts; in the order of the alphabet the second would come first.
    patterns = {"self_attn.v_proj": 3, "layers.0.*_proj": 2}
    run_stage(tmp_path / "one", llama_lora(rank_pattern=patterns))
    ranks = lineage(tmp_path / "one").laminae[0].ranks
    assert ranks["model.layers.0.self_attn.v_proj"] == 3
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    again = begin_stage(models.tiny_llama(), name="two", parent=tmp_path / "one", mode="continue")
    again.save_pretrained(tmp_path / "plain", selected_adapters=["two"])
    assert list(config_of(tmp_path / "plain" / "two")["rank_pattern"]) == list(patterns)
    load(tmp_path / "plain" / "two", models.tiny_llama())
