"""Directories of runs as runs leave them, made in an instant: only the numbers are invented."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lamina
from lamina.stages import begin_stage
from lamina.training.evaluate.scores import Answer, Evaluation, Judged, Measured, ModuleDrift, Score
from lamina.training.run.log import Log
from lamina.training.run.state import Judgement, Retry, RunState, StageState, adapter_digests
from tests import models
from tests.stages import chains

BASE = "acme/tiny-llama"
VERSIONS = {"lamina": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"}
PROMPTS = ("What does shutil.copytree do?", "Write one line of Python.")


@dataclass(frozen=True)
class Made:
    """A stage of a run that is made.

    Attributes:
        name, method, mode: as in a plan.
        status: as in its notes; "waiting" is none at all.
        rank: that it adds.
        gate: what its gate says.
        retries: before.
        lines: of its log.
        scores: eval -> score.
        more: settings beside the usual ones.
    """

    name: str
    method: str = "sft"
    mode: str = "stack"
    status: str = "finished"
    rank: int = 4
    gate: Judgement | None = None
    retries: tuple[Retry, ...] = ()
    lines: int = 30
    scores: Mapping[str, float] | None = None
    answers: tuple[str, ...] = ()
    more: Mapping[str, Any] | None = None

    @property
    def counts(self) -> bool:
        return self.status == "finished" and (self.gate is None or self.gate.passed)


CHAIN = (
    Made(
        "domain", "pt", "fresh", rank=8,
        scores={"docs": 2.861, "chat": 2.610, "facts": 0.31},
        answers=("copytree copies a tree of folders.", "import os"),
        more={"learning_rate": 2e-4},
    ),
    Made(
        "chat", "sft", "stack",
        scores={"docs": 2.934, "chat": 1.874, "facts": 0.44},
        answers=(
            "It copies an entire directory tree to a new location and returns the destination.",
            "import os",
        ),
        more={"learning_rate": 1e-4},
        gate=Judgement(
            True, "stop", told=("docs: loss 2.861 -> 2.934, worse by 2.6%; it may lose 5.0%",)
        ),
    ),
    Made(
        "prefer", "dpo", "continue",
        scores={"docs": 2.941, "chat": 1.871, "facts": 0.42},
        answers=(
            "It recursively copies a directory tree, and returns the destination.",
            "print(sum(range(10)))",
        ),
        more={"learning_rate": 5e-6, "beta": 0.1, "reference": "parent"},
    ),
)  # fmt: skip
REFUSED = Made(
    "slang", "sft", "stack",
    scores={"docs": 3.804, "chat": 1.911, "facts": 0.22},
    answers=("yo it copies stuff lol", "print('yo')"),
    gate=Judgement(
        False, "rollback", ("docs: loss 2.934 -> 3.804, worse by 29.7%; it may lose 5.0%",)
    ),
    retries=(Retry(1e-4, ("docs: loss 2.934 -> 4.010, worse by 36.7%; it may lose 5.0%",)),),
)  # fmt: skip
BASE_SCORES = {"docs": 3.214, "chat": 3.402, "facts": 0.12}
BASE_ANSWERS = ("What does shutil.move do? What does", "a = 1\na = 1\na = 1")
LEARNT_IN = {"docs": "domain", "chat": "chat"}
METRICS = {"docs": "loss", "chat": "loss", "facts": "exact_match"}


def write_run(
    folder: Path,
    stages: Sequence[Made] = CHAIN,
    *,
    base_scores: Mapping[str, float] | None = BASE_SCORES,
    base_answers: Sequence[str] = BASE_ANSWERS,
    prompts: Sequence[str] = PROMPTS,
    drift: bool = True,
    adapters: bool = True,
    layers: int = 2,
    base: str = BASE,
) -> Path:
    """The directory of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    state = RunState(order=tuple(each.name for each in stages), base=base)
    evaluation = Evaluation(evals=tuple(base_scores or ()), learnt_in=dict(LEARNT_IN))
    evaluation = evaluation.having(None, _judged(base_scores, base_answers, prompts))
    built_on: str | None = None
    for number, made in enumerate(stages):
        if made.status == "waiting":
            continue
        if made.status == "finished" and adapters:
            save_adapter(folder, made, built_on, layers)
        state = state.having(made.name, _state(folder, made, built_on, number))
        write_log(folder, made, number)
        if made.status == "finished":
            judged = _judged(made.scores, made.answers, prompts)
            drifts = _drift(number, first=built_on is None, layers=layers) if drift else ()
            evaluation = evaluation.having(made.name, replace(judged, drift=drifts))
        built_on = made.name if made.counts else built_on
    state.write(folder)
    evaluation.write(folder)
    return folder


def save_adapter(folder: Path, made: Made, built_on: str | None, layers: int = 2) -> None:
    """A stage over a tiny model, as a run saves it."""
    model = begin_stage(
        models.tiny_llama(num_hidden_layers=layers),
        name=made.name,
        parent=None if built_on is None else folder / built_on,
        mode=None if built_on is None else made.mode,
        config=None
        if made.mode == "continue"
        else chains.llama_lora(r=made.rank, lora_alpha=2 * made.rank),
    ).eval()
    chains.fill_trainable(model, seed=len(made.name))
    lamina.save_stage(
        model,
        folder / made.name,
        metrics={"train_loss": 1.25},
        data={
            "method": made.method,
            "format": "messages",
            "rows": 1200,
            "digest": "ab" * 32,
            "sources": [
                {"path": f"data/{made.name}.jsonl", "rows": 1000, "digest": "cd" * 32},
                {"path": "acme/dialogues", "rows": 200, "digest": "ef" * 32},
            ],
        },
    )


def write_log(folder: Path, made: Made, number: int = 0) -> None:
    """A log as the trainer's callbacks write it."""
    log = Log(folder / "logs" / f"{made.name}.jsonl", 0)
    for line in range(1, made.lines + 1):
        step = 10 * line
        loss = 1.1 + 2.1 * math.exp(-line / 9) + 0.09 * math.sin(1.7 * line + number)
        common = {"stage": made.name, "step": step, "steps": 10 * made.lines}
        log.write(
            {**common, "loss": loss, "num_tokens": 4096 * line, "seconds": 1.5 * line, "time": 1e9}
        )
        if line % 6 == 0:
            log.write({**common, "eval_loss": loss + 0.12, "seconds": 1.5 * line})


def _state(folder: Path, made: Made, built_on: str | None, number: int) -> StageState:
    inputs = {
        "name": made.name,
        "mode": made.mode if built_on is not None else None,
        "method": made.method,
        "lora_r": made.rank,
        "lora_alpha": 2.0 * made.rank,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 4,
        "max_length": 1024,
        "dtype": "auto",
        "load_in_4bit": False,
        "data": "ab" * 32,
        **(made.more or {}),
        **{f"version of {name}": told for name, told in VERSIONS.items()},
    }
    done = made.status == "finished"
    return StageState(
        made.status,  # type: ignore[arg-type]
        "12" * 32,
        {key: value for key, value in inputs.items() if value is not None},
        files=adapter_digests(folder / made.name) if done else {},
        metrics={"train_loss": 1.25, "eval_loss": 1.41} if done else {},
        steps=10 * made.lines,
        seconds=93.5 * (number + 1),
        why="" if done else "the disk is full",
        built_on=built_on,
        retries=made.retries,
        gate=made.gate,
    )


def _judged(
    scores: Mapping[str, float] | None, answers: Sequence[str], prompts: Sequence[str]
) -> Judged:
    measured = {}
    for name, value in (scores or {}).items():
        metric = METRICS.get(name, "loss")
        details = {"perplexity": math.exp(value)} if metric == "loss" and value < 50 else {}
        score = Score(metric, value, metric != "loss", 200, error=0.012, details=details)
        measured[name] = Measured("34" * 32, score, 1.5)
    given = tuple(
        Answer(prompt, text, len(text.split()), not text.startswith("a = 1"))
        for prompt, text in zip(prompts, answers, strict=False)
    )
    return Judged("56" * 32, measured, given, "78" * 32, seconds=3.0)


def _drift(number: int, *, first: bool, layers: int) -> tuple[ModuleDrift, ...]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    found = []
    for layer in range(layers):
        for place, kind in enumerate(kinds):
            norm = (1.6 - 0.5 * number) * (1 + math.sin(0.9 * layer + place) / 2)
            shared = None if first else 0.2 + 0.1 * place / len(kinds)
            found.append(
                ModuleDrift(
                    f"model.layers.{layer}.{kind}", max(norm, 0.05), 31.0 + place,
                    2.1 + 0.2 * place, 8, shared, shared,
                )
            )  # fmt: skip
    return tuple(found)
