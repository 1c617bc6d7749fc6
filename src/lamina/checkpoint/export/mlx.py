"""For mlx-lm: `adapters.safetensors` with factors the other way round, of one rank.

mlx-lm gives all its layers one rank and one scale, `y += scale * (x @ lora_a) @ lora_b`: smaller
ranks are filled up with zeros, and B takes in what differs in scaling, rounded once.

Source: mlx-lm 0.32, `mlx_lm/tuner/utils.py` (`load_adapters`), `mlx_lm/tuner/lora.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lamina.checkpoint.export.architectures import MLX_MODEL_TYPES
from lamina.checkpoint.export.contents import Contents, Finding
from lamina.checkpoint.export.peft_files import metadata_for
from lamina.checkpoint.export.plain import plain_faults, table_faults
from lamina.checkpoint.export.target import Checked, Options
from lamina.checkpoint.export.updates import Updates, in_dtype, one_scaling, padded
from lamina.engine.compose import Factors

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_MERGE = "`lamina merge DIR -o MODEL` makes an ordinary model of it, for `mlx_lm.convert`"
# A module in a block: the list of blocks, the block's number, the name inside.
_IN_BLOCK = re.compile(r"^(.*\.)?layers\.(\d+)\.(.+)$")


class Mlx:
    """`mlx_lm.generate --model BASE --adapter-path DIR`."""

    name = "mlx"
    program = "mlx-lm"
    files = (WEIGHTS, CONFIG)
    needs_base = False
    takes_tokenizer = False

    def check(self, contents: Contents, options: Options) -> Checked:
        """What mlx-lm would refuse or leave out."""
        faults = plain_faults(contents, self.program, _MERGE, takes_parameters=False)
        base = options.base
        if base is None:
            note = Finding(
                "the base is not known: whether MLX calls its layers so is not checked",
                "--base DIR with the base's config.json",
            )
            return Checked(faults, [note])
        if base.model_type not in MLX_MODEL_TYPES:
            known = ", ".join(MLX_MODEL_TYPES)
            faults.append(
                Finding(
                    f"how MLX names the layers of a {base.model_type} is not known here",
                    f"known are {known}; for others {_MERGE}",
                )
            )
        faults += table_faults(contents, self.program, _MERGE, tied=base.tied)
        return Checked(faults)

    def write(self, updates: Updates, directory: Path, options: Options) -> None:
        """Write both files; the record stays in the header."""
        factors, scaling = one_scaling(updates)
        rank = max(each.rank for each in factors.values())
        tensors = {}
        for module in sorted(factors):
            whole = in_dtype(padded(factors[module], rank), options.dtype)
            tensors[f"{module}.lora_a"] = whole.A.mT.contiguous()
            tensors[f"{module}.lora_b"] = whole.B.mT.contiguous()
        metadata = metadata_for(updates.contents, None, keep=options.keep_record)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "mlx", **metadata})
        layers = options.base.layers if options.base else -1
        config: dict[str, Any] = {
            "fine_tune_type": "lora",
            # The last so many blocks; -1 means all.
            "num_layers": layers,
            "lora_parameters": {
                "rank": rank,
                "scale": scaling,
                "dropout": 0.0,
                "keys": keys(list(factors)),
            },
        }
        (directory / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")

    def read_back(self, updates: Updates, directory: Path, options: Options) -> dict[str, Factors]:
        """As mlx-lm computes it."""
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
        scale = config["lora_parameters"]["scale"]
        return {
            name.removesuffix(".lora_a"): Factors(
                a.mT, tensors[f"{name.removesuffix('a')}b"].mT, scale
            )
            for name, a in tensors.items()
            if name.endswith(".lora_a")
        }


def keys(modules: list[str]) -> list[str]:
    """What `lora_parameters.keys` has to name: names inside a block, and whole ones outside.

    A block that lacks one of them gets a layer there whose B is zero.
    """
    inside = {match[3] for match in map(_IN_BLOCK.match, modules) if match}
    outside = {module for module in modules if not _IN_BLOCK.match(module)}
    return sorted(inside | outside)
