"""What the stages of a plan would be trained on, as their trainers see it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from lamina.errors import PlanError, nearest
from lamina.extras import require
from lamina.training.data.prepare import SourceReport, StageData, prepare
from lamina.training.data.tokens import Sequences, Tokens, tokenize, tokenize_prompts
from lamina.training.plan import Plan, StagePlan, read_plan
from lamina.training.plan.located import located
from lamina.training.plan.settings import Settings
from lamina.training.run.base import load_tokenizer

_MEASURED = 1_000


@dataclass(frozen=True)
class Span:
    """Tokens beside each other that are all trained on, or all not.

    Attributes:
        text: what they are decoded to.
        trained: whether they are labels.
        tokens: how many there are.
    """

    text: str
    trained: bool
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """How long examples are, in tokens, before they are cut.

    Attributes:
        measured: examples looked at: the first thousand.
        shortest: of them.
        median: of them.
        longest: of them.
        max_length: at which the trainer cuts.
        too_long: examples that are longer; the trainer cuts them (reward: leaves them out).
        left_out: examples that the trainer leaves out, as nothing to learn is left of them.
        tokens: all tokens, after cutting.
        trained: those of them that are labels.
    """

    measured: int
    shortest: int
    median: float
    longest: int
    max_length: int | None
    too_long: int
    left_out: int
    tokens: int
    trained: int


@dataclass(frozen=True)
class StagePreview:
    """The data of one stage.

    Attributes:
        name: of the stage.
        method: of the stage.
        format: how its data is laid out.
        columns: what its trainer is given.
        rows: examples of an epoch; None of streaming data.
        held_out: examples for evaluation; None if they are streaming, 0 without them.
        weighted: whether sources are drawn by weight.
        sources: of its training data.
        lengths: of its examples.
        examples: the first ones, after cutting: the name of each part ("" if there is one only,
            "chosen" and "rejected", "wanted" or "unwanted") -> spans.
        notes: what is worth knowing of how they are trained on.
        digest: of all data that was read.
    """

    name: str
    method: str
    format: str
    columns: tuple[str, ...]
    rows: int | None
    held_out: int | None
    weighted: bool
    sources: tuple[SourceReport, ...]
    lengths: Lengths
    examples: tuple[dict[str, tuple[Span, ...]], ...]
    notes: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Preview:
    """The data of a plan.

    Attributes:
        plan: its file.
        tokenizer: what tokens are of.
        stages: that were asked for.
    """

    plan: str
    tokenizer: str
    stages: tuple[StagePreview, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def preview(
    path: str | os.PathLike[str],
    stages: Sequence[str] = (),
    *,
    rows: int = 2,
    changes: Sequence[str] = (),
) -> Preview:
    """Read the data of a plan's stages, and tokenize what is shown by TRL's own code.

    Args:
        path: the plan's file.
        stages: names of those that are looked at; all if none is given.
        rows: examples of each stage that are shown.
        changes: `KEY=VALUE` over what the file says.

    Raises:
        PlanError: the plan can't be read, has no such stage, or its tokenizer can't be loaded.
        DataError: the data can't be trained on.
    """
    plan = read_plan(Path(path), changes)
    root = Path(path).expanduser().parent
    asked = _asked(plan, stages)
    tokenizer = load_tokenizer(located(plan, root), root)
    return Preview(
        plan=str(path),
        tokenizer=plan.tokenizer_name_or_path or plan.model_name_or_path,
        stages=tuple(_stage(plan, each, tokenizer, root, rows) for each in asked),
    )


def _asked(plan: Plan, names: Sequence[str]) -> list[StagePlan]:
    there = [each.name for each in plan.stages]
    faults = []
    for name in names:
        if name not in there:
            close = nearest(name, there)
            faults.append(f"{name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if faults:
        raise PlanError(
            "The plan has no such stages.", faults=faults, cure=f"one of {', '.join(there)}"
        )
    return [each for each in plan.stages if not names or each.name in names]


def _stage(plan: Plan, stage: StagePlan, tokenizer: Any, root: Path, rows: int) -> StagePreview:
    settings = plan.settings_of(stage)
    data = prepare(settings, tokenizer=tokenizer, root=root)
    first = _first(data.train, max(_MEASURED, rows))
    whole = tokenize(first, settings, tokenizer, max_length=None)
    cut = tokenize(first, settings, tokenizer, max_length=_limit(settings))
    return StagePreview(
        name=stage.name,
        method=settings.method or "sft",
        format=data.format,
        columns=data.columns,
        rows=data.rows,
        held_out=_held_out(data),
        weighted=len(data.sources) > 1
        and any(each.weight is not None for each in settings.datasets or ()),
        sources=data.sources,
        lengths=_lengths(whole, cut, _limit(settings)),
        examples=tuple(_spans(each, tokenizer) for each in cut[:rows]),
        notes=(*_notes(settings), *_lost_ends(first, whole, settings, tokenizer)),
        digest=data.digest,
    )


def _limit(settings: Settings) -> int | None:
    """Where examples are cut; prompts of grpo never are."""
    return None if settings.method == "grpo" else settings.max_length


def _first(dataset: Any, count: int) -> Any:
    """The first examples in memory, whatever they come from."""
    library = require("datasets", "train")
    return library.Dataset.from_list(list(islice(dataset, count)), features=dataset.features)


def _held_out(data: StageData) -> int | None:
    if data.evaluation is None:
        return 0
    return len(data.evaluation) if hasattr(data.evaluation, "__len__") else None


def _lengths(whole: Sequence[Sequences], cut: Sequence[Sequences], limit: int | None) -> Lengths:
    # Of a pair, the longer one.
    sizes = [max(map(len, each.values())) for each in whole]
    parts = [tokens for each in cut for tokens in each.values()]
    return Lengths(
        measured=len(sizes),
        shortest=min(sizes),
        median=statistics.median(sizes),
        longest=max(sizes),
        max_length=limit,
        too_long=sum(size > limit for size in sizes) if limit is not None else 0,
        left_out=len(whole) - len(cut),
        tokens=sum(map(len, parts)),
        trained=sum(sum(each.trained) for each in parts),
    )


def _spans(example: Sequences, tokenizer: Any) -> dict[str, tuple[Span, ...]]:
    return {name: tuple(_decoded(tokens, tokenizer)) for name, tokens in example.items()}


def _decoded(tokens: Tokens, tokenizer: Any) -> Iterator[Span]:
    """Runs of one kind; decoded behind what is before them, as a token's text depends on it."""
    end, before = 0, ""
    for trained, run in groupby(tokens.trained):
        size = len(list(run))
        end += size
        text = tokenizer.decode(tokens.ids[:end], clean_up_tokenization_spaces=False)
        own = text[len(before) :]
        if not text.startswith(before):
            own = tokenizer.decode(tokens.ids[end - size : end])
        yield Span(own, trained, size)
        before = text


def _notes(settings: Settings) -> Iterator[str]:
    if settings.packing:
        way = (settings.trainer_args or {}).get("packing_strategy", "bfd")
        ends = "cut" if way == "bfd" else "gone on with in another"
        yield (
            f"packing ({way}): several examples share a sequence of max_length tokens; what is "
            f"longer is {ends}"
        )
    if settings.method == "orpo":
        yield "marked is what orpo compares; chosen is also learnt as a text, with its prompt"
    if settings.method == "reward":
        yield "reward scores chosen and rejected whole; longer ones are left out, not cut"
    if settings.method == "grpo":
        yield "grpo generates the answers: only prompts are data"


def _lost_ends(
    first: Any, whole: Sequence[Sequences], settings: Settings, tokenizer: Any
) -> Iterator[str]:
    """Where a prompt alone has other tokens than with its answer: TRL leaves its end out."""
    masked = settings.assistant_only_loss or settings.completion_only_loss is False
    if settings.method not in ("sft", "dpo", "kto") or masked or "prompt" not in first.column_names:
        return
    prompts = tokenize_prompts(first, settings, tokenizer)
    lost = [
        tokenizer.decode(prompt.ids[_untrained(example) :])
        for prompt, example in zip(prompts, whole, strict=True)
        if _untrained(example) < len(prompt)
    ]
    if lost:
        yield (
            f"in {len(lost):,} of {len(prompts):,} examples the end of the prompt is left out, "
            f"such as {lost[0]!r}: with an answer behind it, it becomes other tokens"
        )


def _untrained(example: Sequences) -> int:
    """Tokens before the first that is trained on, of the part that has fewest of them."""
    return min(
        next((place for place, each in enumerate(part.trained) if each), len(part))
        for part in example.values()
    )
