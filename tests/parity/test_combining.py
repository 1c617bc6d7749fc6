"""Combinations have peft's numbers where peft does as the method says, else the right ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.engine.layers import lora_layers
from tests import models
from tests.parity.pairs import add, assert_close, pair

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

METHODS: dict[str, dict[str, Any]] = {
    "cat": {},
    "svd": {},
    "linear": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5},
    "dare_linear": {"density": 0.6},
    "dare_linear_svd": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "dare_ties_svd": {"density": 0.6},
    "magnitude_prune": {"density": 0.4},
    "magnitude_prune_svd": {"density": 0.4},
}
KINDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "linear": (models.perceptron, ["up", "down"]),
    "Conv1D": (models.tiny_gpt2, ["c_attn", "mlp.c_proj"]),
    "embedding": (models.embedding_net, ["embed", "head"]),
    "conv2d": (lambda: models.convolution_net(2), ["stem", "strided", "pointwise"]),
}


def two(kind: str, **second: Any) -> tuple[Any, Any]:
    make, targets = KINDS[kind]
    ours, theirs = pair(make, target_modules=targets, r=4, lora_alpha=6)
    add(ours, theirs, "other", **{"target_modules": targets, "r": 4, "lora_alpha": 2, **second})
    return ours, theirs


def drawn(bernoulli: Any, generator: torch.Generator, chances: Tensor) -> Tensor:
    """In the order of memory: peft transposes the updates of some layers before it draws."""
    if chances.is_contiguous() or chances.dim() > 2:
        return bernoulli(chances, generator=generator)
    return bernoulli(chances.T, generator=generator).T


def combine(ours: Any, theirs: Any, weights: list[float], **how: Any) -> Any:
    """Both draw the same masks; peft draws for factors that it overwrites, too."""
    names = ["default", "other"][: len(weights)]
    for model in (theirs, ours):
        draw = partial(drawn, torch.bernoulli, torch.Generator().manual_seed(7))
        with mock.patch.object(torch, "bernoulli", draw):
            report = model.add_weighted_adapter(names, weights, "sum", **how)
    return report


def updates(model: nn.Module, name: str = "sum") -> dict[str, Tensor]:
    kinds = (peft.tuners.lora.LoraLayer, lamina.engine.layers.LoraLayer)
    return {
        path: layer.get_delta_weight(name).detach()
        for path, layer in model.named_modules()
        if isinstance(layer, kinds)
    }


@pytest.mark.parametrize("weights", [[0.7, 1.2], [0.5, -0.3], [-1.0, -2.0]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_the_same(method: str, kind: str, weights: list[float]) -> None:
    ours, theirs = two(kind)
    combine(ours, theirs, weights, combination_type=method, **METHODS[method])
    mine, other = updates(ours), updates(theirs)
    assert mine.keys() == other.keys()
    for path, update in other.items():
        assert_close(mine[path], update, 2e-5)


@pytest.mark.parametrize("method", ["ties", "dare_ties_svd"])
def test_signs_are_elected_by_frequency_alike(method: str) -> None:
    ours, theirs = two("linear")
    how = {"combination_type": method, "density": 0.5, "majority_sign_method": "frequency"}
    combine(ours, theirs, [1.0, 0.5], **how)
    other = updates(theirs)
    for path, update in updates(ours).items():
        assert_close(update, other[path], 2e-5)


@pytest.mark.parametrize("how", [{"svd_rank": 2}, {"svd_rank": 6}, {"svd_clamp": 0.9}])
@pytest.mark.parametrize("method", ["svd", "magnitude_prune_svd"])
def test_ranks_and_clamps_of_decompositions_are_the_same(method: str, how: dict[str, Any]) -> None:
    ours, theirs = two("linear")
    combine(ours, theirs, [1.0, 1.0], combination_type=method, density=0.5, **how)
    other = updates(theirs)
    for path, update in updates(ours).items():
        assert_close(update, other[path], 2e-5)
    ranks = {layer.r["sum"] for _, layer in lora_layers(ours)}
    assert ranks == {
        layer.r["sum"] for layer in theirs.modules() if isinstance(layer, peft.tuners.lora.Linear)
    }


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.3])
def test_a_single_adapter_is_the_same(weight: float) -> None:
    ours, theirs = two("linear")
    assert combine(ours, theirs, [weight]).exact
    mine, other, alone = updates(ours), updates(theirs), updates(ours, "default")
    for path, update in other.items():
        assert_close(mine[path], update, 1e-5)
        assert_close(mine[path], weight * alone[path], 1e-5)


def test_unequal_ranks_are_the_same_in_cat_and_svd() -> None:
    for method in ("cat", "svd", "ties_svd"):
        ours, theirs = two("linear", r=2)
        combine(ours, theirs, [1.0, 1.0], combination_type=method, density=0.5)
        other = updates(theirs)
        for path, update in updates(ours).items():
            assert_close(update, other[path], 2e-5)


# --- where peft is wrong -------------------------------------------------------------------------


def exact(model: nn.Module, weights: list[float]) -> dict[str, Tensor]:
    parts = [updates_or_nothing(model, name) for name in ("default", "other")]
    paths = {path for part in parts for path in part}
    return {
        path: sum(w * part[path] for w, part in zip(weights, parts, strict=True) if path in part)
        for path in paths
    }


def updates_or_nothing(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        path: layer.get_delta_weight(name).detach()
        for path, layer in lora_layers(model)
        if name in layer.records
    }


def test_peft_scales_rslora_by_the_root_of_the_rank_and_lamina_does_not() -> None:
    make, targets = KINDS["linear"]
    config = {"target_modules": targets, "r": 4, "use_rslora": True}
    ours, theirs = pair(make, **config)
    add(ours, theirs, "other", **config)
    combine(ours, theirs, [1.0, 1.0], combination_type="cat")
    wanted, other = exact(ours, [1.0, 1.0]), updates(theirs)
    for path, update in updates(ours).items():
        assert_close(update, wanted[path], 1e-5)
        # Their sum of ranks is 8.
        assert_close(other[path], wanted[path] * 8**0.5, 1e-5)


def test_peft_drops_the_bias_of_b_and_lamina_sums_it() -> None:
    make, targets = KINDS["linear"]
    config = {"target_modules": targets, "r": 4, "lora_alpha": 6, "lora_bias": True}
    ours, theirs = pair(make, **config)
    add(ours, theirs, "other", **config)
    for method in ("cat", "svd", "linear"):
        combine(ours, theirs, [1.0, 0.5], combination_type=method)
        for _, layer in lora_layers(ours):
            biases = [layer.lora_B[name].bias for name in ("default", "other", "sum")]
            assert_close(biases[2], 1.5 * biases[0] + 1.5 * 0.5 * biases[1], 1e-6)
            assert biases[2].abs().max() > 0
        for layer in theirs.modules():
            if isinstance(layer, peft.tuners.lora.Linear):
                assert not layer.lora_B["sum"].bias.any()
        ours.delete_adapter("sum")
        theirs.delete_adapter("sum")


def test_peft_never_reads_magnitudes_and_cat_refuses_them() -> None:
    """PEFT gives DoRA's sum a magnitude of its own, as if its direction alone were the update."""
    config = peft.LoraConfig(target_modules=["up"], r=4, use_dora=True, init_lora_weights=False)
    theirs = peft.get_peft_model(models.perceptron(), config)
    layer = theirs.base_model.model.up
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(3)
    theirs.add_weighted_adapter(["default"], [1.0], "same")
    x = torch.linspace(-1, 1, 16)[None]
    theirs.eval()
    before = theirs(x)
    theirs.set_adapter("same")
    assert not torch.allclose(theirs(x), before, atol=1e-2)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_peft_decomposes_2d_convolutions_only(dimensions: int) -> None:
    config = {"target_modules": ["stem"], "r": 3, "lora_alpha": 6}
    ours, theirs = pair(lambda: models.convolution_net(dimensions), **config)
    add(ours, theirs, "other", **config)
    how: dict[str, Any] = {"weights": [1.0, 1.0], "adapter_name": "sum", "svd_rank": 6}
    if dimensions == 3:
        with pytest.raises(RuntimeError):
            theirs.add_weighted_adapter(["default", "other"], **how)
    else:
        theirs.add_weighted_adapter(["default", "other"], **how)
        assert theirs.base_model.model.stem.lora_B["sum"].weight.shape == (8, 3)
    assert ours.add_weighted_adapter(["default", "other"], **how).exact
    wanted = exact(ours, [1.0, 1.0])
    for path, update in updates(ours).items():
        assert_close(update, wanted[path], 1e-5)
