"""Open a base as it was when the stage was saved: in its dtype, and through its quantiser."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.record import StageRecord
from lamina.errors import LaminaError
from lamina.model import AutoPeftModel
from lamina.model.heads import head_options

_BNB = re.compile(r"bitsandbytes (nf4|fp4|int8)(, double quantisation)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def open_base(
    file: AdapterFile,
    record: StageRecord | None,
    base: str | None,
    *,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool | None = None,
    **options: Any,
) -> Any:
    """The base model from its path, or from the one on record.

    Args:
        file: the adapter.
        record: its record.
        base: path or hub id; None takes the one on record.
        dtype: to load it in; None takes the one on record.
        load_in_4bit: whether to quantise it with bitsandbytes; None does as on record.
        options: of `from_pretrained`, and stronger than these.
    """
    config = file.config
    if base is not None:
        config = replace(config, base_model_name_or_path=base, revision=None)
    how: dict[str, Any] = {"dtype": dtype or _recorded_dtype(record)}
    quantiser = None if "quantization_config" in options else _quantiser(record, load_in_4bit)
    if quantiser is not None:
        how["quantization_config"] = _settings(quantiser, how["dtype"])
    how |= head_options(config, {key: each.shape for key, each in file.tensors.items()})
    return AutoPeftModel.load_base(config, source=file.source, **{**how, **options})


def _recorded_dtype(record: StageRecord | None) -> Any:
    if record is None:
        return "auto"
    newest = record.newest
    name = newest.probe.dtype if newest.probe else newest.base.dtype
    found = getattr(torch, name or "", None)
    return found if isinstance(found, torch.dtype) else "auto"


def _quantiser(record: StageRecord | None, load_in_4bit: bool | None) -> re.Match[str] | None:
    if load_in_4bit is False:
        return None
    newest = record.newest if record else None
    said = newest and (newest.probe.quantization if newest.probe else newest.base.quantization)
    found = _BNB.fullmatch(said or "")
    if load_in_4bit:
        return found if found and found[1] != "int8" else _BNB.fullmatch("bitsandbytes nf4")
    known = importlib.util.find_spec("bitsandbytes") is not None
    return found if known else None


def _settings(quantiser: re.Match[str], dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if quantiser[1] == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantiser[1],
        bnb_4bit_use_double_quant=quantiser[2] is not None,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else None,
    )


def open_tokenizer(tokenizer: Any, near: list[str]) -> Any:
    """The tokenizer itself, of a path or hub id; None takes the one that lies in a directory.

    Args:
        tokenizer: it, or where it is.
        near: the directories to look in, first to last.

    Raises:
        LaminaError: what was asked for isn't there.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    from transformers import AutoTokenizer

    places = near if tokenizer is None else [str(tokenizer)]
    for place in places:
        folder = Path(place).expanduser()
        if tokenizer is None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            continue
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            if tokenizer is not None:
                raise LaminaError(
                    f"There is no tokenizer in {place}.",
                    faults=[str(error).strip().partition("\n")[0]],
                    cure="give the directory of a tokenizer, or of a model that has one",
                ) from error
    return None
