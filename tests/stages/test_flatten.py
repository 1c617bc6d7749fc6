"""A chain as one adapter, exactly or in part."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lamina.checkpoint.digest import files_digest
from lamina.config import LoraConfig
from lamina.errors import StageError
from lamina.model import PeftModel
from lamina.stages import begin_stage, flatten, lineage, load, save_stage
from tests import models
from tests.stages.chains import (
    WEIGHTS,
    answer,
    config_of,
    deltas_in,
    distance,
    fill_trainable,
    llama_lora,
    open_with_peft,
    run_chain,
    run_stage,
    save_plain_peft,
    tensors_of,
)
from tests.stages.flattening import FOUR

# --- exactly -------------------------------------------------------------------------------------


def test_four_stages_as_one(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, path = four
    report = flatten(path, tmp_path / "flat")
    assert (answer(open_with_peft(tmp_path / "flat")) - answer(model)).abs().max() < 1e-5
    assert report.exact
    assert report.relative_error == 0
    assert report.stages == ("domain", "chat", "polish", "dpo")
    assert report.rank == (4, 10)
    before, after = tensors_of(path), tensors_of(tmp_path / "flat")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_its_record_tells_what_it_is_made_of(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = four[1]
    flatten(path, tmp_path / "flat")
    before, record = lineage(path), lineage(tmp_path / "flat")
    (whole,) = record.laminae
    assert whole.stage == "dpo"
    assert whole.made_of == ("domain", "chat", "polish", "dpo")
    assert whole.error is None
    assert record.stages == before.stages
    assert record.newest.probe is not None
    assert record.weights == files_digest([tmp_path / "flat" / WEIGHTS])
    config = config_of(tmp_path / "flat")
    assert whole.config == config
    scaling = 7 / math.sqrt(5)
    assert config["lora_alpha"] / config["r"] == pytest.approx(scaling, rel=1e-14)
    for name, rank in config["rank_pattern"].items():
        assert config["alpha_pattern"][name] / rank == pytest.approx(scaling, rel=1e-14)


def test_it_is_a_parent_in_every_way(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    flatten(four[1], tmp_path / "flat")
    for mode, config in (("continue", None), ("stack", llama_lora(r=2)), ("merge", llama_lora())):
        model = begin_stage(
            models.tiny_llama(), name="next", parent=tmp_path / "flat", mode=mode, config=config
        ).eval()
        assert distance(answer(model), answer(four[0])) < 1e-6
        fill_trainable(model, seed=3)
        record = save_stage(model, tmp_path / mode)
        assert distance(answer(open_with_peft(tmp_path / mode)), answer(model)) < 1e-6
        assert record.laminae[0].made_of == ("domain", "chat", "polish", "dpo")
        assert [lamina.stage for lamina in record.laminae] == (
            ["next"] if mode == "continue" else ["dpo", "next"]
        )
        assert [stage.name for stage in record.stages][-2:] == ["dpo", "next"]


def test_half_precision_is_not_rounded(tmp_path: Path) -> None:
    def half() -> nn.Module:
        return models.tiny_llama().bfloat16()

    second = llama_lora(r=3, lora_alpha=7, target_modules=["v_proj"])
    settings = {"build": half, "keep_unfolded": True}
    run_stage(tmp_path / "one", llama_lora(), **settings)
    run_stage(tmp_path / "two", second, parent=tmp_path / "one", mode="stack", **settings)
    for stages in (None, ["one"], ["two"]):
        place = tmp_path / f"flat-{stages}"
        flatten(tmp_path / "two", place, stages=stages)
        before = tensors_of(tmp_path / "two")
        for key, tensor in tensors_of(place).items():
            assert tensor.dtype == before[key].dtype
    # B of the older stage was lifted once, when the newer one was saved; it is taken as it lies.
    whole, part = before, tensors_of(tmp_path / "flat-['one']")
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert torch.equal(part[key], whole[key][:, :4])


def test_a_plain_adapter_gets_one_scaling(tmp_path: Path) -> None:
    settings = {
        "r": 5,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"down_proj": 11},
        "use_rslora": True,
    }
    expected = save_plain_peft(tmp_path / "plain", settings)
    report = flatten(tmp_path / "plain", tmp_path / "flat")
    assert distance(answer(open_with_peft(tmp_path / "flat")), expected) < 1e-6
    assert report.stages == ("imported",)
    config = config_of(tmp_path / "flat")
    assert not config["use_rslora"]
    assert config["alpha_pattern"]["v_proj"] / 2 == pytest.approx(config["lora_alpha"] / 5)
    assert report.scaling == pytest.approx(3 / math.sqrt(5))


def test_grouped_convolutions(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.convolution_net(2)

    one = LoraConfig(r=4, lora_alpha=6, target_modules=["stem", "grouped"])
    two = LoraConfig(r=2, lora_alpha=5, target_modules=["grouped", "pointwise"])
    model, path = run_chain(tmp_path, [("one", None, one), ("two", "stack", two)], build=build)
    flatten(path, tmp_path / "flat")
    assert distance(answer(load(tmp_path / "flat", build())), answer(model)) < 1e-6
    report = flatten(path, tmp_path / "less", rank=4)
    assert [module.rank for module in report.modules.values()] == [4, 4, 2]
    grouped = report.modules["grouped"]
    assert 0 < grouped.relative_error < 1
    a, b = (tensors_of(path)[f"base_model.model.grouped.lora_{x}.weight"] for x in "AB")
    error = norm = 0.0
    for left, right in zip(b.chunk(2), a.chunk(2), strict=True):
        product = left.flatten(1).double() @ right.flatten(1).double()
        values = np.linalg.svd(product.numpy(), compute_uv=False)
        error += float((values[2:] ** 2).sum())
        norm += float((values**2).sum())
    assert grouped.relative_error == pytest.approx(math.sqrt(error / norm), rel=1e-5)


# --- in part -------------------------------------------------------------------------------------


def test_some_stages(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = four[1]
    report = flatten(path, tmp_path / "part", stages=["dpo", "domain"])
    assert report.exact
    assert report.stages == ("domain", "dpo")
    assert report.left_out == ("chat", "polish")
    assert "chat, polish" in report.notes[0]
    whole = deltas_in(path)
    middle = tmp_path / "middle"
    flatten(path, middle, stages=["polish"])
    parts = deltas_in(tmp_path / "part")
    for module, dense in deltas_in(middle).items():
        np.testing.assert_allclose(whole[module] - parts[module], dense, atol=1e-6)
    assert set(deltas_in(middle)) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    record = lineage(tmp_path / "part")
    assert record.left_out == ("chat", "polish")
    assert record.newest.probe is None
    open_with_peft(tmp_path / "part")
    load(tmp_path / "part", models.tiny_llama())


def test_the_beginning_of_a_chain_keeps_its_answers(tmp_path: Path) -> None:
    model, path = run_chain(tmp_path, FOUR[:3])
    run_stage(tmp_path / "dpo", FOUR[3][2], parent=path, mode="stack")
    flatten(tmp_path / "dpo", tmp_path / "flat", stages=["domain", "polish"])
    record = lineage(tmp_path / "flat")
    assert [stage.name for stage in record.stages] == ["domain", "chat", "polish"]
    assert record.left_out == ()
    assert record.newest.probe == lineage(path).newest.probe
    assert distance(answer(load(tmp_path / "flat", models.tiny_llama())), answer(model)) < 1e-6


def test_whole_modules_and_biases_go_with_their_stage(tmp_path: Path) -> None:
    one = llama_lora(modules_to_save=["model.norm"])
    two = llama_lora(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"])
    _, path = run_chain(tmp_path, [("one", None, one), ("two", "stack", two)])
    first = flatten(path, tmp_path / "first", stages=["one"])
    keys = [key for key in tensors_of(tmp_path / "first") if "lora" not in key]
    assert keys == ["base_model.model.model.norm.weight"]
    assert first.notes == ()
    flatten(path, tmp_path / "second", stages=["two"])
    keys = [key for key in tensors_of(tmp_path / "second") if "lora" not in key]
    assert keys == ["base_model.model.lm_head.weight"]
    alone = load(tmp_path / "first", models.tiny_llama())
    assert distance(answer(open_with_peft(tmp_path / "first")), answer(alone)) < 1e-6
    assert distance(answer(load(tmp_path / "one", models.tiny_llama())), answer(alone)) < 1e-6


def test_what_was_trained_anew_is_told(tmp_path: Path) -> None:
    both = llama_lora(modules_to_save=["model.norm"])
    _, path = run_chain(tmp_path, [("one", None, both), ("two", "stack", both)])
    report = flatten(path, tmp_path / "first", stages=["one"])
    assert report.notes == ("model.norm, trained whole by one, was trained anew by two",)
    assert lineage(tmp_path / "first").newest.probe is None


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (["chat"], "'chat' has no ranks of its own any more: they are in those of 'polish'"),
        (["dp"], "there is no 'dp' in domain -> chat -> polish -> dpo; did you mean 'dpo'?"),
        ([], "stages is empty"),
    ],
)
def test_stages_that_are_not_to_be_had(
    four: tuple[PeftModel, Path], tmp_path: Path, stages: list[str], said: str
) -> None:
    with pytest.raises(StageError) as caught:
        flatten(four[1], tmp_path / "part", stages=stages)
    assert said in str(caught.value)
    assert not (tmp_path / "part").exists()


def test_summed_biases_of_B_are_not_told_apart(tmp_path: Path) -> None:
    biased = llama_lora(lora_bias=True)
    model, path = run_chain(tmp_path, [("one", None, biased), ("two", "stack", biased)])
    flatten(path, tmp_path / "flat")
    assert distance(answer(open_with_peft(tmp_path / "flat")), answer(model)) < 1e-6
    with pytest.raises(StageError, match="one sum in the file"):
        flatten(path, tmp_path / "part", stages=["two"])
