"""Which optional libraries are there, by peft's names for the questions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from functools import lru_cache

import torch
import transformers
from packaging.version import parse

_TRANSFORMERS = parse(transformers.__version__)
is_transformers_ge_v5 = parse("5.0.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_1_0 = parse("5.1.0") <= _TRANSFORMERS
is_transformers_ge_v5_4_0 = parse("5.4.0") <= _TRANSFORMERS
is_transformers_ge_v5_6_0 = parse("5.6.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_13_0 = parse("5.13.0.dev0") <= _TRANSFORMERS
is_transformers_ge_v5_17_0 = parse("5.17.0") <= _TRANSFORMERS
is_transformers_le_4_53 = parse("4.54.0.dev0") > _TRANSFORMERS
is_transformers_dtensor_tp = hasattr(transformers, "distributed") and (
    importlib.util.find_spec("transformers.distributed.tensor_parallel") is not None
)


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _at_least(package: str, version: str) -> bool:
    try:
        return parse(importlib.metadata.version(package)) >= parse(version)
    except importlib.metadata.PackageNotFoundError:
        return False


@lru_cache
def is_bnb_available() -> bool:
    """Whether bitsandbytes is there."""
    return _found("bitsandbytes")


@lru_cache
def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes has 4-bit layers."""
    if not is_bnb_available():
        return False
    import bitsandbytes as bnb

    return hasattr(bnb.nn, "Linear4bit")


@lru_cache
def is_gptqmodel_available() -> bool:
    """Whether GPTQModel is there, with optimum.

    Raises:
        ImportError: it is there, but too old, or without optimum.
    """
    if not _found("gptqmodel"):
        return False
    if not _at_least("gptqmodel", "7.0.0"):
        raise ImportError("gptqmodel 7.0.0 or newer is needed.")
    if not is_optimum_available():
        raise ImportError("gptqmodel needs optimum 1.24.0 or newer.")
    return True


@lru_cache
def is_optimum_available() -> bool:
    """Whether optimum is there."""
    return _found("optimum")


@lru_cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is there, and with `check_device`, a device of its."""
    if not _found("torch_xla"):
        return False
    if not check_device:
        return True
    xla_model = importlib.import_module("torch_xla.core.xla_model")
    try:
        xla_model.xla_device()
    except RuntimeError:
        return False
    return True


@lru_cache
def is_aqlm_available() -> bool:
    """Whether AQLM is there."""
    return _found("aqlm")


@lru_cache
def is_eetq_available() -> bool:
    """Whether EETQ is there."""
    return _found("eetq")


@lru_cache
def is_hqq_available() -> bool:
    """Whether HQQ is there."""
    return _found("hqq")


@lru_cache
def is_inc_available() -> bool:
    """Whether Intel's neural compressor is there."""
    return _found("neural_compressor")


@lru_cache
def is_torchao_available() -> bool:
    """Whether torchao is there.

    Raises:
        ImportError: it is there, but too old.
    """
    if not _found("torchao"):
        return False
    if not _at_least("torchao", "0.16.0"):
        raise ImportError("torchao 0.16.0 or newer is needed.")
    return True


@lru_cache
def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is there, 0.18.0 or newer."""
    return is_torchao_available() and _at_least("torchao", "0.18.0")


@lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether Intel's accelerators can be used."""
    return platform.system() != "Darwin" and hasattr(torch, "xpu") and torch.xpu.is_available()


@lru_cache
def is_diffusers_available() -> bool:
    """Whether diffusers is there."""
    return _found("diffusers")


@lru_cache
def is_te_available() -> bool:
    """Whether TransformerEngine is there."""
    return _found("transformer_engine")


@lru_cache
def is_te_pytorch_available() -> bool:
    """Whether TransformerEngine's layers for torch are there."""
    return is_te_available() and _found("transformer_engine.pytorch")
