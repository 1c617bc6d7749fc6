"""All targets by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lamina.checkpoint.export.gguf import Gguf
from lamina.checkpoint.export.mlx import Mlx
from lamina.checkpoint.export.ollama import Ollama
from lamina.checkpoint.export.peft import Peft
from lamina.checkpoint.export.target import Target
from lamina.checkpoint.export.vllm import Vllm
from lamina.errors import ExportError, nearest

_ALL: tuple[Target, ...] = (Vllm(), Gguf(), Mlx(), Ollama(), Peft())
TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _ALL})


def target_named(name: str) -> Target:
    """The target of a name.

    Raises:
        ExportError: there is none.
    """
    if name in TARGETS:
        return TARGETS[name]
    close = nearest(name, TARGETS)
    raise ExportError(
        f"There is no target {name!r}; there are {', '.join(TARGETS)}.",
        cure=f"did you mean {close[0]!r}?" if close else None,
    )
