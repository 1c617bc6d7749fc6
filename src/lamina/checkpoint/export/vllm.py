"""For vLLM: a plain PEFT adapter with one scaling, which every release reads the same way.

Older releases take `lora_alpha / r` for all modules, newer ones the patterns too; both are the
same number here. B takes in what differs, rounded once.

Source: vLLM 0.33, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.export.limits import vllm_faults, vllm_notes
from lamina.checkpoint.export.peft_files import (
    factor_tensors,
    metadata_for,
    plain_config,
    read_config,
    read_tensors,
    write_peft,
)
from lamina.checkpoint.export.target import Checked, Options
from lamina.checkpoint.export.updates import Updates, in_dtype, loses_digits, one_scaling
from lamina.checkpoint.origin import PREFIX
from lamina.checkpoint.shapes import FactorShapes
from lamina.engine.compose import Factors


class Vllm:
    """`vllm serve BASE --enable-lora --lora-modules NAME=DIR`."""

    name = "vllm"
    program = "vLLM"
    files = ("adapter_config.json", "adapter_model.safetensors")
    needs_base = False
    takes_tokenizer = True

    def check(self, contents: Contents, options: Options) -> Checked:
        """See `lamina.checkpoint.export.limits`."""
        return Checked(
            vllm_faults(contents, options.max_rank, rank=options.rank), vllm_notes(contents)
        )

    def write(self, updates: Updates, directory: Path, options: Options) -> None:
        """Write both files; the record stays in the header, which vLLM doesn't read."""
        contents = updates.contents
        factors, scaling = one_scaling(updates)
        factors = {name: in_dtype(each, options.dtype) for name, each in factors.items()}
        heads = {
            f"{PREFIX}{name}": updates.others[f"{PREFIX}{name}"]
            for names in contents.wholes.values()
            for name in names
        }
        tensors = {**factor_tensors(contents, factors), **heads}
        ranks = {contents.parameter_name(each): contents.rank_of(each) for each in contents.factors}
        rounded = loses_digits(updates, options.dtype)
        write_peft(
            directory,
            plain_config(contents, ranks, scaling),
            tensors,
            metadata_for(contents, tensors, keep=options.keep_record, rounded=rounded),
        )

    def read_back(self, updates: Updates, directory: Path, options: Options) -> dict[str, Factors]:
        """By the rule of the older releases: one `lora_alpha / r` for all modules."""
        config, tensors = read_config(directory), read_tensors(directory)
        scaling = config["lora_alpha"] / config["r"]
        return {
            each.module: Factors(*_pair(tensors, updates.contents, each), scaling)
            for each in updates.contents.factors
        }


def _pair(
    tensors: dict[str, torch.Tensor], contents: Contents, each: FactorShapes
) -> tuple[torch.Tensor, torch.Tensor]:
    names = ("lora_A.weight", "lora_B.weight")
    if contents.is_embedding(each):
        names = ("lora_embedding_A", "lora_embedding_B")
    a, b = (tensors[f"{PREFIX}{each.module}.{name}"] for name in names)
    return a, b
