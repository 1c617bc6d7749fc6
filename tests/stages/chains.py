"""Chains of stages over tiny models, and what to compare them by."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamina.config import LoraConfig
from lamina.engine.layers import lora_layers
from lamina.model import PeftModel
from lamina.stages import begin_stage, save_stage
from tests import models
from tests.adapters import weights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Build = Callable[[], nn.Module]


def llama_lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def fill_trainable(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Move everything that trains to seeded random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.data.copy_(noise)


def run_stage(
    path: Path,
    config: LoraConfig | None = None,
    *,
    parent: Path | None = None,
    mode: str | None = None,
    build: Build = models.tiny_llama,
    seed: int | None = None,
    **options: Any,
) -> PeftModel:
    """Begin a stage named after the directory, train it in thought, save it."""
    model = begin_stage(
        build(), name=path.name, parent=parent, mode=mode, config=config, **options
    ).eval()
    fill_trainable(model, seed=sum(map(ord, path.name)) if seed is None else seed)
    save_stage(model, path)
    return model


def run_chain(
    folder: Path, stages: Iterable[tuple[str, str | None, LoraConfig | None]], **options: Any
) -> tuple[PeftModel, Path]:
    """Run (name, mode, config) one after another; the last model and its directory."""
    parent = None
    for name, mode, config in stages:
        model = run_stage(folder / name, config, parent=parent, mode=mode, **options)
        parent = folder / name
    assert parent is not None
    return model, parent


def inputs_for(model: nn.Module) -> dict[str, Tensor] | Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    generator = torch.Generator().manual_seed(5)
    if isinstance(base, models.Perceptron):
        return torch.randn(4, 16, generator=generator)
    if isinstance(base, models.ConvolutionNet):
        dimensions = base.stem.weight.dim() - 2
        return torch.randn(2, 3, *[9] * dimensions, generator=generator)
    if isinstance(base, models.EmbeddingNet):
        return models.token_ids(seed=5)
    return {"input_ids": models.token_ids(seed=5)}


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    given = inputs_for(model)
    out = model(**given) if isinstance(given, dict) else model(given)
    return out if isinstance(out, Tensor) else out.logits


def open_with_peft(path: Path, build: Build = models.tiny_llama) -> nn.Module:
    with warnings.catch_warnings():
        # peft warns about Conv1D's fan_in_fan_out and the like; here its numbers count.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(build(), str(path)).eval()


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / WEIGHTS)


def config_of(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / CONFIG).read_text())
    return values


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path / WEIGHTS, framework="pt") as opened:
        return dict(opened.metadata())


def rewrite_record(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the record in a stage's file, and nothing else."""
    metadata, tensors = metadata_of(path), tensors_of(path)
    record = json.loads(metadata["lamina"])
    change(record)
    save_file(tensors, path / WEIGHTS, {**metadata, "lamina": json.dumps(record)})


def own_factors(model: PeftModel, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain module name -> copies of A and B of one adapter."""
    return {
        path: tuple(factor.detach().clone() for factor in layer.factors(adapter))  # type: ignore[misc]
        for path, layer in lora_layers(model.get_base_model())
        if adapter in layer.records
    }


def deltas_in(path: Path) -> dict[str, Any]:
    """Plain module name -> `alpha/r * B @ A` in float64, by the file's own numbers."""
    tensors, config = tensors_of(path), config_of(path)
    found = {}
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace("lora_A", "lora_B")]
        scaling = config["lora_alpha"] / config["r"]
        found[module] = scaling * (b.double().numpy() @ a.double().numpy())
    return found


def ulps(one: Tensor, other: Tensor) -> float:
    """The largest distance in units in the last place of fp32."""
    a, b = one.float().numpy(), other.float().numpy()
    return float(np.max(np.abs(a.astype(np.float64) - b) / np.spacing(np.abs(b))))


def wide() -> nn.Module:
    """Large enough for a file of 2 MB, which takes a while to write."""
    with models.seeded(0):
        return nn.Sequential(nn.Linear(1024, 1024))


class Snapshot:
    """A model's state, to see that nothing has been changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = weights(model)
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.modules = [(name, type(module)) for name, module in model.named_modules()]
        self.training = [module.training for module in model.modules()]

    def check(self) -> None:
        now = Snapshot(self.model)
        assert list(now.weights) == list(self.weights)
        for name, tensor in self.weights.items():
            assert now.weights[name].dtype == tensor.dtype
            assert torch.equal(now.weights[name], tensor), name
        assert now.flags == self.flags
        assert now.modules == self.modules
        assert now.training == self.training


def requires_grad(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def save_plain_peft(
    path: Path, settings: Mapping[str, Any], build: Build = models.tiny_llama
) -> Tensor:
    """An adapter that the real peft made and wrote; what its model answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(), peft.LoraConfig(**settings))
        fill_trainable(model, seed=7)
        model.save_pretrained(str(path))
    return answer(model.eval())
