"""What an export has to know of the base: its architecture and heads; no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lamina.errors import ExportError


@dataclass(frozen=True)
class BaseConfig:
    """The part of a base's `config.json` that names and layouts depend on.

    Attributes:
        source: where it was read.
        architecture: the class of the model, such as "LlamaForCausalLM".
        model_type: as transformers has it, such as "llama".
        layers: number of blocks.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
        tied: whether the output shares the weight of the input embedding.
    """

    source: str
    architecture: str
    model_type: str
    layers: int
    heads: int | None
    kv_heads: int | None
    tied: bool


def read_base_config(path_or_id: str) -> BaseConfig:
    """Read a base's config from a directory or the hub; no code of it is run.

    Raises:
        ExportError: it isn't there, or is no language model.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except Exception as error:
        # A file that is no config makes transformers raise whatever it likes.
        said = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"The config of the base '{path_or_id}' can't be read: {said}",
            cure="--base DIR with the base's config.json; its weights are not needed for that",
        ) from error
    architectures = getattr(config, "architectures", None) or ()
    return base_config(config, architectures[0] if architectures else None, source=path_or_id)


def base_config(config: Any, architecture: str | None, *, source: str) -> BaseConfig:
    """What an export has to know, from the config of transformers.

    Args:
        config: of the base.
        architecture: the class of the model.
        source: where it was read, for messages.

    Raises:
        ExportError: it names no architecture, or no blocks.
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if architecture is None or layers is None:
        raise ExportError(
            f"The config of the base '{source}' names no architecture, or no layers.",
            cure="give the directory of the base as transformers saves it",
        )
    heads = getattr(text, "num_attention_heads", None)
    return BaseConfig(
        source=source,
        architecture=architecture,
        model_type=text.model_type,
        layers=layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )
