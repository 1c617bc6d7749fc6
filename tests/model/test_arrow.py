from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.config import ArrowConfig
from lamina.engine.layers import lora_layers
from lamina.errors import FoldError, LaminaError, MissingFileError, RoutingError
from lamina.model.arrow import create_arrow_model, source_of
from tests import models

X = torch.linspace(-1, 1, 96).reshape(2, 3, 16).sin()


def write(directory: Path, count: int, make: Any = models.perceptron, **changes: Any) -> list[str]:
    paths = []
    for index in range(count):
        settings: dict[str, Any] = {"r": 3, "lora_alpha": 2 + index, "target_modules": ["up"]}
        with models.seeded(index + 1):
            config = lamina.LoraConfig(**settings | changes, init_lora_weights=False)
            lamina.get_peft_model(make(), config).save_pretrained(directory / str(index))
        paths.append(str(directory / str(index)))
    return paths


def routed(paths: list[str], general: list[str] | None = None, **settings: Any) -> Any:
    config = ArrowConfig(**{"top_k": 2, "use_gks": bool(general), **settings})
    return create_arrow_model(models.perceptron(), paths, config, general).eval()


def up(model: Any) -> Any:
    return dict(lora_layers(model.get_base_model()))["up"]


def test_the_mixture_is_the_formula(tmp_path: Path) -> None:
    model = routed(write(tmp_path, 3), router_temperature=0.5)
    layer = up(model)
    expected = layer.base_layer(X)
    names = ["task_0", "task_1", "task_2"]
    pairs = [layer.factors(name) for name in names]
    # The first right singular vector, up to its sign.
    fits = torch.stack([(X @ torch.linalg.svd(b @ a).Vh[0]).abs() for a, b in pairs], -1)
    best = fits.topk(2, dim=-1).indices
    kept = torch.full_like(fits, -torch.inf).scatter(-1, best, fits.gather(-1, best))
    weights = torch.softmax(kept / 0.5, dim=-1)
    for index, (a, b) in enumerate(pairs):
        update = X @ a.T @ b.T * layer.scaling[names[index]]
        expected = expected + weights[..., index : index + 1] * update
    # Fifteen steps of power iteration find the vector to about a hundredth.
    torch.testing.assert_close(layer(X), expected, rtol=0.05, atol=0.05)
    assert not torch.allclose(layer(X), layer.base_layer(X), atol=0.1)


def test_general_knowledge_leaves_the_experts_as_they_are(tmp_path: Path) -> None:
    task, general = write(tmp_path / "task", 2), write(tmp_path / "general", 1, lora_alpha=9)
    model = routed(task, general)
    before = {n: up(model).factors(n)[0].clone() for n in ("task_0", "task_1", "gks_0")}
    model(X)
    for name, factor in before.items():
        assert torch.equal(up(model).factors(name)[0], factor), name
    assert not torch.allclose(model(X), routed(task)(X), atol=1e-3)


def test_prototypes_are_kept_until_an_expert_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = routed(write(tmp_path, 3))
    router = up(model).lora_arrow["arrow_router"]
    calls = []
    make = router.top_right_singular_vec_from_BA
    monkeypatch.setattr(
        router, "top_right_singular_vec_from_BA", lambda *a: calls.append(1) or make(*a)
    )
    first = model(X)
    assert len(calls) == 3
    assert torch.equal(model(X), first)
    assert len(calls) == 3
    with torch.no_grad():
        up(model).factors("task_1")[0].neg_().mul_(2)
    assert not torch.allclose(model(X), first)
    assert len(calls) == 4


def test_experts_come_and_go(tmp_path: Path) -> None:
    paths = write(tmp_path, 3)
    model, three = routed(paths[:2]), routed(paths)
    two = model(X)
    model.load_adapter(paths[2], "another")
    torch.testing.assert_close(model(X), three(X))
    assert not torch.allclose(model(X), two)
    model.delete_adapter("another")
    torch.testing.assert_close(model(X), two)
    model.delete_adapter("task_1")
    with pytest.raises(RoutingError, match=r"top_k=2 experts, and there are 1: task_0"):
        model(X)


def test_numbers_do_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    paths = write(tmp_path, 3)
    with models.seeded(1):
        first = routed(paths)(X)
    with models.seeded(2):
        before = torch.get_rng_state()
        model = routed(paths)
        torch.set_rng_state(before)
        assert torch.equal(model(X), first)
        assert torch.equal(torch.get_rng_state(), before)


def test_nothing_of_a_router_trains_or_folds(tmp_path: Path) -> None:
    model = routed(write(tmp_path, 2))
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(FoldError, match="Cannot merge an active Arrow router adapter"):
        model.merge_and_unload()
    with pytest.raises(FoldError, match="Cannot merge an active Arrow router adapter"):
        model.merge_adapter()


def test_an_expert_may_be_used_alone(tmp_path: Path) -> None:
    paths = write(tmp_path, 2)
    model = routed(paths)
    alone = lamina.PeftModel.from_pretrained(models.perceptron(), paths[1]).eval()
    model.set_adapter("task_1")
    torch.testing.assert_close(model(X), alone(X))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"r": 4}, "rank mismatch"),
        ({"target_modules": ["down"]}, "target_modules mismatch"),
        ({"lora_bias": True}, "more than scaling"),
        ({"use_dora": True}, "more than scaling"),
    ],
)
def test_unlike_adapters_are_refused_and_leave_nothing(
    other: dict[str, Any], why: str, tmp_path: Path
) -> None:
    paths = [*write(tmp_path / "one", 1), *write(tmp_path / "other", 1, **other)]
    base = models.perceptron()
    names = set(base.state_dict())
    with pytest.raises(RoutingError, match=why):
        create_arrow_model(base, paths, ArrowConfig(top_k=1))
    assert set(base.state_dict()) == names


def test_convolutions_are_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, 1, lambda: models.convolution_net(2), target_modules=["stem"])
    with pytest.raises(RoutingError, match="only target Linear layers"):
        create_arrow_model(models.convolution_net(2), paths, ArrowConfig(top_k=1))


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    paths = write(tmp_path, 2)
    base = models.perceptron()
    with pytest.raises(RoutingError, match="at least one adapter path"):
        create_arrow_model(base, [], ArrowConfig())
    with pytest.raises(RoutingError, match="general LoRA paths"):
        create_arrow_model(base, paths, ArrowConfig(use_gks=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="does not contain"):
        create_arrow_model(base, [str(tmp_path / "empty")], ArrowConfig())
    with pytest.raises(LaminaError):
        create_arrow_model(base, [paths[0], str(tmp_path / "empty")], ArrowConfig())
    assert not any(isinstance(m, nn.ModuleDict) for m in base.modules())


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name/sub/folder", ("owner/name", "sub/folder")),
        ("alone", ("alone", None)),
    ],
)
def test_a_path_on_the_hub_may_end_in_a_subfolder(path: str, where: Any) -> None:
    assert source_of(path) == where
