"""Change one thing about an adapter and replay: what then answers as recorded is the cause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lamina.checkpoint.probe import along
from lamina.checkpoint.record import Probe, StageRecord
from lamina.model import PeftModel
from lamina.stages.verify.replay import Answered, Judgement, ask_both, compared, judge, scaled
from lamina.stages.verify.report import Cause

_AGAIN = "take the directory as save_stage wrote it"


@dataclass(frozen=True)
class Replayed:
    """A chain that was replayed, and came out otherwise than on record.

    Attributes:
        model: base and adapter.
        adapter: the adapter's name in it.
        record: the chain's record.
        probe: of its newest stage.
        answered: what base and adapter answered.
        judgement: that, beside the record.
        scale: the scaling that the config gives over that on record, if that is known.
    """

    model: PeftModel
    adapter: str
    record: StageRecord
    probe: Probe
    answered: Answered
    judgement: Judgement
    scale: float | None


def find_causes(replayed: Replayed) -> Iterator[Cause]:
    """What explains the answers; the first found is enough. The base is known to be right."""
    for look in (_not_applied, _scaled, _stages_left_out, _stages_too_many):
        cause = look(replayed)
        if cause is not None:
            yield cause
            return


def folded_into_base(record: StageRecord, answered: Answered) -> Cause | None:
    """Whether the base alone answers as it should with the adapter, or with older stages of it."""
    for stage in reversed(record.stages):
        if stage.probe is None or answered.base is None or not answered.base.is_finite:
            continue
        if len(answered.base.tokens) != len(stage.probe.tokens):
            continue
        if stage.probe.base is None:
            found = compared(stage.probe, stage.probe.chain, answered.base).passed
        else:
            # Along the way from the recorded base to the recorded chain: 1 is at its end.
            way = along(stage.probe.chain, stage.probe.base, answered.base)
            found = way is not None and way.is_certain and way.passed
        if not found:
            continue
        newest = stage is record.newest
        what = "the adapter" if newest else f"the chain up to stage {stage.name!r}"
        return Cause(
            "base already merged",
            f"the base already has {what} folded in: alone, it answers as base and adapter did "
            f"together when stage {stage.name!r} was saved",
            "give the base as it was before merging: --base DIR; or use this model as it is, "
            "without the adapter",
        )
    return None


def _not_applied(replayed: Replayed) -> Cause | None:
    base, chain = replayed.answered.base, replayed.answered.chain
    effect = replayed.judgement.effect
    same = base is not None and chain is not None and bool((base.values == chain.values).all())
    small = effect is not None and effect.is_certain and abs(effect.size) <= 0.1 + effect.error
    if not (same or small):
        return None
    return Cause(
        "adapter not applied",
        "the adapter changes nothing: base and adapter answer as the base alone, and did not when "
        "the stage was saved",
        f"lamina inspect DIR shows whether its B matrices are all zero; {_AGAIN}",
    )


def _scaled(replayed: Replayed) -> Cause | None:
    laminae, effect = replayed.record.laminae, replayed.judgement.effect
    candidates = [0.5, 2.0]
    if replayed.scale not in (None, 0.0):
        candidates.insert(0, 1 / float(replayed.scale or 1.0))
    if effect is not None and effect.is_certain and abs(effect.size) > 0.05:
        candidates.append(1 / effect.size)
    for factor in dict.fromkeys(candidates):
        everywhere = dict.fromkeys(range(len(laminae)), factor)
        if factor != 1.0 and _comes_out(replayed, everywhere):
            return scaled_cause(1 / factor, replayed.record, replayed.scale)
    return None


def scaled_cause(size: float, record: StageRecord, scale: float | None) -> Cause:
    """The adapter is there several times, or only a part of it."""
    said = f"the adapter is scaled by {size:.3g}: its update is {size:.3g} times what it was"
    newest = record.laminae[-1].config
    if scale is not None and abs(scale / size - 1) < 0.01:
        return Cause(
            "adapter scaled",
            f"{said}, since alpha and r in adapter_config.json don't give the scaling on record",
            "set them back; stage "
            f"{record.laminae[-1].stage!r} has lora_alpha={newest.get('lora_alpha')}, "
            f"r={newest.get('r')}, use_rslora={newest.get('use_rslora', False)} on record",
        )
    return Cause("adapter scaled", f"{said} when the stage was saved", _AGAIN)


def _stages_left_out(replayed: Replayed) -> Cause | None:
    chain = replayed.answered.chain
    for stage in reversed(replayed.record.stages[:-1]):
        probe = stage.probe
        if probe is None or chain is None or len(probe.tokens) != len(chain.tokens):
            continue
        if compared(probe, probe.chain, chain).passed:
            return Cause(
                "other stages",
                f"the answers are those of the chain up to stage {stage.name!r}: what came after "
                "isn't applied",
                _AGAIN,
            )
    return None


def _stages_too_many(replayed: Replayed) -> Cause | None:
    laminae = replayed.record.laminae
    for index, lamina in enumerate(laminae if len(laminae) > 1 else ()):
        if _comes_out(replayed, {index: 0.0}):
            return Cause(
                "other stages",
                f"the answers on record are those without the ranks of stage {lamina.stage!r}, "
                "which are in the file",
                _AGAIN,
            )
    return None


def _comes_out(replayed: Replayed, factors: dict[int, float]) -> bool:
    with scaled(replayed.model, replayed.adapter, replayed.record.laminae, factors):
        return judge(replayed.probe, ask_both(replayed.model, replayed.probe.tokens)).passed
