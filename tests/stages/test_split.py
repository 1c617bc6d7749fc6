"""A chain split into adapters, one for each stage: their sum is the chain."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lamina.checkpoint.digest import files_digest
from lamina.config import LoraConfig
from lamina.engine.layers import lora_layers
from lamina.errors import CheckpointError, LaminaError, StageError
from lamina.model import PeftModel
from lamina.stages import begin_stage, lineage, load, split
from tests import models
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    Build,
    answer,
    config_of,
    distance,
    llama_lora,
    metadata_of,
    open_with_peft,
    own_factors,
    run_chain,
    run_stage,
    save_plain_peft,
    tensors_of,
    ulps,
)


def together(parts: Path, names: list[str], build: Build = models.tiny_llama) -> Tensor:
    """What the real peft answers with all of these adapters active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(build(), str(parts / names[0]), names[0])
        for name in names[1:]:
            model.load_adapter(str(parts / name), name)
        model.base_model.set_adapter(names)
    return answer(model.eval())


def test_the_sum_of_the_parts_is_the_chain(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, path = four
    report = split(path, tmp_path / "parts")
    names = ["domain", "polish", "dpo"]
    assert [part.stage for part in report.parts] == names
    assert {folder.name for folder in (tmp_path / "parts").iterdir()} == {*names}
    assert distance(together(tmp_path / "parts", names), answer(model)) < 1e-5
    ours = load(tmp_path / "parts" / "domain", models.tiny_llama())
    for name in names[1:]:
        ours.load_adapter(tmp_path / "parts" / name, name)
    ours.set_adapter(names)
    assert distance(answer(ours), answer(model)) < 1e-5
    # Each counts: without the last one it is another function.
    assert distance(together(tmp_path / "parts", names[:2]), answer(model)) > 1e-2


def test_each_part_is_as_it_was_trained(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = four[1]
    report = split(path, tmp_path / "parts")
    record = lineage(path)
    for lamina, part in zip(record.laminae, report.parts, strict=True):
        config = config_of(tmp_path / "parts" / part.stage)
        for field in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
            assert config[field] == lamina.config[field]
        own = lineage(tmp_path / "parts" / part.stage)
        assert own.laminae == (lamina,)
        assert own.weights == files_digest([tmp_path / "parts" / part.stage / WEIGHTS])
    dpo = report.parts[2]
    assert (dpo.ranks, dpo.modules) == ((3, 5), 4)
    assert dpo.left_out == ("domain", "chat", "polish")
    polish = report.parts[1]
    assert polish.made_by == ("chat", "polish")
    assert polish.notes == ("has polish's values of the ranks that chat trained before",)
    assert [s.name for s in lineage(tmp_path / "parts" / "polish").stages] == ["chat", "polish"]
    assert lineage(tmp_path / "parts" / "dpo").left_out == ("domain", "chat", "polish")


def test_factors_come_back(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, path = four
    split(path, tmp_path / "parts")
    for name in ("dpo", "domain"):
        stored = tensors_of(tmp_path / "parts" / name)
        trained = own_factors(model, name)
        assert len(stored) == 2 * len(trained)
        for module, (a, b) in trained.items():
            prefix = f"base_model.model.{module}.lora"
            assert torch.equal(stored[f"{prefix}_A.weight"], a)
            # The scaling of the newest config's `r` is the file's.
            assert ulps(stored[f"{prefix}_B.weight"], b) <= (0 if len(a) == 5 else 1)


def test_the_first_part_is_the_first_stage(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = four[1]
    split(path, tmp_path / "parts")
    first = lineage(tmp_path / "parts" / "domain")
    assert first.newest.probe == lineage(path.parent / "domain").newest.probe
    assert first.newest.probe is not None
    assert first.newest.base.sketch == lineage(path.parent / "domain").newest.base.sketch
    assert lineage(tmp_path / "parts" / "polish").newest.probe is None
    expected = answer(load(path.parent / "domain", models.tiny_llama()))
    assert distance(answer(open_with_peft(tmp_path / "parts" / "domain")), expected) < 1e-6


def test_a_part_is_a_parent(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    split(four[1], tmp_path / "parts")
    model = begin_stage(
        models.tiny_llama(), name="next", parent=tmp_path / "parts" / "polish", mode="continue"
    ).eval()
    assert distance(answer(model), answer(open_with_peft(tmp_path / "parts" / "polish"))) < 1e-6


def test_targets_are_no_more_than_the_stage_had(
    four: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    split(four[1], tmp_path / "parts")
    assert config_of(tmp_path / "parts" / "polish")["target_modules"] == ["embed_tokens", "q_proj"]
    for name, count in (("domain", 14), ("polish", 3), ("dpo", 4)):
        theirs = open_with_peft(tmp_path / "parts" / name)
        assert sum(hasattr(m, "base_layer") for m in theirs.modules()) == count
        ours = load(tmp_path / "parts" / name, models.tiny_llama())
        assert sum(1 for _ in lora_layers(ours.get_base_model())) == count


def test_whole_modules_biases_and_rows_go_to_their_owner(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.tiny_llama(attention_bias=True)

    one = llama_lora(modules_to_save=["model.norm"], bias="lora_only")
    two = llama_lora(r=2, target_modules=["o_proj"], bias="lora_only")
    model, path = run_chain(
        tmp_path,
        [
            ("one", None, one),
            ("two", "stack", two),
            (
                "three",
                "stack",
                llama_lora(r=3, trainable_token_indices=[4], modules_to_save=["lm_head"]),
            ),
        ],
        build=build,
    )
    report = split(path, tmp_path / "parts")
    first, second, third = report.parts
    assert (first.saved_modules, first.biases, first.rows) == (("model.norm",), 4, 0)
    assert (second.saved_modules, second.biases, second.rows) == ((), 2, 0)
    assert (third.saved_modules, third.biases, third.rows) == (("lm_head",), 0, 1)
    for name in ("one", "two", "three"):
        load(tmp_path / "parts" / name, build())
    ours = load(tmp_path / "parts" / "one", build())
    for name in ("two", "three"):
        ours.load_adapter(tmp_path / "parts" / name, name)
    ours.set_adapter(["one", "two", "three"])
    assert distance(answer(ours), answer(model)) < 1e-5


def test_the_head_of_a_task_is_its_owners(tmp_path: Path) -> None:
    def config(**more: Any) -> LoraConfig:
        return LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", **more)

    def build() -> nn.Module:
        return models.tiny_bert_classifier()

    model, path = run_chain(
        tmp_path, [("one", None, config()), ("two", "stack", config())], build=build
    )
    report = split(path, tmp_path / "parts")
    assert report.parts[1].saved_modules == ("classifier",)
    assert report.parts[0].notes == (
        "classifier, trained whole by one, was trained anew by two",
        "task_type is left out, since its head is another stage's: load that one after this",
    )
    assert config_of(tmp_path / "parts" / "one")["task_type"] is None
    ours = load(tmp_path / "parts" / "one", build())
    ours.load_adapter(tmp_path / "parts" / "two", "two")
    ours.set_adapter(["one", "two"])
    assert distance(answer(ours), answer(model)) < 1e-5


def test_biases_that_would_be_torn_are_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.tiny_llama(attention_bias=True)

    one = llama_lora(bias="lora_only")
    two = llama_lora(target_modules=["v_proj"], bias="lora_only")
    _, path = run_chain(tmp_path, [("one", None, one), ("two", "stack", two)], build=build)
    with pytest.raises(StageError, match="2 of one were trained anew by two"):
        split(path, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_summed_biases_of_B_are_the_newest_stages(tmp_path: Path) -> None:
    biased = llama_lora(lora_bias=True)
    model, path = run_chain(tmp_path, [("one", None, biased), ("two", "stack", biased)])
    report = split(path, tmp_path / "parts")
    said = "the biases of B are the sum with older stages' in 4 module(s)"
    assert [part.notes for part in report.parts] == [(), (said,)]
    assert distance(together(tmp_path / "parts", ["one", "two"]), answer(model)) < 1e-5


def test_dora_alone_stays_what_it_is(tmp_path: Path) -> None:
    model = run_stage(tmp_path / "one", llama_lora(use_dora=True))
    split(tmp_path / "one", tmp_path / "parts")
    before, after = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "parts" / "one")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert distance(answer(open_with_peft(tmp_path / "parts" / "one")), answer(model)) < 1e-5


def test_a_plain_adapter_is_one_part(tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 5, "target_modules": ["q_proj"], "use_rslora": True}
    expected = save_plain_peft(tmp_path / "plain", settings)
    report = split(tmp_path / "plain", tmp_path / "parts")
    assert [part.stage for part in report.parts] == ["imported"]
    assert distance(answer(open_with_peft(tmp_path / "parts" / "imported")), expected) < 1e-6


# --- names out of files ---------------------------------------------------------------------------


def renamed(path: Path, old: str, new: str) -> None:
    """Write another stage name into a file's record, as nobody should."""
    metadata = metadata_of(path)
    metadata["lamina"] = metadata["lamina"].replace(json.dumps(old), json.dumps(new))
    save_file(tensors_of(path), path / WEIGHTS, metadata=metadata)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        "/tmp/x",
        "a/b",
        "a\\b",
        "C:x",
        "~root",
        "con",
        "x\u202etxt",
        "x\x00y",
        "x\ny",
        " x",
        "",
        "n" * 300,
    ],
)
def test_no_name_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    run_stage(tmp_path / "one", llama_lora())
    renamed(tmp_path / "one", "one", name)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(LaminaError) as caught:
        split(tmp_path / "one", tmp_path / "parts")
    assert caught.value.faults
    assert set(tmp_path.rglob("*")) == before


def test_names_that_differ_by_case_only(tmp_path: Path) -> None:
    run_chain(tmp_path, [("one", None, llama_lora()), ("two", "stack", llama_lora())])
    renamed(tmp_path / "two", "two", "ONE")
    with pytest.raises(StageError, match="one folder where case doesn't count"):
        split(tmp_path / "two", tmp_path / "parts")


def test_a_place_with_files_is_refused(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(CheckpointError, match="not empty"):
        split(four[1], tmp_path)
    with pytest.raises(CheckpointError, match="what is read from"):
        split(four[1], four[1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]


def test_a_record_that_contradicts_its_config_is_refused(tmp_path: Path) -> None:
    run_chain(tmp_path, [("one", None, llama_lora()), ("two", "stack", llama_lora(r=6))])
    metadata = metadata_of(tmp_path / "two")
    record = json.loads(metadata["lamina"])
    record["laminae"][1]["config"]["r"] = 3
    metadata["lamina"] = json.dumps(record)
    save_file(tensors_of(tmp_path / "two"), tmp_path / "two" / WEIGHTS, metadata=metadata)
    with pytest.raises(LaminaError, match="contradicts the stage record"):
        split(tmp_path / "two", tmp_path / "parts")


def test_the_tokenizer_goes_with_each(tmp_path: Path) -> None:
    run_chain(tmp_path, [("one", None, llama_lora()), ("two", "stack", llama_lora())])
    (tmp_path / "two" / "tokenizer.json").write_text("{}")
    report = split(tmp_path / "two", tmp_path / "parts")
    assert report.tokenizer == ("tokenizer.json",)
    for name in ("one", "two"):
        files = {file.name for file in (tmp_path / "parts" / name).iterdir()}
        assert files == {CONFIG, WEIGHTS, "tokenizer.json"}
