"""For PEFT and all that reads its files: tensors as they are, a config without empty fields.

An older release stops at a field that it doesn't know; those that say nothing are left out, so it
stops only where it would compute something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.checkpoint.adapter import WEIGHTS_NAME
from lamina.checkpoint.export.contents import Contents, Finding, sort_contents
from lamina.checkpoint.export.peft_files import (
    metadata_for,
    read_config,
    read_tensors,
    write_peft,
)
from lamina.checkpoint.export.target import Checked, Options
from lamina.checkpoint.export.updates import Updates, in_dtype, loses_digits
from lamina.checkpoint.header import read_header
from lamina.config import LoraConfig
from lamina.engine.compose import Factors

# What every release knows, and takes for something else where it isn't there.
_ALWAYS = frozenset(
    {
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "r",
        "target_modules",
    }
)
# What says which release wrote a file, and concerns no other.
_NEVER = frozenset({"peft_version", "megatron_core", "runtime_config"})


class Peft:
    """`PeftModel.from_pretrained(base, DIR)`."""

    name = "peft"
    program = "PEFT"
    files = ("adapter_config.json", WEIGHTS_NAME)
    needs_base = False
    takes_tokenizer = True

    def check(self, contents: Contents, options: Options) -> Checked:
        """PEFT takes whatever Lamina reads; only what is broken is told."""
        return Checked([Finding(line, "save or download it again") for line in contents.halves])

    def write(self, updates: Updates, directory: Path, options: Options) -> None:
        """Write both files."""
        contents = updates.contents
        tensors = dict(updates.others)
        for each in contents.factors:
            factors = updates.factors[each.module]
            if options.dtype is not None:
                factors = in_dtype(factors, options.dtype)
            tensors.update(zip(each.keys, (factors.A, factors.B), strict=True))
        rounded = loses_digits(updates, options.dtype)
        write_peft(
            directory,
            without_empty(contents.config),
            tensors,
            metadata_for(contents, tensors, keep=options.keep_record, rounded=rounded),
        )

    def read_back(self, updates: Updates, directory: Path, options: Options) -> dict[str, Factors]:
        """As PEFT computes it: by its patterns."""
        header, _ = read_header(directory / WEIGHTS_NAME)
        contents = sort_contents(str(directory), read_config(directory), header)
        tensors = read_tensors(directory)
        return {
            each.module: Factors(
                tensors[each.keys[0]], tensors[each.keys[1]], contents.scaling(each)
            )
            for each in contents.factors
        }


def without_empty(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that say something: those that aren't at their defaults."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(LoraConfig)
        if field.default is not dataclasses.MISSING
    }
    return {
        name: value
        for name, value in config.items()
        if name in _ALWAYS
        or (
            name not in _NEVER
            and value not in (None, [], {})
            and not (name in defaults and value == defaults[name])
        )
    }
