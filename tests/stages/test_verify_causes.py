"""Each fault is caught, and its cause named first."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamina import load
from lamina.demo.run import SHIPPED_BASE
from lamina.errors import (
    CheckpointError,
)
from lamina.stages import verify
from tests import models
from tests.stages.chains import (
    config_of,
    metadata_of,
    run_stage,
)
from tests.stages.verifying import (
    DOMAIN,
    V_PROJ,
    Tensors,
    blamed,
    changed,
    demo_stage,
    double_alpha,
    double_b,
    qlora_stage,
    verdicts,
    words,
)

# --- the base ------------------------------------------------------------------------------------


def test_another_base_of_the_same_shape(runs: Path) -> None:
    report = verify(runs / "chat", models.tiny_llama(seed=1))
    sentence = blamed(report, "another base")
    assert "another model" in sentence
    found = verdicts(report)
    assert [found[name] for name in ("base", "base answers", "answers")] == ["failed"] * 3
    assert "effect" not in found, "nothing is said of the adapter"


def without_sketch(record: dict[str, Any]) -> None:
    for stage in record["stages"]:
        stage["base"].pop("sketch", None)


def test_another_base_is_known_by_its_answers_alone(runs: Path, tmp_path: Path) -> None:
    path = changed(runs / "chat", tmp_path / "chat", record=without_sketch)
    report = verify(path, models.tiny_llama(seed=1))
    assert "alone, it answers otherwise" in blamed(report, "another base")
    assert verdicts(report)["base"] == "passed", "its name and shapes are the same"


@pytest.mark.parametrize("stage", ["chat", "domain"])
@pytest.mark.parametrize("sketched", [True, False])
def test_a_base_that_has_the_adapter_folded_in(
    runs: Path, tmp_path: Path, stage: str, sketched: bool
) -> None:
    merged = load(runs / stage, models.tiny_llama()).merge_and_unload()
    path = runs / "chat"
    if not sketched:
        path = changed(path, tmp_path / "chat", record=without_sketch)
    report = verify(path, merged)
    sentence = blamed(report, "base already merged")
    assert "folded in" in sentence
    assert stage == "chat" or "'domain'" in sentence


def test_a_merged_base_in_other_dtypes(tmp_path: Path) -> None:
    path = demo_stage(tmp_path)
    merged = load(path).merge_and_unload().to(torch.bfloat16)
    blamed(verify(path, merged), "base already merged")
    bare = changed(path, tmp_path / "bare", record=without_sketch)
    blamed(verify(bare, merged), "base already merged")


def test_a_base_of_other_shapes(runs: Path) -> None:
    report = verify(runs / "chat", models.tiny_llama(hidden_size=64))
    assert "another base" in [cause.kind for cause in report.causes]
    assert verdicts(report)["loading"] == "failed"
    smaller = verify(runs / "chat", models.tiny_llama(vocab_size=32))
    assert "another base" in [cause.kind for cause in smaller.causes]


def test_another_base_from_the_disk(runs: Path, tmp_path: Path) -> None:
    models.tiny_llama(seed=1).save_pretrained(tmp_path / "base")
    blamed(verify(runs / "chat", str(tmp_path / "base")), "another base")
    with pytest.raises(CheckpointError, match="can't be opened"):
        verify(runs / "chat", str(tmp_path / "nowhere"))


# --- the adapter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_tensor_that_was_dropped(runs: Path, tmp_path: Path, half: str) -> None:
    key = f"{V_PROJ}.{half}.weight"
    path = changed(
        runs / "chat", tmp_path / "chat", lambda x: {k: v for k, v in x.items() if k != key}
    )
    report = verify(path, models.tiny_llama())
    assert key in blamed(report, "incomplete file")
    found = verdicts(report)
    assert (found["record"], found["answers"]) == ("failed", "not checked")
    assert (found["base"], found["base answers"]) == ("passed", "passed")


def test_a_module_that_was_dropped(runs: Path, tmp_path: Path) -> None:
    path = changed(
        runs / "chat", tmp_path / "chat", lambda x: {k: v for k, v in x.items() if V_PROJ not in k}
    )
    report = verify(path, models.tiny_llama())
    sentence = blamed(report, "incomplete file")
    assert f"{V_PROJ}.lora_A.weight, {V_PROJ}.lora_B.weight" in sentence


def test_an_adapter_that_is_scaled_twice_by_its_weights(runs: Path, tmp_path: Path) -> None:
    report = verify(changed(runs / "chat", tmp_path / "chat", double_b), models.tiny_llama())
    assert "scaled by 2" in blamed(report, "adapter scaled")
    assert verdicts(report)["weights"] == "failed"


def test_an_adapter_that_is_scaled_twice_by_its_config(runs: Path, tmp_path: Path) -> None:
    path = changed(runs / "chat", tmp_path / "chat", config=double_alpha)
    report = verify(path, models.tiny_llama())
    assert "adapter_config.json gives another scaling" in blamed(report, "adapter scaled")
    right, wrong = (config_of(each)["lora_alpha"] for each in (runs / "chat", path))
    cure = report.causes[0].cure
    assert f"set lora_alpha to {right:g}, not {wrong:g}, and divide what is in alpha_" in cure
    assert verdicts(report)["weights"] == "passed"


def test_rslora_that_was_turned_on(runs: Path, tmp_path: Path) -> None:
    def turn_on(config: dict[str, Any]) -> None:
        config["use_rslora"] = True
        config["alpha_pattern"] = config["rank_pattern"] = {}

    run_stage(tmp_path / "sft", DOMAIN)
    path = changed(tmp_path / "sft", tmp_path / "chat", config=turn_on)
    report = verify(path, models.tiny_llama())
    assert "scaled by 2" in blamed(report, "adapter scaled")
    assert "set use_rslora to false" in report.causes[0].cure


def times(factor: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v * factor if "lora_B" in k else v for k, v in tensors.items()}


# alpha / r and r are forgotten, or rsLoRA: 1.5, 6 and its root, upside down too.
@pytest.mark.parametrize("factor", [0.5, 3.0, -1.0, 1.5, 6.0, 6**-0.5])
def test_an_adapter_of_another_scale(runs: Path, tmp_path: Path, factor: float) -> None:
    path = changed(runs / "chat", tmp_path / "chat", times(factor))
    report = verify(path, models.tiny_llama())
    assert f"scaled by {factor:.3g}" in blamed(report, "adapter scaled")


def _edited(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lora_alpha", 30, "v_proj: scaled by 3 by the config, by 1.5 on record"),
        ("use_rslora", True, "by the config, by 1.5 on record"),
        ("alpha_pattern", {}, "by the config, by 1.5 on record"),
        ("rank_pattern", {}, "rank 10 by the config, 4 on record"),
        ("r", 20, "v_proj: rank 20 by the config, 10 on record"),
        ("target_modules", ["q_proj", "v_proj"], "o_proj: not in target_modules"),
    ],
)
def test_a_config_that_was_edited_is_named_and_the_cure_mends_it(
    name: str, value: Any, said: str, runs: Path, tmp_path: Path
) -> None:
    path = changed(runs / "chat", tmp_path / "chat", config=_edited(name, value))
    report = verify(path, models.tiny_llama())
    assert said in blamed(report, "changed config")
    cure = report.causes[0].cure
    before = config_of(runs / "chat")[name]
    if name == "target_modules":
        assert cure == "in adapter_config.json, add to target_modules 'o_proj'"
    else:
        assert cure == f"in adapter_config.json, set {name} to {json.dumps(before)}"
    mended = changed(path, tmp_path / "mended", config=_edited(name, before))
    assert verify(mended, models.tiny_llama()).proved


def test_a_scale_that_nobody_would_guess(tmp_path: Path) -> None:
    report = verify(changed(demo_stage(tmp_path), tmp_path / "chat", times(1.37)))
    assert "scaled by 1.37" in blamed(report, "adapter scaled")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_effect_that_is_doubled_is_seen_below_the_tolerance(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = demo_stage(tmp_path, dtype, size=0.03)
    report = verify(changed(path, tmp_path / "twice", config=double_alpha))
    assert report.answers is not None
    assert report.answers.passed or dtype == torch.float16
    assert report.effect is not None
    assert report.effect.size == pytest.approx(2, abs=0.3)
    blamed(report, "adapter scaled")
    assert verify(path).proved


def test_an_adapter_that_does_nothing(runs: Path, tmp_path: Path) -> None:
    def empty(tensors: Tensors) -> Tensors:
        return {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}

    report = verify(changed(runs / "chat", tmp_path / "chat", empty), models.tiny_llama())
    assert "changes nothing" in blamed(report, "adapter not applied")
    assert any("all B matrices are zero" in note for note in report.notes)


def test_a_stage_whose_ranks_are_gone(runs: Path, tmp_path: Path) -> None:
    def older_only(tensors: Tensors) -> Tensors:
        kept = dict(tensors)
        for key, value in tensors.items():
            if "o_proj.lora_B" in key:
                kept[key] = value * 0
            if "v_proj.lora_B" in key:
                kept[key] = torch.cat([value[:, :4], 0 * value[:, 4:]], 1)
        return kept

    report = verify(changed(runs / "chat", tmp_path / "chat", older_only), models.tiny_llama())
    assert "up to stage 'domain'" in blamed(report, "other stages")


def test_a_stage_whose_ranks_are_there_and_were_not(runs: Path, tmp_path: Path) -> None:
    domain = json.loads(metadata_of(runs / "domain")["lamina"])

    def older_answers(record: dict[str, Any]) -> None:
        record["stages"][-1]["probe"] = domain["stages"][0]["probe"]
        record["stages"][0].pop("probe")

    path = changed(runs / "chat", tmp_path / "chat", record=older_answers)
    report = verify(path, models.tiny_llama())
    assert "without the ranks of stage 'chat'" in blamed(report, "other stages")


def test_nan(runs: Path, tmp_path: Path) -> None:
    def broken(tensors: Tensors) -> Tensors:
        tensors[f"{V_PROJ}.lora_B.weight"][3, 3] = math.nan
        return tensors

    report = verify(changed(runs / "chat", tmp_path / "chat", broken), models.tiny_llama())
    assert f"{V_PROJ}.lora_B.weight" in blamed(report, "not finite")


def test_one_bit_that_changes_no_answer(runs: Path, tmp_path: Path) -> None:
    def flip(tensors: Tensors) -> Tensors:
        tensors[f"{V_PROJ}.lora_B.weight"].view(torch.int32)[3, 3] ^= 1
        return tensors

    report = verify(changed(runs / "chat", tmp_path / "chat", flip), models.tiny_llama())
    assert "byte for byte" in blamed(report, "changed weights")
    assert verdicts(report)["answers"] == "passed"


def test_a_record_that_is_damaged(runs: Path, tmp_path: Path) -> None:
    path = changed(runs / "chat", tmp_path / "chat", record=lambda record: record.pop("laminae"))
    report = verify(path, models.tiny_llama())
    blamed(report, "damaged record")


def test_several_faults_are_told_at_once(runs: Path, tmp_path: Path) -> None:
    key = f"{V_PROJ}.lora_B.weight"
    path = changed(
        runs / "chat", tmp_path / "chat", lambda x: {k: v for k, v in x.items() if k != key}
    )
    report = verify(path, models.tiny_llama(seed=1), tokenizer=words(prefix="v"))
    blamed(report, "incomplete file", "another base", "another tokenizer")


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_faults_are_caught_where_all_is_rounded(tmp_path: Path, kind: str) -> None:
    # The base with two blocks in each other's place: the same shapes, and the same values in all.
    base = AutoModelForCausalLM.from_pretrained(str(SHIPPED_BASE))
    layers = base.model.layers
    layers[0], layers[2] = layers[2], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    base.save_pretrained(tmp_path / "other")
    path = qlora_stage(tmp_path, 0.1) if kind == "nf4" else demo_stage(tmp_path, torch.bfloat16)
    assert verify(path).proved
    blamed(verify(path, str(tmp_path / "other")), "another base")
    bare = changed(path, tmp_path / "bare", record=without_sketch)
    blamed(verify(bare, str(tmp_path / "other")), "another base")
    load(path, dtype=torch.float32, allow_base_mismatch=True).merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    blamed(verify(path, str(tmp_path / "merged")), "base already merged")
    twice = changed(path, tmp_path / "twice", config=double_alpha)
    assert "scaled by 2" in blamed(verify(twice), "adapter scaled")
    doubled = changed(path, tmp_path / "doubled", double_b)
    assert "scaled by 2" in blamed(verify(doubled), "adapter scaled")
    empty = changed(path, tmp_path / "empty", times(0.0))
    blamed(verify(empty), "adapter not applied")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    dropped = changed(path, tmp_path / "x", lambda x: {k: v for k, v in x.items() if k != key})
    assert key in blamed(verify(dropped), "incomplete file")


# --- the tokenizer -------------------------------------------------------------------------------


def test_another_tokenizer(runs: Path) -> None:
    report = verify(runs / "chat", models.tiny_llama(), tokenizer=words(prefix="v"))
    assert "vocabulary" in blamed(report, "another tokenizer")
    assert verdicts(report)["answers"] == "passed"


def test_the_tokenizer_that_lies_with_adapter_or_base_is_looked_at(
    runs: Path, tmp_path: Path
) -> None:
    assert verdicts(verify(runs / "chat", models.tiny_llama()))["tokenizer"] == "not checked"
    models.tiny_llama().save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    report = verify(runs / "chat", str(tmp_path / "base"))
    assert verdicts(report)["tokenizer"] == "passed"
    shutil.copytree(runs / "chat", tmp_path / "chat")
    words(prefix="v").save_pretrained(tmp_path / "chat")
    blamed(verify(tmp_path / "chat", str(tmp_path / "base")), "another tokenizer")


def test_another_chat_template(runs: Path, tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.chat_template = "{{ messages }}"
    report = verify(runs / "chat", models.tiny_llama(), tokenizer=tokenizer)
    assert "a chat template, and the one that" in blamed(report, "another chat template")
    # The tokenizer that lies with the adapter counts, too, and that of the base for want of one.
    shutil.copytree(runs / "chat", tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    blamed(verify(tmp_path / "chat", models.tiny_llama()), "another chat template")
    models.tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    of_base = verify(runs / "chat", str(tmp_path / "base"))
    assert of_base.proved
    assert any("chat template" in note for note in of_base.notes)


def test_a_base_whose_values_were_rounded_is_told_and_the_cure_helps(
    runs: Path, tmp_path: Path
) -> None:
    models.tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    report = verify(runs / "chat", str(tmp_path / "base"))
    assert "rounded to bfloat16" in blamed(report, "dtype")
    assert "--dtype bfloat16" in report.causes[0].cure
    assert verify(runs / "chat", str(tmp_path / "base"), dtype="bfloat16").proved
