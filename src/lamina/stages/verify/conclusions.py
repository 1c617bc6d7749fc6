"""What the replayed answers say: the figures as checks, and what explains those that are off."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from lamina.checkpoint.probe import ProbeComparison
from lamina.checkpoint.record import Probe, StageRecord
from lamina.model import PeftModel
from lamina.stages.verify.contents import Contents
from lamina.stages.verify.experiments import (
    Replayed,
    find_causes,
    folded_into_base,
    scaled_cause,
)
from lamina.stages.verify.findings import Findings
from lamina.stages.verify.replay import Answered, Judgement, judge
from lamina.stages.verify.report import Cause
from lamina.stages.verify.rounding import rounded_to

_AS_RECORDED = "load the base as on record: lamina verify does so unless told otherwise"


def conclude(
    findings: Findings,
    contents: Contents,
    probe: Probe,
    answered: Answered,
    model: PeftModel | None,
    adapter: str,
) -> Judgement:
    """Tell the answers by the record, and find out why they differ.

    Args:
        findings: gets the checks and causes.
        contents: the adapter's file.
        probe: what should be answered.
        answered: what was.
        model: base and adapter, to experiment with; None if the file can't be opened.
        adapter: the adapter's name in it.
    """
    record = contents.record
    assert record is not None
    judgement = judge(probe, answered)
    _tell(findings, judgement)
    if judgement.passed:
        return judgement
    root = None if model is None else model.get_base_model()
    if not _blame_base(findings, record, probe, answered, judgement, root) and model is not None:
        replayed = Replayed(model, adapter, contents, probe, answered, judgement)
        findings.blame(*find_causes(replayed))
    if contents.scale not in (None, 1.0):
        findings.blame(scaled_cause(float(contents.scale or 0), contents))
    if judgement.chain is not None and not findings.causes:
        findings.blame(_left_over(record, probe, answered, judgement.chain))
    return judgement


def _tell(findings: Findings, judgement: Judgement) -> None:
    base, chain, effect = judgement.base, judgement.chain, judgement.effect
    if base is not None:
        told = figures(base)
        early = judgement.early
        if early is not None and not early.is_none:
            told += f"; it has {early.size:.2f} of the adapter's recorded effect by itself"
        if judgement.base_passed:
            findings.passed("base answers", told)
        elif judgement.passed:
            findings.notes.append(
                f"the base alone answers otherwise than on record ({told}), base and adapter "
                "together do not"
            )
        else:
            findings.failed("base answers", told)
    if chain is None:
        return
    (findings.passed if chain.passed else findings.failed)("answers", figures(chain))
    if effect is None or not judgement.base_passed:
        # From another base, an effect says nothing.
        return
    if effect.is_certain or not effect.passed:
        room = max(effect.error + effect.lost, 0.01)
        told = f"{effect.size:.2f} of the adapter's recorded effect (± {room:.2f})"
        (findings.passed if effect.passed else findings.failed)("effect", told)
    elif chain.passed:
        findings.notes.append(
            f"the adapter changes the answers by {effect.expected:.2g} on average, too little to "
            f"be told from rounding in {chain.judged_by}"
        )


def figures(comparison: ProbeComparison) -> str:
    """The figures of a comparison, in a line."""
    if not math.isfinite(comparison.max_difference):
        return "NaN, or answers of another shape"
    told = f"largest difference {comparison.max_difference:.2g}"
    if comparison.tolerance is not None:
        told += f", tolerance {comparison.tolerance:.2g}"
    if comparison.kl_tolerance is not None:
        told += f"; KL {comparison.kl:.2g}, tolerance {comparison.kl_tolerance:.2g}"
    if comparison.top1_tolerance is not None:
        share = comparison.top1_agreement or 0.0
        told += f"; top-1 {share:.0%}, at least {comparison.top1_tolerance:.0%}"
    return told


def _blame_base(
    findings: Findings,
    record: StageRecord,
    probe: Probe,
    answered: Answered,
    judgement: Judgement,
    root: nn.Module | None,
) -> bool:
    """Whether the base is at fault; then says how."""
    blamed = findings.blames("another base", "base already merged")
    if not blamed and judgement.base is not None and judgement.base_passed:
        return False
    merged = folded_into_base(record, answered)
    if merged is not None:
        findings.blame(merged)
    elif not blamed and judgement.base is not None:
        findings.blame(_other_base(findings, record, probe, answered, judgement.base, root))
    return blamed or not judgement.base_passed or merged is not None


def _other_base(
    findings: Findings,
    record: StageRecord,
    probe: Probe,
    answered: Answered,
    comparison: ProbeComparison,
    root: nn.Module | None,
) -> Cause:
    """Why a base answers otherwise, of which the weights tell nothing."""
    base, recorded = answered.base, record.newest.base
    if base is not None and base.quantization != probe.quantization:
        return _quantised_otherwise(probe, base.quantization, comparison)
    same = any(check.name == "base" and check.verdict == "passed" for check in findings.checks)
    if recorded.sketch is not None and same:
        coarse = None if root is None else rounded_to(root)
        if coarse is not None:
            return _rounded(recorded.dtype, coarse)
        return Cause(
            "unknown",
            "the base has the recorded weights, as far as they are sampled, but answers otherwise "
            f"by itself{_versions_apart(record)}",
            "compare the config and the versions with those on record: lamina inspect DIR",
        )
    return Cause(
        "another base",
        "this base is not the one that the stage was trained on: alone, it answers otherwise "
        f"({figures(comparison)})",
        f"give the base that the stage was trained on: --base {recorded.name_or_path or 'DIR'}",
    )


def _rounded(recorded: str | None, coarse: str) -> Cause:
    return Cause(
        "dtype",
        f"this base has the recorded weights rounded to {coarse}; they were {recorded} when the "
        "stage was saved",
        f"give the base as it was, in {recorded}; or judge by what {coarse} explains: "
        f"--dtype {coarse}",
    )


def _left_over(
    record: StageRecord, probe: Probe, answered: Answered, comparison: ProbeComparison
) -> Cause:
    """What remains when no experiment explains the answers."""
    chain = answered.chain
    assert chain is not None
    if not chain.is_finite:
        return Cause(
            "not finite",
            "base and adapter answer NaN or infinity here, and did not when the stage was saved",
            f"try another dtype: --dtype float32; it was {probe.dtype} on record",
        )
    if chain.quantization != probe.quantization:
        return _quantised_otherwise(probe, chain.quantization, comparison)
    if chain.dtype != probe.dtype:
        return Cause(
            "dtype",
            f"recorded in {probe.dtype}, and here in {chain.dtype}, in which it answers otherwise",
            f"--dtype {probe.dtype}; {_AS_RECORDED}",
        )
    return Cause(
        "unknown",
        "the base answers as on record, base and adapter don't, and neither another scaling nor "
        f"other stages explain it{_versions_apart(record)}",
        "take the directory as save_stage wrote it, or save the stage again",
    )


def _quantised_otherwise(probe: Probe, here: str | None, comparison: ProbeComparison) -> Cause:
    return Cause(
        "quantisation",
        f"the base was {probe.quantization or 'dense'} when the stage was saved, and is "
        f"{here or 'dense'} here ({figures(comparison)})",
        _AS_RECORDED,
    )


def _versions_apart(record: StageRecord) -> str:
    apart = []
    for package, before in record.newest.versions.items():
        try:
            now = version(package)
        except PackageNotFoundError:
            continue
        if now != before:
            apart.append(f"{package} {before} on record, {now} here")
    return f" ({'; '.join(apart)})" if apart else ""
