from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.engine.layers import lora_layers
from tests import models
from tests.parity.pairs import add, answer, assert_close, gradients, merged, pair, trained

# What peft warns of is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

Case = tuple[Callable[[], nn.Module], list[str], Tensor]
IMAGE = {d: torch.linspace(-2, 2, 2 * 3 * 8**d).reshape(2, 3, *[8] * d).sin() for d in (1, 2, 3)}


def grouped() -> nn.Module:
    """Groups without dilation, which peft forgets."""
    with models.seeded(0):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, stride=2, groups=2))


CASES: dict[str, Case] = {
    "linear": (models.perceptron, ["up", "down"], torch.linspace(-1, 1, 48).reshape(3, 16)),
    "llama": (models.tiny_llama, ["q_proj", "v_proj", "up_proj"], models.token_ids()),
    "Conv1D": (models.tiny_gpt2, ["c_attn", "mlp.c_proj"], models.token_ids()),
    "embedding": (models.embedding_net, ["embed"], models.token_ids()),
    **{
        f"conv{d}d": (
            partial(models.convolution_net, d),
            ["stem", "strided", "pointwise"],
            IMAGE[d],
        )
        for d in (1, 2, 3)
    },
    "groups": (grouped, ["0", "1"], IMAGE[2]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "alpha": {"r": 2, "lora_alpha": 12},
    "rslora": {"r": 6, "lora_alpha": 4, "use_rslora": True},
    "biased": {"r": 4, "lora_bias": True},
    "no dropout": {"r": 4, "lora_dropout": 0.0},
}


# In both an embedding can't have a lora_bias.
COMBINATIONS = [both for both in product(CASES, SETTINGS) if both != ("embedding", "biased")]


@pytest.mark.parametrize(("kind", "setting"), COMBINATIONS)
def test_answers_and_gradients_are_the_same(kind: str, setting: str) -> None:
    make, targets, x = CASES[kind]
    ours, theirs = pair(make, target_modules=targets, **SETTINGS[setting])
    assert_close(answer(ours, x), answer(theirs, x))
    assert not torch.allclose(answer(ours, x), answer(make(), x))
    mine, other = gradients(ours, x), gradients(theirs, x)
    assert mine.keys() == other.keys() == trained(theirs).keys()
    for name, gradient in other.items():
        assert gradient.abs().max() > 0, name
        assert_close(mine[name], gradient)


@pytest.mark.parametrize("kind", sorted(CASES.keys() - {"groups"}))
def test_merged_weights_are_the_same(kind: str) -> None:
    make, targets, _ = CASES[kind]
    if kind == "conv3d":
        # peft can't merge a kernel of 1 x 1 x 1.
        targets = ["stem", "strided"]
    mine, other = (merged(m) for m in pair(make, target_modules=targets, r=4, lora_alpha=6))
    assert mine.keys() == other.keys()
    for name, weight in other.items():
        assert_close(mine[name], weight)


PATTERNS: dict[str, dict[str, Any]] = {
    "rank": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}},
    "alpha": {"alpha_pattern": {".*v_proj": 3, "up_proj": 1}, "lora_alpha": 16},
    "both": {
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 5, "q_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 2},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_rank_and_alpha_mean_the_same(pattern: str) -> None:
    make, targets, x = CASES["llama"]
    ours, theirs = pair(make, target_modules=targets, r=4, **PATTERNS[pattern])
    assert_close(answer(ours, x), answer(theirs, x))
    other = dict(theirs.named_modules())
    for path, layer in lora_layers(ours):
        for field in ("r", "lora_alpha", "scaling", "use_rslora"):
            assert dict(getattr(layer, field)) == getattr(other[path], field), (path, field)


@pytest.mark.parametrize("kind", CASES)
def test_several_active_adapters_add_up_alike(kind: str) -> None:
    make, targets, x = CASES[kind]
    ours, theirs = pair(make, target_modules=targets, r=4)
    add(ours, theirs, "second", target_modules=targets[:1], r=2, lora_alpha=6)
    both = answer(theirs, x)
    assert_close(answer(ours, x), both)
    mine, other = gradients(ours, x), gradients(theirs, x)
    assert any(".second" in name for name in other)
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        assert_close(mine[name], gradient)
    for name in ("second", "default"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert_close(answer(ours, x), answer(theirs, x))
        assert not torch.allclose(answer(ours, x), both, atol=1e-4)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(answer(ours, x), answer(theirs, x))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dropout_draws_the_same_numbers(kind: str) -> None:
    make, targets, x = CASES[kind]
    ours, theirs = pair(make, target_modules=targets, r=4, lora_dropout=0.4)
    ours.train()
    theirs.train()
    answers = []
    for model in (ours, theirs):
        with models.seeded(5):
            answers.append(answer(model, x))
    assert_close(*answers)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_same_biases_train(bias: str) -> None:
    make, ids = models.tiny_bert_classifier, models.token_ids()
    ours, theirs = pair(make, target_modules=["query", "dense"], bias=bias)
    biases = {name for name in trained(theirs) if name.endswith("bias")}
    assert bool(biases) == (bias != "none")
    assert_close(answer(ours, ids), answer(theirs, ids))
    mine, other = gradients(ours, ids), gradients(theirs, ids)
    assert biases <= other.keys()
    for name, gradient in other.items():
        # A softmax doesn't feel a bias of its keys: that gradient is noise around zero.
        assert (mine[name] - gradient).abs().max() <= 1e-6 * max(1, gradient.abs().max()), name
    state = merged(theirs)
    for name, tensor in merged(ours).items():
        assert_close(tensor, state[name])


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_modules_trained_whole_are_the_same(task_type: str | None) -> None:
    make, ids = models.tiny_bert_classifier, models.token_ids()
    config: dict[str, Any] = {"target_modules": ["query"], "task_type": task_type}
    if task_type is None:
        config["modules_to_save"] = ["classifier", "pooler.dense"]
    ours, theirs = pair(make, **config)
    assert any("classifier.modules_to_save.default" in name for name in trained(theirs))
    assert_close(answer(ours, ids), answer(theirs, ids))
    mine, other = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        assert_close(mine[name], gradient)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(answer(ours, ids), answer(theirs, ids))
    state = merged(theirs)
    for name, tensor in merged(ours).items():
        assert_close(tensor, state[name])


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_new_factors_are_drawn_from_the_same_distribution(init: bool | str) -> None:
    """Not the same numbers, but the same zeros, bounds and spread."""

    for kind in ("llama", "conv2d", "embedding"):
        make, targets, _ = CASES[kind]
        config: dict[str, Any] = {"target_modules": targets, "r": 16, "init_lora_weights": init}
        if kind == "conv2d":
            config["target_modules"] = ["strided"]
        ours = lamina.get_peft_model(make(), lamina.LoraConfig(**config))
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**config))
        other = trained(theirs)
        for name, parameter in trained(ours).items():
            assert parameter.any() == other[name].any(), name
            spread, wanted = parameter.std(), other[name].std()
            assert (spread - wanted).abs() <= 0.15 * wanted, (name, spread, wanted)
            if init is True and "embedding" not in name:
                assert parameter.abs().max() <= other[name].abs().max() * 1.1, name
