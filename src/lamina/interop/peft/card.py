"""The model card that the hub shows for an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lamina.interop.peft.types import VERSION

_PROCEDURE = "## Training procedure"
_VERSIONS = "### Framework versions"
_QUANTISED = "The following `bitsandbytes` quantization config was used during training:"


def write(model: Any, directory: Path) -> None:
    """Write README.md, or complete the one that is there."""
    path = directory / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    base = model.get_base_model()
    card.data["library_name"] = "peft"
    tags = {*(getattr(base, "model_tags", None) or ()), *_tags(model, base)}
    if tags:
        card.data["tags"] = sorted(tags)
    if not card.data.pipeline_tag and model._task == "CAUSAL_LM":
        card.data.pipeline_tag = "text-generation"
    config = model.base_model.get_model_config(base)
    if "_name_or_path" in config:
        card.data["base_model"] = config["_name_or_path"]
    lines = card.text.splitlines()
    _describe_quantisation(lines, base)
    _insert(lines, _VERSIONS, f"- PEFT {VERSION}")
    card.text = "\n".join(lines)
    card.save(path)


def _tags(model: Any, base: Any) -> list[str]:
    from transformers import PreTrainedModel

    tags = ["transformers"] if isinstance(base, PreTrainedModel) else []
    tags.append("lora")
    name = getattr(base, "name_or_path", None)
    return tags if name is None else [*tags, f"base_model:adapter:{name}"]


def _describe_quantisation(lines: list[str], base: Any) -> None:
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is None or _QUANTISED in lines:
        return
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    text = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    _insert(lines, _PROCEDURE, f"\n{_QUANTISED}\n{text}\n")


def _insert(lines: list[str], heading: str, text: str) -> None:
    """Put a text below a heading, once."""
    if text in lines:
        return
    if heading in lines:
        lines.insert(lines.index(heading) + 2, text)
    else:
        lines.append(f"{heading}\n\n{text}")
