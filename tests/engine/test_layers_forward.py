from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lamina.engine.layers import LoraLayer
from tests import models
from tests.engine.adapters import adapt, layer_of

DEPRECATED = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning")
IDS = torch.tensor([[3, 0, 5, 3], [1, 2, 0, 4]])


def signal(*shape: int) -> torch.Tensor:
    with models.seeded(7):
        return torch.randn(*shape, dtype=torch.float64)


LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "linear": (lambda: nn.Linear(6, 4), signal(2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), signal(2, 6)),
    "Conv1D": (lambda: Conv1D(4, 6), signal(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(8, 6), IDS),
    "embedding with padding": (lambda: nn.Embedding(8, 6, padding_idx=0), IDS),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), signal(2, 4, 9)),
    "conv1d strided": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2), signal(2, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 3, padding="same"), signal(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), bias=False), signal(2, 4, 7, 8)),
    "conv2d dilated": (
        lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=2, dilation=2),
        signal(2, 4, 7, 8),
    ),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        signal(2, 4, 7, 8),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), signal(1, 2, 4, 4, 4)),
}


def make(kind: str) -> nn.Module:
    with models.seeded(0):
        return nn.ModuleDict({"layer": LAYERS[kind][0]()}).double().eval()["layer"]


def adapted(kind: str, **config: Any) -> tuple[LoraLayer, nn.Module]:
    """A layer with an adapter, and the plain layer that it was."""
    model = nn.ModuleDict({"layer": make(kind)})
    adapt(model, target_modules=["layer"], **config)
    return layer_of(model, "layer"), make(kind)


def dense(layer: LoraLayer, plain: nn.Module, adapter: str = "default") -> torch.Tensor:
    """The base's weight plus scaling * B @ A, by a sum written out in indices."""
    a, b = layer.factors(adapter)
    scaling = layer.records[adapter].scaling
    if isinstance(plain, nn.Embedding):
        delta = torch.einsum("rv,dr->vd", a, b)
    elif isinstance(plain, Conv1D):
        delta = torch.einsum("ri,or->io", a, b)
    else:
        delta = torch.einsum("ri...,or->oi...", a, b.flatten(1))
    return plain.weight + scaling * delta


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_forward_is_that_of_the_dense_sum(kind: str, rslora: bool) -> None:
    layer, plain = adapted(kind, r=3, lora_alpha=5, use_rslora=rslora)
    assert layer.scaling["default"] == pytest.approx(5 / 3**0.5 if rslora else 5 / 3)
    x = LAYERS[kind][1]
    expected = functional_call(plain, {"weight": dense(layer, plain)}, (x,))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(x), plain(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_dense_sum(kind: str) -> None:
    layer, plain = adapted(kind, r=2)
    x = LAYERS[kind][1]
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    wanted = [*layer.factors("default"), *([x] if x.requires_grad else [])]
    answer = layer(x)
    weigh = signal(*answer.shape)
    got = torch.autograd.grad((answer * weigh).sum(), wanted)
    reference = functional_call(plain, {"weight": dense(layer, plain)}, (x,))
    expected = list(torch.autograd.grad((reference * weigh).sum(), wanted))
    if kind == "embedding with padding":
        # torch keeps gradients out of a padding row: of the table, and of A, but B has seen it.
        a, _ = layer.factors("default")
        looked_up = a.T[x].detach()
        expected[1] = torch.einsum("bld,blr->dr", weigh, looked_up) * layer.scaling["default"]
        assert got[0][:, 0].abs().sum() == 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d", "conv3d"])
def test_the_bias_of_B_is_scaled_and_added(kind: str) -> None:
    layer, plain = adapted(kind, r=2, lora_alpha=6, lora_bias=True)
    x = LAYERS[kind][1]
    expected = functional_call(plain, {"weight": dense(layer, plain)}, (x,))
    bias = 3 * layer.tensors("default")["lora_B.bias"]
    shape = (-1,) if kind in ("linear", "Conv1D") else (-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(layer(x), expected + bias.reshape(shape), rtol=1e-12, atol=1e-12)


def test_a_grouped_convolution_mixes_groups_through_A() -> None:
    with models.seeded(0):
        plain = nn.Conv2d(4, 6, 3, groups=2).double()
    model = nn.ModuleDict({"layer": copy.deepcopy(plain)})
    adapt(model, target_modules=["layer"], r=4, lora_alpha=8)
    layer = layer_of(model, "layer")
    a, b = layer.factors("default")
    x = signal(2, 4, 7, 7)
    inner = nn.functional.conv2d(x, a)
    halves = [
        torch.einsum("bihw,oi->bohw", half, part.flatten(1))
        for half, part in zip(inner.chunk(2, 1), b.chunk(2, 0), strict=True)
    ]
    torch.testing.assert_close(layer(x), plain(x) + 2 * torch.cat(halves, 1))


def test_an_embedding_that_scales_its_output_scales_the_update_too() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(4.0)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    with models.seeded(0):
        plain = Scaled(8, 6).double()
    model = nn.ModuleDict({"layer": copy.deepcopy(plain)})
    adapt(model, target_modules=["layer"])
    layer = layer_of(model, "layer")
    expected = functional_call(plain, {"weight": dense(layer, plain)}, (IDS,))
    torch.testing.assert_close(layer(IDS), expected)


def test_an_embedding_that_limits_norms_leaves_the_factors_alone() -> None:
    with models.seeded(0):
        model = nn.ModuleDict({"layer": nn.Embedding(8, 6, max_norm=0.5)}).double()
    adapt(model, target_modules=["layer"])
    layer = layer_of(model, "layer")
    a, b = layer.factors("default")
    before = a.detach().clone()
    answer = layer(IDS)
    assert torch.equal(a, before)
    expected = layer.base_layer(IDS) + layer.scaling["default"] * a.T[IDS] @ b.T
    torch.testing.assert_close(answer, expected)
    assert "max_norm" in str(layer.why_not_foldable(["default"]))


# --- dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d"])
def test_dropout_acts_on_the_input_of_A_in_training_only(kind: str) -> None:
    layer, plain = adapted(kind, r=2, lora_dropout=0.5)
    x = LAYERS[kind][1]
    quiet = layer(x)
    assert torch.equal(quiet, layer(x))
    expected = functional_call(plain, {"weight": dense(layer, plain)}, (x,))
    torch.testing.assert_close(quiet, expected)
    layer.train()
    with models.seeded(5):
        dropped = layer(x)
    with models.seeded(5):
        input_of_A = nn.functional.dropout(x, 0.5)
    update = functional_call(plain, {"weight": dense(layer, plain)}, (input_of_A,))
    # The base has seen the whole input, the adapter what was left of it.
    torch.testing.assert_close(dropped, plain(x) + update - plain(input_of_A))


def test_an_adapter_s_dropout_leaves_the_base_s_dropout_layers_alone() -> None:
    model = models.perceptron().train()
    adapt(model, target_modules=["up"], lora_dropout=0.7)
    assert model.drop.p == 0.1
    assert layer_of(model, "up").lora_dropout["default"].p == 0.7
    assert models.perceptron().drop.p == 0.1


# --- what trainers do -------------------------------------------------------------------------


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any(".lora_B." in name for name in found)
    return found


@DEPRECATED
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = models.tiny_llama().train()
    adapt(model, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    ids = models.token_ids()
    expected = gradients(model, ids)
    assert len(expected) == 8
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[int] = []
    layer_of(model, "model.layers.0.self_attn.q_proj").register_forward_hook(
        lambda *_: runs.append(1)
    )
    got = gradients(model, ids)
    assert len(runs) == 2
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


@DEPRECATED
def test_gradient_checkpointing_draws_the_same_dropout_again() -> None:
    model = models.tiny_llama().train()
    adapt(model, target_modules=["q_proj"], lora_dropout=0.5)
    ids = models.token_ids()
    with models.seeded(3):
        expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with models.seeded(3):
        got = gradients(model, ids)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv2d"])
def test_a_layer_compiles_whole_and_switching_recompiles(kind: str) -> None:
    model = nn.ModuleDict({"layer": make(kind)})
    adapt(model, "one", target_modules=["layer"], seed=1)
    state = adapt(model, "two", target_modules=["layer"], seed=2)
    layer, x = layer_of(model, "layer"), LAYERS[kind][1]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for active in (["one", "two"], ["two"], [], ["one"]):
        state.activate(active)
        torch.testing.assert_close(compiled(x), layer(x))
    with state.while_disabled():
        torch.testing.assert_close(compiled(x), make(kind)(x))


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_model_compiles_whole_and_trains() -> None:
    model = models.perceptron().train()
    adapt(model, target_modules=["up", "down"])
    model.eval()
    x = torch.randn(3, 16)
    model(x).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0
    compiled(x).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_an_embedding_with_sparse_gradients_trains_its_factors() -> None:
    model = nn.ModuleDict({"layer": nn.Embedding(8, 6, sparse=True)})
    adapt(model, target_modules=["layer"])
    model["layer"](torch.tensor([1, 2])).sum().backward()
    for parameter in layer_of(model, "layer").tensors("default").values():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
