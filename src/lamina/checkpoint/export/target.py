"""What every target of an export does: check, write, and read back what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from lamina.checkpoint.export.base_config import BaseConfig
from lamina.checkpoint.export.contents import Contents, Finding
from lamina.checkpoint.export.updates import Updates
from lamina.checkpoint.export.vllm_ranks import VLLM_DEFAULT_RANK
from lamina.engine.compose import Factors


@dataclass(frozen=True)
class Options:
    """What an export was asked for.

    Attributes:
        max_rank: the largest rank that the server takes (vLLM's `--max-lora-rank`).
        rank: what larger ranks are compressed to first; None leaves them.
        dtype: of the factors in the file; None keeps theirs.
        base: the config of the base; None if it isn't known.
        served_base: what the program calls the base (ollama's `FROM`).
        keep_record: whether the stage record goes along, where the format has a place for it.
    """

    max_rank: int = VLLM_DEFAULT_RANK
    rank: int | None = None
    dtype: torch.dtype | None = None
    base: BaseConfig | None = None
    served_base: str | None = None
    keep_record: bool = True


@dataclass(frozen=True)
class Checked:
    """What a target has to say of an adapter before anything is written.

    Attributes:
        faults: why the program would refuse it, or answer something else; each with its cure.
        notes: what to know.
    """

    faults: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)


class Target(Protocol):
    """One program, or one format."""

    @property
    def name(self) -> str:
        """As it is asked for: "vllm"."""

    @property
    def program(self) -> str:
        """As it is called: "vLLM"."""

    @property
    def files(self) -> Sequence[str]:
        """The names of what it writes."""

    @property
    def needs_base(self) -> bool:
        """Whether the base's config has to be known."""

    @property
    def takes_tokenizer(self) -> bool:
        """Whether it looks for a tokenizer beside the adapter."""

    def check(self, contents: Contents, options: Options) -> Checked:
        """What the program can't take, all of it, and what to know; nothing is read but headers."""

    def write(self, updates: Updates, directory: Path, options: Options) -> None:
        """Write the files into a directory that nobody reads yet."""

    def read_back(self, updates: Updates, directory: Path, options: Options) -> dict[str, Factors]:
        """Module -> the update that the program would compute, from the written files.

        Args:
            updates: what was written, for the names of its modules.
            directory: where it was written.
            options: as it was written.
        """
