"""How to use what a run came to: commands and code, for a shell and for Python."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from lamina.checkpoint.export.vllm_ranks import VLLM_DEFAULT_RANK, VLLM_RANKS
from lamina.training.report.facts import RunFacts

_BASE = "BASE"


@dataclass(frozen=True)
class Use:
    """One way.

    Attributes:
        title: what it is for.
        language: of the code: "sh" or "python".
        code: that can be copied.
    """

    title: str
    language: str
    code: str


def uses_of(facts: RunFacts, path: str, base: str | None = None) -> list[Use]:
    """All ways to use the end of a run.

    Args:
        facts: of the run.
        path: where its end lies, or will lie.
        base: where its base is; if not given, as the run names it.
    """
    base = base or facts.base_name or _BASE
    end = facts.end
    shell, shell_base = shlex.quote(path), shlex.quote(base)
    # A base that is on record needs no naming.
    named = "" if base == facts.base_name else f" --base {shell_base}"
    kind = "AutoModelForSequenceClassification" if facts.is_reward_model else "AutoModelForCausalLM"
    more = ", num_labels=1" if facts.is_reward_model else ""
    found = [
        Use(
            "Does it answer as when it was saved? If not, why",
            "sh",
            f"lamina verify {shell}{named}",
        ),
        Use(
            "In Python, with Lamina",
            "python",
            f"from transformers import {kind}\n"
            "import lamina\n\n"
            f"base = {kind}.from_pretrained({base!r}{more})\n"
            f"model = lamina.load({path!r}, base)",
        ),
        Use(
            "In Python, with PEFT",
            "python",
            f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
            f"base = {kind}.from_pretrained({base!r}{more})\n"
            f"model = PeftModel.from_pretrained(base, {path!r})",
        ),
    ]
    if not facts.is_reward_model:
        name = shlex.quote(f"{end.name}={path}" if end else f"stage={path}")
        found.append(
            Use(
                "Served by vLLM",
                "sh",
                f"lamina export {shell} --for vllm --check\n"
                f"vllm serve {shell_base} --enable-lora --max-lora-rank {_served_rank(facts)} "
                f"--lora-modules {name}",
            )
        )
    found.append(
        Use(
            "As one dense model",
            "sh",
            f"lamina merge {shell}{named} -o merged",
        )
    )
    return found


def _served_rank(facts: RunFacts) -> int:
    adapter = facts.end.adapter if facts.end else None
    rank = max((kind.rank[1] for kind in adapter.modules), default=0) if adapter else 0
    return next(
        (each for each in VLLM_RANKS if each >= max(rank, VLLM_DEFAULT_RANK)), VLLM_RANKS[-1]
    )
