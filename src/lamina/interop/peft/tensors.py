"""Adapters, and the base under them, as dicts of tensors."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from lamina.checkpoint.load import fill_adapter
from lamina.checkpoint.report import LoadReport
from lamina.engine.inject import find_state
from lamina.engine.names import places, way_in
from lamina.interop.peft.embeddings import embedding_tensors
from lamina.interop.peft.experts import fuse_tensors
from lamina.interop.peft.types import PeftWarning
from lamina.model import state_dict as native
from lamina.storage.source import find_adapter

__all__ = [
    "LoadResult",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]

_HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: Any = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by their names on disk; shards that weren't gathered warn."""
    found = native.get_peft_model_state_dict(model, state_dict, adapter_name, unwrap_compiled)
    state = find_state(model)
    assert state is not None
    of_base = embedding_tensors(model, state.configs[adapter_name], save_embedding_layers)
    found |= {key: (state_dict or {}).get(key, tensor) for key, tensor in of_base.items()}
    flat = [
        f"{key}: {tuple(tensor.shape)}"
        for key, tensor in found.items()
        if (".lora_A" in key or ".lora_B" in key) and not key.endswith("bias")
        if tensor.dim() < 2 or not tensor.numel()
    ]
    if flat:
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(flat)} LoRA tensor(s) have invalid shape, such as "
            f"{flat[0]}. Probably DeepSpeed ZeRO-3 / FSDP shards were not gathered before saving, "
            "so that they are incomplete.",
            PeftWarning,
            stacklevel=2,
        )
    return found


class LoadResult(NamedTuple):
    """What a load left out, by the names in the model and in the file."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_result(report: LoadReport, adapter: str) -> LoadResult:
    """A report as peft tells it: missing tensors by their names in the model."""
    return LoadResult(
        [in_model(key, adapter) for key in report.missing_keys], list(report.unexpected_keys)
    )


def in_model(key: str, adapter: str) -> str:
    """The name in the model of a tensor of an adapter, from its name on disk."""
    named = re.sub(r"\.(lora_(?:A|B|magnitude_vector))(\.|$)", rf".\1.{adapter}\2", key)
    return re.sub(r"\.(lora_embedding_[AB])$", rf".\1.{adapter}", named)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Put tensors, by their names on disk, into an adapter; what doesn't fit is reported.

    Raises:
        RuntimeError: a tensor has another shape, and that is not to be ignored.
    """
    state = find_state(model)
    if state is None or adapter_name not in state.configs:
        raise KeyError(adapter_name)
    fused = fuse_tensors(model, peft_model_state_dict)
    report = fill_adapter(
        model,
        adapter_name,
        state,
        {key: value.detach().clone() for key, value in fused.items()},
        strict=False,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    warn_mismatched(report, type(model).__name__)
    return load_result(report, adapter_name)


def warn_mismatched(report: LoadReport, model: str) -> None:
    """Warn of tensors that were left out because of their shapes."""
    lines = [
        f"- {key}: found shape {torch.Size(theirs)} in the checkpoint and {torch.Size(ours)} in "
        "the model instantiated"
        for key, theirs, ours in report.mismatched_keys
    ]
    if lines:
        text = "\n".join(lines)
        warnings.warn(
            f"Some weights of {model} were not initialized from the model checkpoint and are being "
            f"ignored because you passed `ignore_mismatched_sizes=True`: {text}.",
            stacklevel=3,
        )


def load_peft_weights(
    model_id: str,
    device: str | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    **hub_options: Any,
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter on disk or the hub, by their names there.

    Raises:
        ValueError: there are none.
    """
    from lamina.checkpoint.adapter import _read_weights
    from lamina.interop.peft.parts import infer_device

    options = {name: hub_options[name] for name in _HUB if hub_options.get(name) is not None}
    try:
        files = find_adapter(model_id, allow_pickle=True, **options)
    except FileNotFoundError as error:
        raise ValueError(f"Can't find weights for {model_id} in {model_id}.") from error
    tensors, _ = _read_weights(files, torch.device(device or infer_device()))
    return {_mapped(key, key_mapping or {}): tensor for key, tensor in tensors.items()}


def _mapped(key: str, mapping: dict[str, str]) -> str:
    if not mapping:
        return key
    prefix = next((p for p in ("base_model.model.", "base_model.") if key.startswith(p)), "")
    plain = key.removeprefix(prefix)
    for pattern, replacement in mapping.items():
        changed, count = re.subn(pattern, replacement, plain)
        if count:
            return prefix + changed
    return key


def _base_names(model: Any) -> dict[str, str]:
    """The base's own name of each of its tensors -> its name in the adapted model."""
    inner = model.get_base_model()
    wraps: dict[str, str] = {}
    found: dict[str, str] = {}
    for place in places(inner):
        wraps[place.name] = way_in(place.module)
        own = {*place.original._parameters, *place.original._buffers}
        own -= place.original._non_persistent_buffers_set
        for leaf in own:
            if getattr(place.original, leaf, None) is not None:
                name = f"{place.name}.{leaf}" if place.name else leaf
                found[name] = _through(name, wraps)
    return found


def get_base_model_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """The base model's tensors by the names that they have without adapters."""
    inner = model.get_base_model()
    values = inner.state_dict()
    back = {there: own for own, there in _base_names(model).items()}
    return {back[key]: value for key, value in values.items() if key in back}


def _through(name: str, wraps: dict[str, str]) -> str:
    parts, path = [], ""
    for part in name.split("."):
        parts.append(part)
        path = f"{path}.{part}" if path else part
        parts += filter(None, wraps.get(path, "").split("."))
    return ".".join(parts)


def set_base_model_state_dict(
    model: Any, state_dict: dict[str, torch.Tensor], strict: bool = True
) -> LoadResult:
    """Load tensors, by the names that they have without adapters, into the base model.

    Raises:
        RuntimeError: with `strict`, some are missing or have no place.
    """
    inner = model.get_base_model()
    names = _base_names(model)
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    if strict and (missing or unexpected):
        lines = [f"Missing key(s) in state_dict: {missing}"] if missing else []
        lines += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected else []
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(lines))
    found = {names[key]: value for key, value in state_dict.items() if key in names}
    inner.load_state_dict(found, strict=False)
    return LoadResult(missing, unexpected)
