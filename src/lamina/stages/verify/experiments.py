"""Change one thing about an adapter and replay: what then answers as recorded is the cause."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lamina.checkpoint.probe import along
from lamina.checkpoint.record import Probe, StageRecord
from lamina.config import LoraConfig
from lamina.model import PeftModel
from lamina.stages.verify.contents import Contents
from lamina.stages.verify.replay import Answered, Judgement, ask_both, compared, judge, scaled
from lamina.stages.verify.report import Cause

_AGAIN = "take the directory as save_stage wrote it"
_STEPS, _LEAST, _NEAR = 5, 0.05, 0.3
_NOT_APPLIED = Cause(
    "adapter not applied",
    "the adapter changes nothing: base and adapter answer as the base alone, and did not when the "
    "stage was saved",
    f"lamina inspect DIR shows whether its B matrices are all zero; {_AGAIN}",
)


@dataclass(frozen=True)
class Replayed:
    """A chain that was replayed, and came out otherwise than on record.

    Attributes:
        model: base and adapter.
        adapter: the adapter's name in it.
        contents: the chain's file.
        probe: of its newest stage.
        answered: what base and adapter answered.
        judgement: that, beside the record.
    """

    model: PeftModel
    adapter: str
    contents: Contents
    probe: Probe
    answered: Answered
    judgement: Judgement

    @property
    def record(self) -> StageRecord:
        """The chain's record."""
        assert self.contents.record is not None
        return self.contents.record


def find_causes(replayed: Replayed) -> Iterator[Cause]:
    """What explains the answers; the first found is enough. The base is known to be right."""
    for look in (_unchanged, _stages_left_out, _scaled, _stages_too_many, _too_small):
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
            found = way is not None and way.error < _NEAR and abs(way.size - 1) < _NEAR
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


def _unchanged(replayed: Replayed) -> Cause | None:
    base, chain = replayed.answered.base, replayed.answered.chain
    same = base is not None and chain is not None and torch.equal(base.values, chain.values)
    return _NOT_APPLIED if same else None


def _too_small(replayed: Replayed) -> Cause | None:
    effect = replayed.judgement.effect
    none = effect is not None and effect.is_certain and abs(effect.size) <= 0.1
    return _NOT_APPLIED if none else None


def _scaled(replayed: Replayed) -> Cause | None:
    effect, scale = replayed.judgement.effect, replayed.contents.scale
    for factor in _likely(replayed.record, scale):
        if _under(replayed, factor).passed:
            return scaled_cause(1 / factor, replayed.contents)
    factor = 1.0
    for _ in range(_STEPS):
        # What a network answers is not quite proportional to the update.
        if effect is None or not effect.is_certain or abs(effect.size) < _LEAST:
            return None
        factor /= effect.size
        found = _under(replayed, factor)
        if found.passed:
            return scaled_cause(1 / factor, replayed.contents)
        effect = found.effect
    return None


def _likely(record: StageRecord, scale: float | None) -> list[float]:
    """What mistakes multiply an update by: alpha or r forgotten, rsLoRA, folding in twice."""
    newest = record.laminae[-1].config if record.laminae else {}
    r, alpha = _number(newest.get("r")), _number(newest.get("lora_alpha"))
    known = [scale or 1.0, 2.0, alpha / r, r, math.sqrt(r), 3.0, -1.0]
    factors = [factor for each in known for factor in (1 / each, each)]
    return [factor for factor in dict.fromkeys(factors) if factor != 1.0]


def _under(replayed: Replayed, factor: float) -> Judgement:
    """What comes out with the whole update multiplied."""
    return _replayed_with(replayed, dict.fromkeys(range(len(replayed.record.laminae)), factor))


def _number(value: object) -> float:
    """A number from a record, where anything may stand; 1 if it is none."""
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1e9 else 1.0


def scaled_cause(size: float, contents: Contents) -> Cause:
    """The adapter is there several times, or only a part of it."""
    said = f"the adapter is scaled by {size:.3g}: its update is {size:.3g} times what it was"
    scale, record = contents.scale, contents.record
    if scale is None or record is None or abs(scale - size) > 0.01 * abs(size):
        return Cause("adapter scaled", f"{said} when the stage was saved", _AGAIN)
    return Cause(
        "adapter scaled",
        f"{said}, since adapter_config.json gives another scaling than the record",
        f"in adapter_config.json, {_back(contents.file.config, record, scale)}",
    )


def _back(config: LoraConfig, record: StageRecord, scale: float) -> str:
    """How to set a config's scaling back."""
    rslora = bool(record.laminae[-1].config.get("use_rslora", False))
    if config.use_rslora != rslora:
        return f"set use_rslora to {str(rslora).lower()}"
    patterns = ", and divide what is in alpha_pattern likewise" if config.alpha_pattern else ""
    return f"set lora_alpha to {config.lora_alpha / scale:g}, not {config.lora_alpha:g}{patterns}"


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
        if _replayed_with(replayed, {index: 0.0}).passed:
            return Cause(
                "other stages",
                f"the answers on record are those without the ranks of stage {lamina.stage!r}, "
                "which are in the file",
                _AGAIN,
            )
    return None


def _replayed_with(replayed: Replayed, factors: dict[int, float]) -> Judgement:
    """What comes out with the updates of laminae multiplied, by their index."""
    with scaled(replayed.model, replayed.adapter, replayed.record.laminae, factors):
        return judge(replayed.probe, ask_both(replayed.model, replayed.probe.tokens))
