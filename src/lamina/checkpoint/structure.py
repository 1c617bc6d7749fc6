"""A model's structure, from its config alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from lamina.errors import CheckpointError


def empty_model(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """A model on the meta device: all its modules, none of its weights.

    Its class is the one that its config names, else the plain model of its kind.

    Raises:
        CheckpointError: there is no config, or of no known kind.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{name_or_path}' has no model config that can be read: {_first_line(error)}",
            cure="give a directory with a config.json, or the id of a model on the hub",
        ) from error
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    kind = getattr(transformers, named, None)
    with torch.device("meta"):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return cast(nn.Module, kind(config))
        auto = (
            transformers.AutoModelForCausalLM
            if named.endswith("ForCausalLM")
            else transformers.AutoModel
        )
        return cast(nn.Module, auto.from_config(config, trust_remote_code=trust_remote_code))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
