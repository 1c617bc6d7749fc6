"""For llama.cpp: a LoRA in GGUF.

The file has one alpha, and llama.cpp multiplies each update by `alpha / r`, r being the rank of
that tensor: B takes in what differs, rounded once. Rows of B lie in the order in which llama.cpp
has the rows of the weight.

Source: llama.cpp, `src/llama-adapter.cpp` (what is read) and `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina.checkpoint.export.architectures import (
    GGUF_ARCHITECTURES,
    Architecture,
    rotate_rows,
    unrotate_rows,
)
from lamina.checkpoint.export.base_config import BaseConfig
from lamina.checkpoint.export.contents import Contents, Finding
from lamina.checkpoint.export.peft_files import metadata_for
from lamina.checkpoint.export.plain import plain_faults, some, table_faults
from lamina.checkpoint.export.target import Checked, Options
from lamina.checkpoint.export.updates import Updates, with_scaling
from lamina.checkpoint.record import KEY
from lamina.engine.compose import Factors
from lamina.extras import require

FILE = "adapter.gguf"
_TABLE = "token_embd.weight"
_MERGE = (
    "`lamina merge DIR -o MODEL` makes an ordinary model of it, for llama.cpp's convert_hf_to_gguf"
)
# torch's dtype -> the name of GGUF's, and of its kind of file.
_DTYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}


class Gguf:
    """`llama-server -m base.gguf --lora adapter.gguf`."""

    name = "gguf"
    program = "llama.cpp"
    files: Sequence[str] = (FILE,)
    needs_base = True
    takes_tokenizer = False
    # llama-server looks for the tokens from which such an adapter acts.
    takes_methods: Sequence[str] = ("aLoRA",)

    def check(self, contents: Contents, options: Options) -> Checked:
        """What llama.cpp would refuse, crash on or leave out."""
        faults = [
            *plain_faults(
                contents,
                self.program,
                _MERGE,
                takes_parameters=False,
                takes_methods=self.takes_methods,
            ),
            *_base_faults(options.base),
        ]
        architecture = _known(options.base)
        if options.base is not None and architecture is not None:
            tied = options.base.tied or not architecture.own_head
            faults += table_faults(contents, self.program, _MERGE, tied=tied)
            faults += _name_faults(contents, options.base, architecture)
        return Checked(faults)

    def write(self, updates: Updates, directory: Path, options: Options) -> None:
        """Write `adapter.gguf`; the stage record goes along as the string `lamina`."""
        gguf = require("gguf", "export")
        base, architecture = _settled(options)
        names = tensor_names(updates.contents, base, architecture)
        alpha = common_alpha(updates.factors)
        kind, file_kind = _DTYPES[options.dtype or torch.float32]
        writer = gguf.GGUFWriter(directory / FILE, architecture.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        invoked_by = updates.contents.config.get("alora_invocation_tokens")
        if invoked_by:
            key, kinds = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, gguf.GGUFValueType
            writer.add_key_value(key, invoked_by, kinds.ARRAY, kinds.UINT32)
        writer.add_file_type(getattr(gguf.LlamaFileType, file_kind))
        record = metadata_for(updates.contents, None, keep=options.keep_record).get(KEY)
        if record is not None:
            writer.add_string(KEY, record)
        stored = getattr(gguf.GGMLQuantizationType, kind)
        for module, name in names.items():
            heads = _heads(module, base, architecture)
            laid_out = _laid_out(updates.factors[module], heads, alpha, is_table=name == _TABLE)
            for leaf, tensor in laid_out.items():
                # What overflows is found when the file is read back.
                with np.errstate(over="ignore"):
                    data = gguf.quants.quantize(tensor.float().contiguous().numpy(), stored)
                writer.add_tensor(f"{name}.{leaf}", data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read_back(self, updates: Updates, directory: Path, options: Options) -> dict[str, Factors]:
        """As llama.cpp computes it: `alpha / r` in fp32, r the rank of the tensor."""
        gguf = require("gguf", "export")
        base, architecture = _settled(options)
        reader = gguf.GGUFReader(directory / FILE)
        alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
        tensors = {each.name: _values(gguf, each) for each in reader.tensors}
        found = {}
        for module, name in tensor_names(updates.contents, base, architecture).items():
            a, b = (tensors[f"{name}.{leaf}"] for leaf in ("lora_a", "lora_b"))
            scaling = float(np.float32(alpha) / np.float32(b.shape[1]))
            a = a.mT if name == _TABLE else a
            heads = _heads(module, base, architecture)
            found[module] = Factors(a, unrotate_rows(b, heads) if heads else b, scaling)
        return found


def common_alpha(factors: Mapping[str, Factors]) -> float:
    """The `scaling * r` that most modules have, if fp32 can say it; else a rank, so that B takes
    all of the scaling in.
    """
    counted = Counter(each.scaling * each.rank for each in factors.values())
    fitting = [alpha for alpha, _ in counted.most_common() if alpha and _is_fp32(alpha)]
    return fitting[0] if fitting else float(next(iter(factors.values())).rank)


def _is_fp32(value: float) -> bool:
    return float(np.float32(value)) == value


def tensor_names(
    contents: Contents, base: BaseConfig, architecture: Architecture
) -> dict[str, str]:
    """Plain module name -> the name of its weight in GGUF; those that have none are left out."""
    gguf = require("gguf", "export")
    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture.name], base.layers)
    found = {each.module: table.get_name(each.module) for each in contents.factors}
    return {module: f"{name}.weight" for module, name in found.items() if name is not None}


def _laid_out(
    factors: Factors, heads: int | None, alpha: float, *, is_table: bool
) -> dict[str, torch.Tensor]:
    """`lora_a` (r x in; of an embedding rows x r) and `lora_b` (out x r)."""
    wide = Factors(factors.A.float(), factors.B.double(), factors.scaling)
    wide = with_scaling(wide, alpha / factors.rank)
    return {
        "lora_a": wide.A.mT if is_table else wide.A,
        "lora_b": rotate_rows(wide.B, heads) if heads else wide.B,
    }


def _heads(module: str, base: BaseConfig, architecture: Architecture) -> int | None:
    """How many heads the rows of a module are reordered in; None if they are not."""
    if not architecture.rotated:
        return None
    return {"q_proj": base.heads, "k_proj": base.kv_heads}.get(module.rpartition(".")[2])


def _values(gguf: Any, tensor: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def _known(base: BaseConfig | None) -> Architecture | None:
    return None if base is None else GGUF_ARCHITECTURES.get(base.architecture)


def _settled(options: Options) -> tuple[BaseConfig, Architecture]:
    architecture = _known(options.base)
    assert options.base is not None
    assert architecture is not None
    return options.base, architecture


def _base_faults(base: BaseConfig | None) -> list[Finding]:
    if base is None:
        return [
            Finding(
                "the base's architecture is not known, and names and rows depend on it",
                "--base DIR with the base's config.json; its weights are not needed",
            )
        ]
    if _known(base) is None:
        known = ", ".join(sorted(GGUF_ARCHITECTURES))
        return [
            Finding(
                f"the layout of {base.architecture} in llama.cpp is not known here",
                f"known are {known}; for others {_MERGE}",
            )
        ]
    return []


def _name_faults(contents: Contents, base: BaseConfig, architecture: Architecture) -> list[Finding]:
    names = tensor_names(contents, base, architecture)
    nameless = [each.module for each in contents.factors if each.module not in names]
    if not nameless:
        return []
    return [Finding(f"llama.cpp's {architecture.name} has no weight for {some(nameless)}", _MERGE)]
