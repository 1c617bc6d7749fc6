"""What a vLLM server takes as an adapter, told from the header of a file; no torch.

Source: vLLM 0.33, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`, `vllm/lora/utils.py` and
`vllm/config/lora.py`; older releases take less, which is said where it matters.
"""

from __future__ import annotations

from lamina.checkpoint.export.contents import Contents, Finding
from lamina.checkpoint.export.plain import plain_faults, some
from lamina.checkpoint.export.vllm_ranks import VLLM_DEFAULT_RANK, VLLM_RANKS, rank_flag

# Heads that may be trained whole.
_HEADS = ("classifier", "score")
_MERGE = (
    "`lamina merge DIR -o MODEL` makes an ordinary model of it, to be served without an adapter"
)


def vllm_faults(
    contents: Contents, max_rank: int = VLLM_DEFAULT_RANK, *, rank: int | None = None
) -> list[Finding]:
    """Everything for which vLLM would refuse an adapter, or serve something else; with cures.

    Args:
        contents: the adapter's, by `read_contents` or `sort_contents`.
        max_rank: the server's `--max-lora-rank`.
        rank: what it is going to be compressed to; None leaves it as it is.
    """
    heads = tuple(owner for owner in contents.wholes if owner.rpartition(".")[2] in _HEADS)
    return [
        *_limit_faults(max_rank),
        *_rank_faults(contents.rank if rank is None else min(contents.rank, rank), max_rank),
        *plain_faults(contents, "vLLM", _MERGE, takes_whole=heads if len(heads) == 1 else ()),
        *_expert_faults(contents),
    ]


def vllm_notes(contents: Contents) -> list[Finding]:
    """What to know about a served adapter."""
    notes = []
    heads = [owner for owner in contents.wholes if owner.rpartition(".")[2] in _HEADS]
    if heads:
        notes.append(
            Finding(f"the head {heads[0]} was trained whole", "vLLM 0.33 takes it, older may not")
        )
    tables = [
        each.module
        for each in contents.factors
        if each.module.rpartition(".")[2] in ("embed_tokens", "lm_head")
    ]
    if tables:
        notes.append(
            Finding(
                f"{some(tables)} adapted",
                "vLLM takes it where the model's class in vLLM names embedding_modules",
            )
        )
    experts = [each for each in contents.factors if contents.is_parameter(each)]
    if experts:
        notes.append(
            Finding(
                f"{len(experts)} fused parameters of experts are adapted",
                "vLLM takes this form for models with 3D expert weights only",
            )
        )
    return notes


def _expert_faults(contents: Contents) -> list[Finding]:
    """Patterns mean the parameters, two of which have the name of one module in the file."""
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if contents.config.get(name)]
    if not patterns or not any(contents.is_parameter(each) for each in contents.factors):
        return []
    what = f"fused experts are adapted, and there is a {' and a '.join(patterns)}"
    return [Finding(what, f"one rank and one alpha for all would be taken; else {_MERGE}")]


def _limit_faults(max_rank: int) -> list[Finding]:
    if max_rank in VLLM_RANKS:
        return []
    allowed = ", ".join(map(str, VLLM_RANKS))
    return [Finding(f"no server has --max-lora-rank {max_rank}", f"vLLM takes {allowed}")]


def _rank_faults(rank: int, max_rank: int) -> list[Finding]:
    if rank <= max_rank:
        return []
    flag = rank_flag(rank)
    compress = f"or --rank {max_rank} compresses it here, and says what is lost"
    if flag is None:
        cure = f"vLLM's largest is {VLLM_RANKS[-1]}; {compress}"
    else:
        cure = f"serve with --max-lora-rank {flag}, and pass --max-rank {flag} here; {compress}"
    return [Finding(f"rank {rank} is over --max-lora-rank {max_rank}", cure)]
