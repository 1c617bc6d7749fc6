"""What was measured of the base and of every stage, in `evaluation.json`; needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.storage.whole import write_whole
from lamina.training.noted import read_notes

FILE = "evaluation.json"
FORMAT = 1
_CURE = "delete it, and all stages are measured anew"


@dataclass(frozen=True)
class Score:
    """What one eval says of one model.

    Attributes:
        metric: "loss" (nats per token), "accuracy", "exact_match", a function's name, or "lm_eval".
        value: of the metric.
        higher_is_better: else lower is.
        examples: that it was measured on.
        error: the standard error of `value`; None where it isn't known.
        details: further figures by name, such as perplexity, or each of several tasks.
    """

    metric: str
    value: float
    higher_is_better: bool
    examples: int
    error: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)

    def worse_by(self, before: Score) -> float:
        """The share of `before` by which this is worse; negative where it is better.

        Shares of nothing: infinitely worse, or better, than a score of 0, unless it still is 0.
        """
        change = before.value - self.value if self.higher_is_better else self.value - before.value
        if math.isnan(change):
            return math.inf
        if not change:
            return 0.0
        return change / abs(before.value) if before.value else math.copysign(math.inf, change)


@dataclass(frozen=True)
class Measured:
    """A score, and what it depends on beside the model: eval, its data, how it is measured.

    Attributes:
        hash: of all that.
        score: None where the model can't be measured so, as a reward model's loss on a text.
        seconds: that it took.
    """

    hash: str
    score: Score | None
    seconds: float = 0.0


@dataclass(frozen=True)
class Answer:
    """How a model goes on with one of the plan's prompts, greedily.

    Attributes:
        prompt: as in the plan.
        text: what it wrote, without special tokens.
        tokens: how many.
        ended: whether it came to an end by itself.
    """

    prompt: str
    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class ModuleDrift:
    """What a stage changed in one module: D, its update less that of the stage before.

    Attributes:
        module: its plain name.
        norm: Frobenius norm of D.
        weight_norm: of the base's weight; None where it can't be read.
        effective_rank: exp of the entropy of D's singular values; 0 if nothing changed. None of a
            large matrix that was trained whole, where it would take too long.
        rank: of the factors that hold D, or of any matrix of its shape, if that is less.
        input_overlap: |V_D^T V_before|_F^2 / min(rank): the share of the smaller space of inputs
            that D and the stages before have in common, 0 to 1; None in a first stage.
        output_overlap: likewise, of outputs.
    """

    module: str
    norm: float
    weight_norm: float | None
    effective_rank: float | None
    rank: int
    input_overlap: float | None = None
    output_overlap: float | None = None

    @property
    def relative(self) -> float | None:
        """The norm of the change over that of the base's weight."""
        return self.norm / self.weight_norm if self.weight_norm else None


@dataclass(frozen=True)
class Judged:
    """All that was measured of the base, or of a stage.

    Attributes:
        weights: the digest of what was measured; other weights have to be measured again.
        scores: eval -> what it says.
        answers: to the plan's prompts.
        answers_hash: of what the answers depend on beside the model.
        drift: of the modules that changed; None of the base, and before it was measured.
        seconds: that judging took.
    """

    weights: str | None = None
    scores: Mapping[str, Measured] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()
    answers_hash: str = ""
    drift: tuple[ModuleDrift, ...] | None = None
    seconds: float = 0.0

    def score(self, name: str) -> Score | None:
        """Of an eval; None if it wasn't, or can't be, measured."""
        found = self.scores.get(name)
        return found.score if found else None

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Judged:
        """Of its JSON."""
        scores = {
            name: Measured(
                each["hash"],
                None if each["score"] is None else Score(**_numbers(each["score"])),
                each["seconds"],
            )
            for name, each in told["scores"].items()
        }
        return cls(
            weights=told["weights"],
            scores=scores,
            answers=tuple(Answer(**each) for each in told["answers"]),
            answers_hash=told["answers_hash"],
            drift=None
            if told["drift"] is None
            else tuple(ModuleDrift(**each) for each in told["drift"]),
            seconds=told["seconds"],
        )


@dataclass(frozen=True)
class Evaluation:
    """What was measured in a run.

    Attributes:
        base: of the base.
        stages: stage -> of its end.
        evals: the names of the evals, in the plan's order.
        learnt_in: eval -> the stage whose task it is, where the plan says so.
    """

    base: Judged = field(default_factory=Judged)
    stages: Mapping[str, Judged] = field(default_factory=dict)
    evals: tuple[str, ...] = ()
    learnt_in: Mapping[str, str] = field(default_factory=dict)

    def of(self, stage: str | None) -> Judged | None:
        """What is known of a stage; of the base if there is none."""
        return self.base if stage is None else self.stages.get(stage)

    def having(self, stage: str | None, judged: Judged) -> Evaluation:
        """With what is known of one stage, or of the base, replaced."""
        if stage is None:
            return replace(self, base=judged)
        return replace(self, stages={**self.stages, stage: judged})

    def write(self, directory: Path) -> None:
        """Put it into `directory`, durably."""
        text = json.dumps({"format": FORMAT, **_plain(asdict(self))}, indent=1)
        write_whole(directory / FILE, text + "\n")

    @classmethod
    def read(cls, directory: Path) -> Evaluation:
        """What was written; nothing where nothing was.

        Raises:
            RunError: the file is broken, or from a newer version.
        """
        file = directory / FILE
        if not file.is_file():
            return cls()
        return read_notes(file, FORMAT, cls._from_dict, cure=_CURE)

    @classmethod
    def _from_dict(cls, told: Mapping[str, Any]) -> Evaluation:
        return cls(
            base=Judged.from_dict(told["base"]),
            stages={name: Judged.from_dict(each) for name, each in told["stages"].items()},
            evals=tuple(told["evals"]),
            learnt_in=dict(told["learnt_in"]),
        )


# JSON has no words for these.
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(told: Mapping[str, Any]) -> dict[str, Any]:
    """A score with what `_plain` wrote as words as numbers again."""
    found = {
        key: _WORDS.get(each, each) if isinstance(each, str) and key != "metric" else each
        for key, each in told.items()
    }
    return {**found, "details": {k: _WORDS.get(v, v) for k, v in told["details"].items()}}
