"""Checks of what programs that serve adapters take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lamina.checkpoint.doctor.evidence import StoredTensor
from lamina.checkpoint.doctor.findings import Finding, Severity
from lamina.checkpoint.doctor.registry import check
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.export.limits import vllm_faults
from lamina.checkpoint.export.vllm_ranks import VLLM_DEFAULT_RANK, VLLM_RANKS, rank_flag
from lamina.storage.misplaced import SAFETENSORS_NAME


@check
def vllm_rank(contents: Contents, target: str) -> Iterator[Finding]:
    """vLLM's limit of ranks."""
    rank, flag = contents.rank, rank_flag(contents.rank)
    if rank <= VLLM_DEFAULT_RANK:
        return
    what = f"Rank {rank} is over vLLM's --max-lora-rank, which is {VLLM_DEFAULT_RANK} if not given"
    cure = f"serve with --max-lora-rank {flag}, or `lamina export DIR -o OUT --for vllm --rank "
    cure += f"{VLLM_DEFAULT_RANK}` compresses it and says what is lost"
    if flag is None:
        what = f"Rank {rank} is over the largest that vLLM takes, {VLLM_RANKS[-1]}"
        cure = f"`lamina export DIR -o OUT --for vllm --rank {VLLM_RANKS[-1]}` compresses it"
    yield Finding(_severity(target, over=flag is None), "vllm-rank", what, _largest(contents), cure)


def _largest(contents: Contents) -> tuple[str, ...]:
    return tuple(f.module for f in contents.factors if contents.rank_of(f) == contents.rank)


@check
def vllm(contents: Contents, target: str) -> Iterator[Finding]:
    """What vLLM refuses."""
    halves = set(contents.halves)
    for fault in vllm_faults(contents, max_rank=rank_flag(contents.rank) or VLLM_RANKS[-1]):
        # These are told by checks of their own.
        if fault.what in halves or not contents.factors:
            continue
        what = f"vLLM would refuse it: {fault.what}"
        yield Finding(_severity(target), "vllm-refuses", what, (), fault.cure)


@check
def vllm_shards(tensors: Mapping[str, StoredTensor], target: str) -> Iterator[Finding]:
    """Whether the weights are in the file that vLLM opens."""
    files = sorted({each.file.name for each in tensors.values()} - {SAFETENSORS_NAME})
    if files:
        what = f"vLLM would refuse it: it opens {SAFETENSORS_NAME} alone, no shards"
        cure = "`lamina export DIR --for vllm -o OUT` writes a single file"
        yield Finding(_severity(target), "vllm-refuses", what, tuple(files), cure)


@check
def vllm_scaling(contents: Contents, config: dict[str, Any], target: str) -> Iterator[Finding]:
    """Whether one scaling does for all modules."""
    if config.get("peft_type") == "ADALORA" or not contents.factors:
        return
    r = config.get("r") or 8
    whole = (config.get("lora_alpha") or 8) / (r**0.5 if config.get("use_rslora") else r)
    other = tuple(
        f"{each.module}: {contents.scaling(each):g}"
        for each in contents.factors
        if abs(contents.scaling(each) - whole) > 1e-6 * abs(whole)
    )
    if other:
        what = f"Not all modules have the scaling {whole:g} of the config, which is "
        what += "all that vLLM reads: it would compute something else, in silence"
        cure = "`lamina export DIR --for vllm -o OUT` folds it into B"
        yield Finding(_severity(target), "vllm-scaling", what, other, cure)


def _severity(target: str, *, over: bool = True) -> Severity:
    """A limit of a program is an error only for those who asked about that program."""
    if target != "vllm":
        return "note"
    return "error" if over else "warning"
