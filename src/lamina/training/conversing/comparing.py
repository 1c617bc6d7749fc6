"""Put the same prompts to the base and to every stage of a chain, over one base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lamina.errors import DataError
from lamina.stages.viewed import BASE, Opening, View, check_known
from lamina.training.conversing.compared import Compared, PromptAnswers, StageAnswer
from lamina.training.conversing.subject import Subject, subject_of
from lamina.training.evaluate.answers import answers, prompts_as_tokens
from lamina.training.evaluate.generating import context_of, left_as_is
from lamina.training.evaluate.scores import Answer
from lamina.training.plan.schema import Prompt

_BATCH = 8


def compare(
    path: str | Path,
    prompts: Sequence[Prompt],
    *,
    stages: Sequence[str] | None = None,
    how: Opening | None = None,
    batch_size: int = _BATCH,
) -> Compared:
    """Answers of base and stages to the same prompts, greedily.

    The base is loaded once. On the tokens of a prompt, the next tokens that each foresees are
    compared with those of the one before it.

    Args:
        path: the directory of a stage, or of a run.
        prompts: at least one.
        stages: those that are asked, in this order, "base" among them; None takes the base and all
            stages that are language models, oldest first.
        how: how the base is opened.
        batch_size: prompts at a time.

    Raises:
        DataError: no prompts, or such that can't be put to the model; all of them are named.
        StageError: there is no such stage, or it isn't to be had as it was saved.
        CheckpointError: files are missing or broken.
        VerificationError: a stage doesn't answer as when it was saved.
    """
    if not prompts:
        raise DataError("There are no prompts.", cure="give at least one")
    subject = subject_of(path)
    view = _opened(subject, stages, how or Opening())
    asked, notes = _asked(subject, view, stages)
    tokens = prompts_as_tokens(prompts, view.tokenizer)
    _check_lengths(view, tokens)
    told: dict[str, tuple[Answer, ...]] = {}
    for name in asked:
        view.show(None if name == BASE else name)
        told[name] = answers(prompts, view.model, view.tokenizer, batch_size=batch_size)
    return Compared(
        path=str(path),
        base=view.base,
        asked=asked,
        prompts=tuple(
            PromptAnswers(
                prompt.text,
                _beside(view, asked, tokens[place], [told[name][place] for name in asked]),
            )
            for place, prompt in enumerate(prompts)
        ),
        notes=tuple(notes),
    )


def _opened(subject: Subject, stages: Sequence[str] | None, how: Opening) -> View:
    """The view, with the newest of the stages that are asked shown."""
    if stages is not None:
        wanted = [name for name in stages if name != BASE]
        return subject.view(wanted[-1] if wanted else None, how)
    writing = subject.writing(subject.chain)
    return subject.view(writing[-1] if writing else None, how)


def _asked(
    subject: Subject, view: View, stages: Sequence[str] | None
) -> tuple[tuple[str, ...], list[str]]:
    known = subject.chain if subject.is_run else view.stages
    if stages is not None:
        for name in stages:
            if name != BASE:
                check_known(name, view.stages)
        refused = [name for name in stages if name in subject.rolled_back]
        return tuple(dict.fromkeys(stages)), [
            f"{name} was refused by its gate: no later stage is built on it" for name in refused
        ]
    writing = subject.writing(known)
    silent = [name for name in known if name not in writing]
    return (BASE, *writing), [f"{name} is no language model: it wasn't asked" for name in silent]


def _check_lengths(view: View, tokens: Sequence[Sequence[int]]) -> None:
    context = context_of(view.model)
    faults = [
        f"prompt {number} has {len(each):,} tokens, and the model's context is {context:,}"
        for number, each in enumerate(tokens, 1)
        if context is not None and len(each) >= context
    ]
    if faults:
        raise DataError("These prompts are too long.", faults=faults, cure="shorter prompts")


def _beside(
    view: View, asked: Sequence[str], tokens: Sequence[int], answers: Sequence[Answer]
) -> tuple[StageAnswer, ...]:
    """The answers to a prompt, with how the foresight of each differs from the one before."""
    found = []
    before: torch.Tensor | None = None
    for name, answer in zip(asked, answers, strict=True):
        view.show(None if name == BASE else name)
        now = _foreseen(view.model, tokens)
        agreement, kl = (None, None) if before is None else _differences(before, now)
        found.append(StageAnswer(name, answer.text, answer.tokens, answer.ended, agreement, kl))
        before = now
    return tuple(found)


def _foreseen(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of the next token after each token: tokens x vocabulary, fp32."""
    with left_as_is(model):
        device = next(model.parameters()).device
        logits = model(input_ids=torch.tensor([list(tokens)], device=device)).logits
        return torch.log_softmax(logits[0].float(), dim=-1)


def _differences(before: torch.Tensor, now: torch.Tensor) -> tuple[float, float]:
    """The share of equal first choices, and KL(before || now)."""
    size = min(before.shape[1], now.shape[1])
    before, now = before[:, :size], now[:, :size]
    agreement = (before.argmax(-1) == now.argmax(-1)).float().mean()
    kl = (before.exp() * (before - now)).sum(-1).mean()
    return float(agreement), max(0.0, float(kl))
