"""Refuse what can't be adapted: a model that is adapted already, and what is no model or config."""

from __future__ import annotations

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.inject import find_state
from lamina.errors import AlreadyAdaptedError, ConfigError, NoModelError


def refuse_adapted(model: nn.Module) -> None:
    """Raise unless the model is free of adapters.

    Raises:
        NoModelError: it is no model at all.
        AlreadyAdaptedError: with the adapters found and the three ways on.
    """
    if not isinstance(model, nn.Module):
        raise NoModelError(
            f"A {type(model).__name__} was given where a model is wanted.",
            cure="load the model first: AutoModelForCausalLM.from_pretrained(...)",
        )
    state = find_state(model)
    foreign = None if state else foreign_adapters(model)
    if state is None and foreign is None:
        return
    names = list(state.configs) if state else foreign
    raise AlreadyAdaptedError(
        f"The model already has adapters: {', '.join(map(repr, names or []))}. A second wrapping "
        "would nest them and save names that nothing can load.",
        faults=[
            _way("continue", "", "trains the same adapter on"),
            _way("stack", ", config=config", "trains a new one over the frozen old one"),
            _way("merge", ", config=config", "trains a new one over the old one, folded in"),
        ],
        cure="save the adapter to DIR, load the base model afresh, and choose one of these; or, on "
        'this model, model.add_adapter("next", config) and '
        'model.set_adapter([..., "next"], train=["next"])',
    )


def lora_config(config: object) -> LoraConfig:
    """The config, if it is one.

    Raises:
        ConfigError: it is none, or another library's.
    """
    if isinstance(config, LoraConfig):
        return config
    kind = type(config)
    library = kind.__module__.partition(".")[0]
    cure = "LoraConfig(r=16, target_modules='all-linear')"
    if isinstance(config, dict):
        cure = "PeftConfig.from_dict(values)"
    elif hasattr(config, "to_dict"):
        cure = "lamina.PeftConfig.from_dict(config.to_dict())"
    name = kind.__name__ if library == "builtins" else f"{library}.{kind.__name__}"
    raise ConfigError(f"A {name} was given where a lamina.LoraConfig is wanted.", cure=cure)


def _way(mode: str, more: str, what: str) -> str:
    call = f'lamina.begin_stage(base, name="next", parent=DIR, mode="{mode}"{more})'
    return f"{mode}: {call} {what}"


def foreign_adapters(model: nn.Module) -> list[str] | None:
    """The adapters that another library has put into a model; None if there are none."""
    for module in model.modules():
        parts = module._modules
        if "base_layer" in parts and ("lora_A" in parts or "lora_embedding_A" in parts):
            places = (parts.get("lora_A"), parts.get("lora_embedding_A"))
            return sorted({name for place in places if place is not None for name in _keys(place)})
    return None


def _keys(place: nn.Module) -> list[str]:
    return [*place._modules, *place._parameters]
