"""What the page's tables say, as texts: stages, gates, drift, answers, data, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.amounts import count_of
from lamina.training.evaluate.scores import Answer, Judged, ModuleDrift
from lamina.training.report.facts import RunFacts, StageFacts
from lamina.training.report.figures.drift import place_of
from lamina.training.report.lineage import rank_line
from lamina.training.report.written import (
    UNKNOWN,
    joined,
    ranks,
    share,
    short,
    signed,
    size,
    span,
    value,
    whole,
)


@dataclass(frozen=True)
class StageLine:
    """What a stage took, and what it left.

    Attributes:
        stage: the stage.
        texts: heading -> what stands there.
        notes: what else there is to say, such as what stopped it.
    """

    stage: StageFacts
    texts: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DriftLine:
    """What a stage changed in modules of one kind, or in all of them."""

    name: str
    count: str
    relative: str
    most: str
    effective_rank: str
    inputs: str
    outputs: str


@dataclass(frozen=True)
class Written:
    """What base or a stage wrote.

    Attributes:
        stage: None is the base.
        text: its answer.
        how: tokens, and whether it came to an end.
        same: whether the model that it is built on wrote the same.
    """

    stage: StageFacts | None
    text: str
    how: str
    same: bool


def stage_lines(facts: RunFacts) -> list[StageLine]:
    """A line for each stage."""
    return [StageLine(each, dict(_texts(each)), tuple(_notes(each))) for each in facts.stages]


def known_columns(lines: Sequence[StageLine]) -> list[str]:
    """The headings below which something stands."""
    names = lines[0].texts if lines else {}
    return [name for name in names if any(each.texts[name] != UNKNOWN for each in lines)]


def _texts(stage: StageFacts) -> Iterator[tuple[str, str]]:
    state, adapter = stage.state, stage.adapter
    metrics = state.metrics if state else {}
    yield "is", stage.standing
    yield "method", stage.method or UNKNOWN
    yield "begun", _begun(stage)
    yield "ranks", rank_line(stage) or UNKNOWN
    total = [ranks(group.rank_range) for group in adapter.chain.groups] if adapter else []
    yield "in its file", " + ".join(total) or UNKNOWN
    yield "steps", whole(state.steps or stage.curve.steps) if state else UNKNOWN
    yield "took", span(state.seconds) if state else UNKNOWN
    yield "tokens", short(stage.curve.tokens)
    speed = stage.curve.tokens_per_second
    yield "tokens/s", UNKNOWN if speed is None else f"{speed:,.0f}"
    yield "loss", value(metrics.get("train_loss"))
    yield "held out", value(metrics.get("eval_loss"))
    yield "memory", size(stage.curve.memory)
    yield "parameters", short(adapter.parameters if adapter else None)
    yield "on disk", size(sum(adapter.files.values()) if adapter else None)


def _begun(stage: StageFacts) -> str:
    below = stage.built_on or "the base"
    if stage.mode in {None, "fresh"}:
        return f"on {below}"
    words = {"continue": "continues", "stack": "stacked on", "merge": "over the merged"}
    return f"{words[stage.mode]} {below}"


def _notes(stage: StageFacts) -> Iterator[str]:
    state = stage.state
    if state is not None and state.why:
        yield f"{stage.standing}: {state.why}"
    if stage.fault:
        yield f"its directory can't be read: {stage.fault}"
    if (
        state is not None
        and state.status == "finished"
        and stage.adapter is None
        and not stage.fault
    ):
        yield "its directory is gone"
    if stage.adapter is not None and not stage.adapter.has_record:
        yield "its adapter has no stage record"
    if state is not None and not stage.curve.lines:
        yield "its log is empty"
    if stage.curve.broken:
        steps = joined([whole(step) for step in stage.curve.broken])
        yield f"a loss that is no finite number, at step {steps}"


def missing(facts: RunFacts) -> list[str]:
    """What a report would have, and this run doesn't."""
    told = []
    evaluation = facts.evaluation
    if not evaluation.evals:
        told.append("evals: the plan asks for none, or none was measured yet")
    judged = [evaluation.base, *evaluation.stages.values()]
    if not any(each.answers for each in judged):
        told.append("answers: the plan has no prompts, or none was put yet")
    if not any(each.drift for each in facts.stages):
        told.append("drift: it wasn't measured")
    if not any(each.curve.lines for each in facts.stages):
        told.append("curves: nothing was logged")
    return told


def drift_line(name: str, drifts: Sequence[ModuleDrift]) -> DriftLine:
    """Means over modules, and the one that changed most."""
    relative = [each.relative for each in drifts if each.relative is not None]
    strongest = max(drifts, key=lambda each: (each.relative or 0.0, each.norm))
    inputs = [each.input_overlap for each in drifts if each.input_overlap is not None]
    outputs = [each.output_overlap for each in drifts if each.output_overlap is not None]
    ranks_ = (min(each.rank for each in drifts), max(each.rank for each in drifts))
    effective = [each.effective_rank for each in drifts if each.effective_rank is not None]
    absolute = value(sum(each.norm for each in drifts) / len(drifts))
    return DriftLine(
        name=name,
        count=whole(len(drifts)),
        relative=share(_mean(relative), 2) if relative else f"{absolute} (norm)",
        most=f"{strongest.module} ({share(strongest.relative, 2)})"
        if strongest.relative is not None
        else strongest.module,
        effective_rank=f"{sum(effective) / len(effective):.1f} of {ranks(ranks_)}"
        if effective
        else "–",
        inputs=share(_mean(inputs), 0),
        outputs=share(_mean(outputs), 0),
    )


def kinds_of(drifts: Sequence[ModuleDrift]) -> list[DriftLine]:
    """A line for each kind of module."""
    groups: dict[str, list[ModuleDrift]] = {}
    for each in drifts:
        groups.setdefault(place_of(each.module)[1], []).append(each)
    return [drift_line(kind, members) for kind, members in groups.items()]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def answers_of(facts: RunFacts) -> list[tuple[str, list[Written]]]:
    """Prompt -> what base and stages wrote, in the order of the base's prompts, or the stages'."""
    judged: list[tuple[StageFacts | None, Judged]] = [(None, facts.evaluation.base)]
    judged += [(each, each.judged) for each in facts.stages if each.judged is not None]
    keyed = [(stage, dict(_keyed(each.answers))) for stage, each in judged]
    found = []
    for key in dict.fromkeys(key for _, answers in keyed for key in answers):
        there = [(stage, answers[key]) for stage, answers in keyed if key in answers]
        told = {s.name if s else None: answer.text for s, answer in there}
        found.append((key[0], [_written(stage, answer, told) for stage, answer in there]))
    return found


def _keyed(answers: Sequence[Answer]) -> Iterator[tuple[tuple[str, int], Answer]]:
    """By its prompt, and which of those that are the same: plans and their prompts change."""
    seen: Counter[str] = Counter()
    for each in answers:
        yield (each.prompt, seen[each.prompt]), each
        seen[each.prompt] += 1


def _written(stage: StageFacts | None, answer: Answer, told: dict[str | None, str]) -> Written:
    how = count_of(answer.tokens, "token") + ("" if answer.ended else ", cut off")
    same = stage is not None and told.get(stage.built_on) == answer.text
    return Written(stage, answer.text, how, same)


def versions_of(facts: RunFacts) -> list[tuple[str, str]]:
    """Library -> its version; several where stages were made with different ones."""
    found: dict[str, list[str]] = {}
    for stage in facts.stages:
        for name, told in stage.inputs.items():
            if name.startswith("version of "):
                seen = found.setdefault(name.removeprefix("version of "), [])
                if str(told) not in seen:
                    seen.append(str(told))
    return [(name, " and ".join(told)) for name, told in found.items()]


def sources_of(stage: StageFacts) -> list[dict[str, Any]]:
    """Where a stage's examples came from."""
    told = stage.data.get("sources")
    entries = told if isinstance(told, list) else []
    return [
        {
            "path": str(each.get("path", "")),
            "rows": whole(rows) if isinstance(rows := each.get("rows"), int) else UNKNOWN,
            "digest": str(each.get("digest", "")),
        }
        for each in entries
        if isinstance(each, dict)
    ]


def key_figures(facts: RunFacts, better: int, worse: int, measured: int) -> list[tuple[str, str]]:
    """The few numbers at the top."""
    finished = sum(each.standing == "finished" for each in facts.stages)
    found = [("stages in the end", f"{len(facts.chain)} of {len(facts.stages)}")]
    if finished != len(facts.chain):
        found[0] = ("stages finished", f"{finished} of {len(facts.stages)}")
    if measured:
        found.append(("evals better than the base", f"{better} of {measured}"))
        found.append(("evals worse than the base", f"{worse} of {measured}"))
    end = facts.end.adapter if facts.end else None
    if end is not None:
        found.append(("rank of the end", " + ".join(ranks(g.rank_range) for g in end.chain.groups)))
        found.append(("on disk", size(sum(end.files.values()))))
    seconds = sum(each.state.seconds for each in facts.stages if each.state)
    if seconds:
        found.append(("training took", span(seconds)))
    return found


def transfer_lines(backward: dict[str, float]) -> list[str]:
    """Backward transfer by metric."""
    return [f"{metric}: {signed(mean)}" for metric, mean in backward.items()]
