"""Methods beside plain LoRA, flattened: exactly where that can be, else by saying how far off."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lamina.config import (
    AdaLoraConfig,
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    VeloraConfig,
)
from lamina.errors import StageError
from lamina.model import get_peft_model
from lamina.stages import flatten, lineage, load, rename_stage, split
from tests import models
from tests.adapters import fill, rewrite
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    Build,
    answer,
    config_of,
    deltas_in,
    distance,
    fill_trainable,
    llama_lora,
    open_with_peft,
    run_chain,
    tensors_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def saved(path: Path, config: LoraConfig, build: Build = models.tiny_llama) -> Tensor:
    """An adapter every tensor of which differs from zero; what its model answers."""
    model = get_peft_model(build(), config).eval()
    fill(model, seed=3)
    model.save_pretrained(path)
    return answer(model)


def test_adalora_is_plain_lora_exactly(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.AdaLoraConfig(
            init_r=6, target_r=3, lora_alpha=5, total_step=10, target_modules=["q_proj", "up_proj"]
        )
        theirs = peft.get_peft_model(models.tiny_llama(), config).eval()
        fill_trainable(theirs, seed=4, size=0.5)
        theirs.save_pretrained(tmp_path / "ada")
    report = flatten(tmp_path / "ada", tmp_path / "flat")
    assert report.exact
    assert report.rank == (6, 6)
    assert config_of(tmp_path / "flat")["peft_type"] == "LORA"
    assert distance(answer(open_with_peft(tmp_path / "flat")), answer(theirs)) < 1e-5


def test_adalora_with_ranks_shared_out(tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, total_step=10, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(models.tiny_llama(), config).eval()
    fill(model, seed=3, size=0.5)
    left = {"0.self_attn.q_proj": 3, "0.self_attn.v_proj": 0, "1.self_attn.q_proj": 4}
    masks = {}
    for layer in (0, 1):
        for name in ("q_proj", "v_proj"):
            kept = left.get(f"{layer}.self_attn.{name}", 1)
            mask = [place < kept for place in range(4)]
            masks[f"model.layers.{layer}.self_attn.{name}.lora_E"] = mask
            layers = model.get_base_model().model.layers
            e = getattr(layers[layer].self_attn, name).lora_E["default"]
            e.data.masked_fill_(~torch.tensor(mask).view(-1, 1), 0.0)
    model.peft_config["default"].rank_pattern = {f"{k}.default": m for k, m in masks.items()}
    model.save_pretrained(tmp_path / "ada")
    report = flatten(tmp_path / "ada", tmp_path / "flat")
    ranks = [report.modules[key.removesuffix(".lora_E")].rank for key in masks]
    # A module can't be left without any rank: it gets one of zeros.
    assert ranks == [3, 1, 4, 1]
    assert distance(answer(open_with_peft(tmp_path / "flat")), answer(model)) < 1e-5
    assert distance(answer(load(tmp_path / "flat", models.tiny_llama())), answer(model)) < 1e-5


DORA = llama_lora(use_dora=True, target_modules=["q_proj", "down_proj"])


def dora_updates(path: Path, base: nn.Module) -> dict[str, np.ndarray]:
    """`m * (W + s B A) / norm - W` in float64, by the paper's formula."""
    tensors = load_file(path / WEIGHTS)
    config = config_of(path)
    weights = dict(base.named_parameters())
    found = {}
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        stem = key.removesuffix("lora_A.weight")
        module = stem.removeprefix("base_model.model.").removesuffix(".")
        weight = weights[f"{module}.weight"].detach().double()
        a, b = (tensors[f"{stem}lora_{x}.weight"].double() for x in "AB")
        moved = weight + config["lora_alpha"] / config["r"] * b @ a
        m = tensors[f"{stem}lora_magnitude_vector"].double()
        moved = m[:, None] * moved / moved.norm(dim=1, keepdim=True)
        found[module] = (moved - weight).numpy()
    return found


def test_dora_is_refused_unless_an_approximation_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path / "dora", DORA)
    with pytest.raises(StageError, match="no sum of ranks") as caught:
        flatten(tmp_path / "dora", tmp_path / "flat", rank=4)
    assert "--approximate --base BASE" in str(caught.value)
    with pytest.raises(StageError) as caught:
        flatten(tmp_path / "dora", tmp_path / "flat", approximate=True)
    assert "base: Dora's update depends on it" in str(caught.value)
    assert "rank: Dora's update has full rank" in str(caught.value)
    assert not (tmp_path / "flat").exists()


def test_dora_by_the_ranks_that_come_closest(tmp_path: Path) -> None:
    expected = saved(tmp_path / "dora", DORA)
    wanted = dora_updates(tmp_path / "dora", models.tiny_llama())
    report = flatten(
        tmp_path / "dora", tmp_path / "flat", rank=6, approximate=True, base=models.tiny_llama()
    )
    assert not report.exact
    assert report.rank == (6, 6)
    ours = deltas_in(tmp_path / "flat")
    for module, dense in wanted.items():
        told = report.modules[module]
        error = np.linalg.norm(ours[module] - dense) / np.linalg.norm(dense)
        values = np.linalg.svd(dense, compute_uv=False)
        best = math.sqrt((values[6:] ** 2).sum() / (values**2).sum())
        assert told.relative_error == pytest.approx(error, rel=1e-4)
        assert told.relative_error == pytest.approx(best, rel=1e-4)
        assert told.energy == pytest.approx(1 - best**2, rel=1e-4)
    theirs = open_with_peft(tmp_path / "flat")
    assert distance(answer(theirs), expected) > 1e-3
    assert report.probe is not None
    assert report.probe.max_difference > 1e-3
    record = lineage(tmp_path / "flat")
    assert record.laminae[0].error == pytest.approx(report.relative_error)
    assert record.newest.probe is not None
    assert not config_of(tmp_path / "flat")["use_dora"]


WHOLE: dict[str, tuple[LoraConfig, Build]] = {
    "DoRA": (DORA, models.tiny_llama),
    "DoRA of an embedding": (
        llama_lora(use_dora=True, target_modules=["embed_tokens"]),
        models.tiny_llama,
    ),
    "DoRA of Conv1D": (
        LoraConfig(r=4, use_dora=True, target_modules=["c_attn"], task_type="CAUSAL_LM"),
        models.tiny_gpt2,
    ),
    "DoRA of a convolution": (
        LoraConfig(r=2, use_dora=True, target_modules=["stem", "strided", "pointwise"]),
        lambda: models.convolution_net(2),
    ),
    "KaSA": (llama_lora(kasa_config=KasaConfig()), models.tiny_llama),
    "BD-LoRA": (
        llama_lora(
            use_bdlora=BdLoraConfig(
                nblocks=2, target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"]
            )
        ),
        models.tiny_llama,
    ),
    "QA-LoRA": (llama_lora(use_qalora=True, qalora_group_size=8), models.tiny_llama),
}


@pytest.mark.parametrize("method", WHOLE)
def test_with_all_ranks_nothing_is_lost(method: str, tmp_path: Path) -> None:
    config, build = WHOLE[method]
    expected = saved(tmp_path / "one", config, build)
    report = flatten(tmp_path / "one", tmp_path / "flat", rank=999, approximate=True, base=build())
    assert report.relative_error < 1e-6
    assert distance(answer(load(tmp_path / "flat", build())), expected) < 1e-5
    assert distance(answer(open_with_peft(tmp_path / "flat", build)), expected) < 1e-5


def test_grouped_convolutions_by_dora_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["grouped"])
    saved(tmp_path / "one", config, lambda: models.convolution_net(2))
    with pytest.raises(StageError, match="groups"):
        flatten(
            tmp_path / "one",
            tmp_path / "flat",
            rank=4,
            approximate=True,
            base=models.convolution_net(2),
        )


@pytest.mark.parametrize("approximate", [False, True])
def test_what_acts_on_some_tokens_only_is_no_plain_lora(tmp_path: Path, approximate: bool) -> None:
    saved(tmp_path / "one", llama_lora(alora_invocation_tokens=[5, 6]))
    with pytest.raises(StageError, match="acts on some tokens only"):
        flatten(
            tmp_path / "one",
            tmp_path / "flat",
            rank=4,
            approximate=approximate,
            base=models.tiny_llama(),
        )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"velora_config": VeloraConfig()}, "Velora"),
        ({"monteclora_config": MontecloraConfig()}, "Monteclora"),
        ({"init_lora_weights": "mica"}, None),
    ],
)
def test_what_trains_otherwise_and_adds_a_sum(
    tmp_path: Path, settings: dict[str, Any], kept: str | None
) -> None:
    expected = saved(tmp_path / "one", llama_lora(**settings))
    report = flatten(tmp_path / "one", tmp_path / "flat")
    assert report.exact
    assert distance(answer(open_with_peft(tmp_path / "flat")), expected) < 1e-6
    keys = {key.split(".lora_")[1] for key in tensors_of(tmp_path / "flat")}
    assert keys == {"A.weight", "B.weight"}
    said = f"what {kept} keeps for its training is left out"
    assert report.notes == (() if kept is None else (said,))


def test_pissa_lies_over_the_base_as_it_was(tmp_path: Path) -> None:
    pissa = llama_lora(init_lora_weights="pissa", lora_alpha=4)
    model, path = run_chain(tmp_path, [("one", None, pissa), ("two", "stack", llama_lora(r=3))])
    assert lineage(path).laminae[0].taken
    report = flatten(path, tmp_path / "flat")
    assert "one began by pissa" in report.notes[0]
    assert lineage(tmp_path / "flat").laminae[0].taken == {}
    assert distance(answer(open_with_peft(tmp_path / "flat")), answer(model)) < 1e-5


def test_parameters_adapted_by_themselves_stay_as_they_are(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["up.weight"])
    saved(tmp_path / "one", config, models.perceptron)
    for change in (flatten, split):
        with pytest.raises(StageError, match="one plain adapter already"):
            change(tmp_path / "one", tmp_path / "flat")


def test_replaced_rows_come_along(tmp_path: Path) -> None:
    config = llama_lora(trainable_token_indices=[3, 9, 4])
    expected = saved(tmp_path / "one", config)
    flatten(tmp_path / "one", tmp_path / "flat", rank=2)
    flatten(tmp_path / "one", tmp_path / "whole")
    assert distance(answer(open_with_peft(tmp_path / "whole")), expected) < 1e-6
    key = next(key for key in tensors_of(tmp_path / "one") if "tokens_delta" in key)
    for place in ("flat", "whole"):
        rows = tensors_of(tmp_path / place)[key]
        assert torch.equal(rows, tensors_of(tmp_path / "one")[key])
        assert config_of(tmp_path / place)["trainable_token_indices"] == [3, 9, 4]


def test_rows_go_with_their_stage(tmp_path: Path) -> None:
    one = llama_lora(trainable_token_indices=[3, 9])
    two = llama_lora(r=2, trainable_token_indices=[5, 9])
    model, path = run_chain(tmp_path, [("one", None, one), ("two", "stack", two)])
    flatten(path, tmp_path / "flat")
    assert distance(answer(open_with_peft(tmp_path / "flat")), answer(model)) < 1e-6
    report = flatten(path, tmp_path / "first", stages=["one"])
    assert any("were trained anew by two" in note for note in report.notes)
    assert lineage(tmp_path / "first").token_rows == {"model.embed_tokens": {"one": (3,)}}
    rows = next(x for key, x in tensors_of(tmp_path / "first").items() if "tokens_delta" in key)
    whole = next(x for key, x in tensors_of(path).items() if "tokens_delta" in key)
    assert torch.equal(rows, whole[:1])
    load(tmp_path / "first", models.tiny_llama())
    open_with_peft(tmp_path / "first")
    assert (tmp_path / "first" / CONFIG).is_file()


def test_weights_of_the_base_that_were_written_along(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        models.tiny_llama(),
        peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
    ).eval()
    with torch.no_grad():
        theirs.get_base_model().model.embed_tokens.base_layer.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "one", save_embedding_layers=True)
    report = flatten(tmp_path / "one", tmp_path / "flat")
    assert "embed_tokens.base_layer.weight" in report.notes[0]
    assert distance(answer(open_with_peft(tmp_path / "flat")), answer(theirs)) < 1e-6
    assert distance(answer(load(tmp_path / "flat", models.tiny_llama())), answer(theirs)) < 1e-6
    (part,) = split(tmp_path / "one", tmp_path / "parts").parts
    assert part.notes == report.notes
    assert distance(answer(open_with_peft(Path(part.path))), answer(theirs)) < 1e-6
    with pytest.raises(StageError, match="can't have a record"):
        rename_stage(tmp_path / "one", "imported", "sft")


def test_an_adapter_without_ranks(tmp_path: Path) -> None:
    saved(tmp_path / "one", llama_lora(modules_to_save=["lm_head"]))
    rewrite(tmp_path / "one", lambda file: {k: x for k, x in file.items() if "lora" not in k})
    for change in (flatten, split):
        with pytest.raises(StageError, match="no ranks of 'imported'"):
            change(tmp_path / "one", tmp_path / "out")
