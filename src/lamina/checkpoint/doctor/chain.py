"""Checks of the stage record: against itself, and against the tensors and the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from lamina.checkpoint.digest import files_digest
from lamina.checkpoint.doctor.evidence import StoredTensor
from lamina.checkpoint.doctor.findings import Finding, Severity
from lamina.checkpoint.doctor.registry import check
from lamina.checkpoint.origin import record_of
from lamina.checkpoint.record import Base, Stage, StageRecord
from lamina.config import LoraConfig
from lamina.errors import CheckpointError


@check
def record_against_tensors(
    settings: LoraConfig,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    record: StageRecord,
) -> Iterator[Finding]:
    """Whether the record tells of the tensors that are there."""
    shapes = {name: each.shape for name, each in tensors.items()}
    try:
        record_of(settings, shapes, dict(metadata), source="this adapter")
    except CheckpointError as error:
        what = (
            f"The stage record and the tensors contradict each other (among {len(record.stages)} "
        )
        cure = (
            "another tool changed the tensors: take the directory as it was saved, or open it as "
        )
        cure += "a plain adapter with PeftModel.from_pretrained"
        what += "stages)"
        yield Finding("error", "record-contradicts", what, error.faults or (error.what,), cure)


@check
def weights_as_saved(tensors: Mapping[str, StoredTensor], record: StageRecord) -> Iterator[Finding]:
    """Whether the tensors are those that were saved."""
    if record.weights is None:
        return
    files = {each.file for each in tensors.values()}
    try:
        digest = files_digest(files)
    except CheckpointError:
        # That tensors don't lie as they should is told already.
        return
    if digest != record.weights:
        what = "The tensors are not those that were saved with the record: their digest is another"
        cure = "the file was damaged, or changed by a tool that kept the record: take it as it was "
        cure += "saved; if the change was meant, begin_stage(parent=DIR) and save_stage record anew"
        where = tuple(sorted(file.name for file in files))
        yield Finding("error", "weights-changed", what, where, cure)


@check
def config_of_base(config: dict[str, Any], record: StageRecord) -> Iterator[Finding]:
    """Whether config and record name one base."""
    told, named = record.newest.base.name_or_path, config.get("base_model_name_or_path")
    if told and named and PurePath(told).name != PurePath(str(named)).name:
        what = f"The config names the base {named}, the record {told}"
        cure = "right if the base was renamed or moved; else correct base_model_name_or_path: "
        cure += "`lamina doctor DIR --base BASE` compares the weights themselves"
        yield Finding("warning", "base-contradicts", what, ("base_model_name_or_path",), cure)


@check
def bases(record: StageRecord) -> Iterator[Finding]:
    """Whether all stages were trained on one base."""
    for before, after in pairwise(record.stages):
        names = (f"{before.name} -> {after.name}",)
        lines = tuple(_differences(before.base, after.base))
        if lines:
            what = f"Stage {after.name!r} was trained on another base than {before.name!r}"
            cure = (
                "their updates are summed over one base in the end: `lamina verify DIR` measures "
            )
            cure += "whether the answers are as recorded"
            yield Finding("warning", "stages-differ-in-base", what, (*names, *lines), cure)
        if _differ(before.base.tokenizer, after.base.tokenizer):
            more = (after.base.tokenizer_size or 0) > (before.base.tokenizer_size or 0)
            what = f"Stage {after.name!r} was trained with another vocabulary than {before.name!r}"
            cure = "right if tokens were added; else one of them read other ids: use the newest "
            cure += "stage's tokenizer, and check the older stage's task"
            severity: Severity = "note" if more else "warning"
            yield Finding(severity, "stages-differ-in-tokenizer", what, names, cure)
        if _differ(before.base.chat_template, after.base.chat_template):
            what = (
                f"Stage {after.name!r} was trained with another chat template than {before.name!r}"
            )
            cure = "prompt with the newest stage's template"
            yield Finding("note", "stages-differ-in-template", what, names, cure)


def _differences(before: Base, after: Base) -> Iterator[str]:
    if _differ(before.model_class, after.model_class):
        yield f"{before.model_class}, then {after.model_class}"
    grown = _differ(before.vocab_size, after.vocab_size)
    if grown:
        yield f"vocabulary {before.vocab_size}, then {after.vocab_size}"
    elif _differ(before.shapes, after.shapes):
        yield "names or shapes of the weights differ"


def _differ(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other


@check
def what_is_missing(record: StageRecord) -> Iterator[Finding]:
    """Whether all that the stages were trained on is in the file."""
    if record.left_out:
        what = f"{record.newest.name!r} was trained on top of stages that are not in this file"
        cure = "load the chain that it was taken out of, if it is to answer as it did in training"
        yield Finding("warning", "stages-left-out", what, record.left_out, cure)
    rounded = [each for each in record.laminae if each.error]
    if rounded:
        lines = tuple(f"{each.stage}: {each.error:.2%} of the update" for each in rounded)
        what = "Flattening left a part of the update out"
        cure = "flatten the chain again with a higher rank, if that is too much"
        yield Finding("note", "flattened-in-part", what, lines, cure)


@check
def what_is_recorded(record: StageRecord) -> Iterator[Finding]:
    """What the record says for those who load it."""
    newest: Stage = record.newest
    if newest.probe is None:
        what = "The record has no probe, so that nobody can check that it answers as it did"
        cure = "the next stage that save_stage writes has one, if the model takes tokens; then "
        cure += "`lamina verify DIR` compares"
        yield Finding("note", "probe-missing", what, (newest.name,), cure)
    if newest.base.sketch is None:
        what = "The record has no sketch of the base, so that another one of its shapes would pass"
        cure = "the next stage that save_stage writes has one"
        yield Finding("note", "sketch-missing", what, (newest.name,), cure)
