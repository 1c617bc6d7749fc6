"""Look at the file, the tokenizer and the base: all that can be told without asking a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamina.stages.bases import base_faults, base_remarks, describe_base
from lamina.stages.configs import config_faults
from lamina.stages.likeness import base_likeness, updates_in_file
from lamina.stages.tokenizers import (
    template_remark,
    tokenizer_faults,
    tokenizer_remarks,
    with_tokenizer,
)
from lamina.stages.verify.contents import Contents
from lamina.stages.verify.findings import Findings
from lamina.stages.verify.report import Cause

_SHOWN = 6
_AGAIN = "copy or download the directory again, or save the stage again"


def look_at_file(findings: Findings, contents: Contents) -> None:
    """What is in the file, against what its record says."""
    _look_at_record(findings, contents)
    _look_at_config(findings, contents)
    count = len(contents.file.tensors)
    if contents.not_finite:
        names = _some(contents.not_finite)
        findings.failed("weights", f"NaN or infinity in {names}")
        findings.blame(
            Cause(
                "not finite",
                f"the adapter has NaN or infinity in {names}",
                "go back to a checkpoint from before training diverged",
            )
        )
    elif contents.changed:
        findings.failed("weights", "their digest is not the one on record")
        findings.blame(
            Cause(
                "changed weights",
                "the tensors are not, byte for byte, those that were saved with this record",
                _AGAIN,
            )
        )
    elif contents.changed is None:
        findings.unchecked("weights", f"{count} tensors, of which no digest is on record")
    else:
        findings.passed("weights", f"{count} tensors, byte for byte as they were saved")
    if contents.zero:
        findings.notes.append("all B matrices are zero, so the adapter changes nothing")


def _look_at_record(findings: Findings, contents: Contents) -> None:
    if contents.damage:
        findings.failed("record", contents.damage)
        findings.blame(Cause("damaged record", "the stage record can't be read", _AGAIN))
    for name in contents.missing[:_SHOWN]:
        findings.failed("record", f"{name} is not in the file")
    for fault in contents.contradictions[:_SHOWN]:
        findings.failed("record", fault)
    if contents.missing:
        names = _some(contents.missing)
        findings.blame(
            Cause("incomplete file", f"the file lacks {names}, which belongs to it", _AGAIN)
        )
    elif contents.contradictions:
        findings.blame(
            Cause(
                "damaged record",
                f"record and tensors contradict each other: {contents.contradictions[0]}",
                _AGAIN,
            )
        )
    if contents.record is None and contents.damage is None:
        findings.unchecked("record", "there is none: this is a plain adapter")
    elif contents.whole and contents.record is not None:
        stages = len(contents.record.stages)
        told = "1 stage" if stages == 1 else f"{stages} stages"
        findings.passed("record", f"{told}; every tensor that it names is there, and no other")


def _look_at_config(findings: Findings, contents: Contents) -> None:
    if not contents.whole:
        return
    found = config_faults(contents.file, contents.record, targets=True, alike=False)
    for fault in found.faults[:_SHOWN]:
        findings.failed("config", fault)
    if found.faults:
        more = len(found.faults) - 1
        others = f", and {more} more" if more else ""
        findings.blame(
            Cause(
                "changed config",
                "adapter_config.json is not as it was saved, and contradicts the record: "
                f"{found.faults[0]}{others}",
                found.cure or _AGAIN,
            )
        )


def look_at_tokenizer(
    findings: Findings, contents: Contents, tokenizer: Any, *, own: bool = True
) -> None:
    """Whether the tokenizer has the vocabulary and template of the one it was trained with.

    Args:
        findings: gets the checks and causes.
        contents: the adapter's file.
        tokenizer: the tokenizer, if there is one.
        own: whether it is meant for the adapter. That of the base is there for want of another:
            a template is often set in training, and not in the base.
    """
    recorded = with_tokenizer(contents.record)
    if recorded is None:
        findings.unchecked("tokenizer", "none is on record; save_stage(..., tokenizer=) records it")
        return
    if tokenizer is None:
        findings.unchecked("tokenizer", "none was given, nor lies with the adapter or its base")
        return
    place = getattr(tokenizer, "name_or_path", None)
    where = f" of {place}" if place else ""
    faults = tokenizer_faults(recorded, tokenizer)
    for fault in faults:
        findings.failed("tokenizer", fault)
        findings.blame(
            Cause(
                "another tokenizer",
                f"the tokenizer{where} is another one: the stage was {fault}",
                "use the tokenizer that was saved with the stage or its base",
            )
        )
    if not faults:
        findings.passed("tokenizer", "has the vocabulary on record")
    template = template_remark(recorded, tokenizer)
    findings.notes += [
        remark for remark in tokenizer_remarks(recorded, tokenizer) if remark != template or not own
    ]
    if template and own and not faults:
        findings.failed("chat template", template)
        findings.blame(
            Cause(
                "another chat template",
                f"{template}, so that the same messages become other tokens",
                "give the tokenizer that it was trained with: --tokenizer DIR; "
                "tokenizer.save_pretrained(DIR) puts it beside the adapter",
            )
        )


def look_at_base(findings: Findings, contents: Contents, base: nn.Module) -> None:
    """Whether the base has the weights of the one that the stage was trained on."""
    record = contents.record
    if record is None:
        findings.unchecked("base", "nothing is on record but its name")
        return
    recorded = record.newest.base
    likeness = base_likeness(record, base, lambda: updates_in_file(contents.file))
    here = describe_base(base)
    faults = base_faults(recorded, here, likeness)
    quantiser = here.quantization
    if likeness and likeness.verdict == "quantised" and quantiser == recorded.quantization:
        # The same quantiser makes the same codes of the same weights.
        faults.append(
            f"{quantiser} as on record, but of other weights (correlation "
            f"{likeness.correlation or 0:.3f})"
        )
    findings.notes += base_remarks(likeness)
    if not faults:
        told = "has the recorded weights, as far as they are sampled"
        named = "has the recorded name and shapes; its weights are not on record"
        findings.passed("base", named if likeness is None else told)
        return
    for fault in faults:
        findings.failed("base", fault)
    merged = likeness is not None and likeness.verdict == "merged"
    findings.blame(
        Cause(
            "base already merged" if merged else "another base",
            likeness.sentence
            if likeness is not None and not likeness.ok
            else f"this is another base: {faults[0]}",
            f"give the base that the stage was trained on: --base {recorded.name_or_path or 'DIR'}",
        )
    )


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:2])
    return shown + (f" and {len(names) - 2} more" if len(names) > 2 else "")
