"""A chain flattened into one adapter: exactly, in part, or with fewer ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lamina.checkpoint.digest import files_digest
from lamina.checkpoint.probe import probe_tokens
from lamina.config import LoraConfig
from lamina.errors import CheckpointError, StageError
from lamina.model import PeftModel
from lamina.stages import begin_stage, flatten, lineage, load, save_stage
from tests import models
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    Snapshot,
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

FOUR: list[tuple[str, str | None, LoraConfig | None]] = [
    ("domain", None, llama_lora(target_modules="all-linear")),
    ("chat", "stack", llama_lora(r=6, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])),
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


def measured(before: Path, after: Path) -> dict[str, float]:
    """Plain module name -> relative distance of the dense updates, in float64."""
    theirs, ours = deltas_in(before), deltas_in(after)
    assert theirs.keys() == ours.keys()
    return {
        module: float(np.linalg.norm(ours[module] - dense) / np.linalg.norm(dense))
        for module, dense in theirs.items()
    }


@torch.no_grad()
def probe_logits(model: nn.Module) -> Tensor:
    tokens = torch.tensor([probe_tokens(models.tiny_llama())])
    return model(input_ids=tokens).logits


# --- exactly --------------------------------------------------------------------------------------


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


# --- in part --------------------------------------------------------------------------------------


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


# --- with fewer ranks -----------------------------------------------------------------------------


def test_half_the_rank_and_the_error_that_is_measured(
    four: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    path = four[1]
    report = flatten(path, tmp_path / "half", rank=5, base=models.tiny_llama())
    assert not report.exact
    for module, relative in measured(path, tmp_path / "half").items():
        told = report.modules[module]
        assert told.relative_error == pytest.approx(relative, rel=1e-6, abs=1e-12)
        assert told.rank == min(5, told.rank_before)
        if told.rank_before > 5:
            values = np.linalg.svd(deltas_in(path)[module], compute_uv=False)
            tail = math.sqrt((values[5:] ** 2).sum() / (values**2).sum())
            assert told.relative_error == pytest.approx(tail, rel=1e-5)
            assert told.energy == pytest.approx(1 - tail**2, rel=1e-6)
    embedding = report.modules["model.embed_tokens"]
    assert (embedding.rank_before, embedding.rank) == (6, 5)
    assert report.relative_error > 0.01
    assert report.probe is not None
    difference = probe_logits(open_with_peft(tmp_path / "half")) - probe_logits(
        open_with_peft(path)
    )
    assert report.probe.max_difference == pytest.approx(float(difference.abs().max()), rel=1e-4)
    assert not report.probe.passed


def test_the_total_error_is_over_all_modules(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    path = four[1]
    names = ["domain", "dpo"]
    flatten(path, tmp_path / "whole", stages=names)
    report = flatten(path, tmp_path / "half", stages=names, rank=3)
    before, after = deltas_in(tmp_path / "whole"), deltas_in(tmp_path / "half")
    error = math.hypot(*(float(np.linalg.norm(before[m] - after[m])) for m in before))
    norm = math.hypot(*(float(np.linalg.norm(before[m])) for m in before))
    assert report.relative_error == pytest.approx(error / norm, rel=1e-6)
    assert report.energy == pytest.approx(1 - (error / norm) ** 2, rel=1e-6)
    assert lineage(tmp_path / "half").laminae[0].error == pytest.approx(error / norm, rel=1e-6)


def test_few_ranks_stay_bit_for_bit(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    report = flatten(four[1], tmp_path / "half", rank=7)
    before, after = tensors_of(four[1]), tensors_of(tmp_path / "half")
    kept = [module for module, each in report.modules.items() if each.rank_before <= 7]
    assert kept
    for module in kept:
        assert report.modules[module].relative_error == 0
        assert all(torch.equal(before[k], after[k]) for k in before if f".{module}." in k)


def test_a_share_of_the_update(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    report = flatten(four[1], tmp_path / "most", energy=0.9)
    far = measured(four[1], tmp_path / "most")
    for module, told in report.modules.items():
        assert told.energy >= 0.9
        if module in far:
            assert far[module] ** 2 <= 0.1 + 1e-6
            values = np.linalg.svd(deltas_in(four[1])[module], compute_uv=False)
            # One rank less would not do.
            less = (values[: told.rank - 1] ** 2).sum() / (values**2).sum()
            assert less < 0.9
    assert len({told.rank for told in report.modules.values()}) > 1
    assert (
        distance(
            answer(open_with_peft(tmp_path / "most")),
            answer(load(tmp_path / "most", models.tiny_llama())),
        )
        < 1e-6
    )


def test_a_rank_caps_a_share(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    report = flatten(four[1], tmp_path / "less", energy=0.999, rank=2)
    assert report.rank == (2, 2)


def test_errors_of_two_compressions_add_up(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    flatten(four[1], tmp_path / "six", rank=6)
    flatten(tmp_path / "six", tmp_path / "three", rank=3)
    straight = flatten(four[1], tmp_path / "straight", rank=3)
    recorded = lineage(tmp_path / "three").laminae[0].error
    assert recorded == pytest.approx(straight.relative_error, rel=1e-5)


def test_compressed_answers_are_recorded_where_there_is_a_base(
    four: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    base = models.tiny_llama()
    before = Snapshot(base)
    flatten(four[1], tmp_path / "with", rank=3, base=base)
    flatten(four[1], tmp_path / "without", rank=3)
    before.check()
    assert lineage(tmp_path / "without").newest.probe is None
    probe = lineage(tmp_path / "with").newest.probe
    assert probe is not None
    expected = probe_logits(open_with_peft(tmp_path / "with"))[0]
    assert probe.chain.largest == pytest.approx(float(expected.abs().max()), rel=1e-4)


def test_bfloat16_rounding_is_in_the_error(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora(r=8))
    halves = {key: x.bfloat16() for key, x in tensors_of(tmp_path / "one").items()}
    save_file(halves, tmp_path / "one" / WEIGHTS)
    report = flatten(tmp_path / "one", tmp_path / "flat", rank=7)
    assert report.dtypes == ("bfloat16",)
    for module, relative in measured(tmp_path / "one", tmp_path / "flat").items():
        assert report.modules[module].relative_error == pytest.approx(relative, rel=1e-6)
        assert relative > math.sqrt(1 - report.modules[module].energy) * (1 + 1e-6)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 0}, "rank=0 is not a positive integer"),
        ({"rank": True}, "rank=True is not a positive integer"),
        ({"rank": 2.5}, "rank=2.5 is not a positive integer"),
        ({"energy": 0.0}, "energy=0.0 is not a share"),
        ({"energy": 1.5}, "energy=1.5 is not a share"),
    ],
)
def test_numbers_that_are_none(
    four: tuple[PeftModel, Path], tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(StageError) as caught:
        flatten(four[1], tmp_path / "out", stages=["dp"], **asked)
    # All that is wrong, at once.
    assert said in str(caught.value)
    assert "no 'dp'" in str(caught.value)


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    before = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    for out in (tmp_path / "one", tmp_path / "x" / ".." / "one"):
        with pytest.raises(CheckpointError, match="what is read from"):
            flatten(tmp_path / "one", out, force=True)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    with pytest.raises(CheckpointError, match="what is read from"):
        flatten(tmp_path / "one", tmp_path / "link", force=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()} == before


def test_a_place_with_files_needs_force(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        flatten(four[1], tmp_path)
    flatten(four[1], tmp_path, force=True)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", CONFIG, WEIGHTS}


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    tensors = tensors_of(tmp_path / "one")
    key = next(key for key in tensors if "layers.1.self_attn.v_proj.lora_B" in key)
    tensors[key][0, 0] = math.nan
    save_file(tensors, tmp_path / "one" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj"):
        flatten(tmp_path / "one", tmp_path / "flat", rank=2)
    assert not (tmp_path / "flat").exists()


def test_another_base_is_refused(four: tuple[PeftModel, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError, match="another base"):
        flatten(four[1], tmp_path / "flat", base=models.tiny_llama(intermediate_size=48))
    assert not (tmp_path / "flat").exists()


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    report = flatten(tmp_path / "one", tmp_path / "flat")
    assert report.tokenizer == ("tokenizer.json",)
    assert (tmp_path / "flat" / "tokenizer.json").read_text() == "{}"
