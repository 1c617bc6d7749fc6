"""LoftQ over a base that is quantised already: factors from the weights on disk.

Source: arXiv:2310.08659.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lamina.engine.init.loftq import low_rank
from lamina.engine.inject import find_state
from lamina.engine.layers import LoraLayer
from lamina.engine.names import adapted_layers
from lamina.engine.weights import DenseWeight, OpaqueWeight
from lamina.errors import AdapterNameError, InitialisationError, MissingFileError
from lamina.storage.shards import weight_map

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PREFIX = "base_model.model."


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Let an adapter make up for what quantisation has lost: `B A` close to `W - Q(W)`, at rank r.

    W is read from the dense model's files, layer by layer; Q(W) is what the model holds.

    Args:
        peft_model: an adapted model with quantised layers.
        model_path: the dense model's directory or safetensors file; None takes where the base
            was loaded from.
        adapter_name: the adapter.
        callback: model, layer's name -> whether to keep the layer's new factors; for example
            whether its answers have come closer to the dense model's.

    Raises:
        InitialisationError: with everything that is wrong; nothing has been changed.
        MissingFileError: the dense model isn't there.
    """
    state = find_state(peft_model)
    if state is None:
        raise AdapterNameError(
            "The passed model does not appear to be a valid PeftModel.",
            cure="get_peft_model(model, config) first",
        )
    state.check_known([adapter_name])
    layers = dict(_quantised(peft_model, adapter_name))
    source = _Dense(peft_model, model_path)
    _check(layers, source)
    for name, layer in layers.items():
        before = {leaf: t.detach().clone() for leaf, t in layer.tensors(adapter_name).items()}
        _replace(layer, adapter_name, source.read(name))
        if callback is not None and not callback(peft_model, name):
            for leaf, tensor in layer.tensors(adapter_name).items():
                tensor.data.copy_(before[leaf])


def _quantised(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, layer in adapted_layers(model):
        dense = isinstance(layer.weight_view, DenseWeight)
        if layer.kind == "linear" and adapter in layer.records and not dense:
            yield name.removeprefix(_PREFIX), layer


def _check(layers: dict[str, LoraLayer], source: _Dense) -> None:
    if not layers:
        raise InitialisationError(
            "No bnb LoRA module found on the model: none of its layers is quantised.",
            cure="load the base with BitsAndBytesConfig(load_in_4bit=True)",
        )
    faults = [
        f"{name}: {layer.weight_view.why_not_writable}"
        for name, layer in layers.items()
        if isinstance(layer.weight_view, OpaqueWeight)
    ]
    faults += [
        f"{name}: {source.label} has no weight for it" for name in layers if name not in source
    ]
    if faults:
        raise InitialisationError(
            f"LoftQ can't begin {len(faults)} of {len(layers)} layers; nothing was changed.",
            faults=faults[:8],
            cure="give the model that was quantised as model_path",
        )


def _replace(layer: LoraLayer, adapter: str, dense: torch.Tensor) -> None:
    held = layer.weight_view.read().float()
    residual = dense.to(held.device).float() - held
    if getattr(layer, "fan_in_fan_out", False):
        residual = residual.T
    B, A = low_rank(residual, layer.records[adapter].r)
    a, b = layer.factors(adapter)
    a.data.copy_(A)
    b.data.copy_(B)


class _Dense:
    """The weights of a model on disk."""

    def __init__(self, model: nn.Module, path: str | Path | None) -> None:
        get_base: Any = getattr(model, "get_base_model", lambda: model)
        self._base = get_base()
        self.label = str(path) if path is not None else self._name()
        self._files = dict(_files(_local(self.label)))
        # A model for a task may have been saved as what it is made of.
        self._without = f"{getattr(self._base, 'base_model_prefix', '')}."

    def _name(self) -> str:
        name = getattr(self._base, "name_or_path", None)
        if not name:
            raise InitialisationError(
                "The model doesn't say where it was loaded from.",
                cure="replace_lora_weights_loftq(model, model_path=...), the dense model's "
                "directory",
            )
        return str(name)

    def _key(self, name: str) -> str | None:
        keys = (f"{name}.weight", f"{name.removeprefix(self._without)}.weight")
        return next((key for key in keys if key in self._files), None)

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def read(self, name: str) -> torch.Tensor:
        """A layer's weight, by the layer's name."""
        key = self._key(name)
        assert key is not None
        with safe_open(self._files[key], framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor


def _local(label: str) -> Path:
    path = Path(label)
    if path.exists() or path.suffix == ".safetensors" or len(path.parts) > 2 or path.is_absolute():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(label, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise MissingFileError(
            f"The model.safetensors file of {label} must be present on disk, but it could not be "
            "found.",
            cure="replace_lora_weights_loftq(model, model_path=...), the dense model's directory",
        ) from error


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """(tensor's name, file) of all tensors."""
    index = path / _INDEX
    if path.is_dir() and index.is_file() and not (path / _FILE).is_file():
        for name, shard in weight_map(index, str(index)).items():
            yield name, path / shard
        return
    file = path if path.suffix == ".safetensors" else path / _FILE
    if not file.is_file():
        raise MissingFileError(
            f"Could not find file for {file}, ensure that there is a (sharded) safetensors file of "
            "the model.",
            cure="dense_model.save_pretrained(path)",
        )
    with safe_open(file, framework="pt") as held:
        names = list(held.keys())
    for name in names:
        yield name, file
