"""A dry run of a plan: nothing is trained, loaded or downloaded but configs and tokenizers."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lamina.amounts import size
from lamina.training.plan import Plan
from lamina.training.plan.document import Document, Fault
from lamina.training.plan.located import located
from lamina.training.plan.reading import fault_lines
from lamina.training.preflight.arguments import faults_of_arguments, faults_of_functions
from lamina.training.preflight.base import Base, open_base
from lamina.training.preflight.chain import faults_of_chain
from lamina.training.preflight.data import look_at_data
from lamina.training.preflight.needs import disk_need, memory_need
from lamina.training.preflight.places import document_of
from lamina.training.preflight.rehearsal import faults_of_trainers
from lamina.training.preflight.report import DataReport, Need, PlanReport, StageReport
from lamina.training.preflight.targets import Adapter, faults_of_one_file, look_at_adapters

# What is known of memory for certain; the rest is an estimate.
_CERTAIN = ("base", "adapters")


def check_plan(
    plan: Plan, *, document: Document | None = None, root: str | Path | None = None
) -> PlanReport:
    """Find everything that would keep a plan from being run to its end.

    The base's config, weights and tokenizer are there; every pattern of every stage matches; the
    stages fit into one file; parents can be folded where that is asked for; all data is there in a
    format of its method; functions can be imported; transformers and TRL know what they are
    given, and make trainers of it; memory and disk are enough, see
    `lamina.training.preflight.needs`.

    Args:
        plan: the plan, as `open_plan` reads it.
        document: with its lines, for messages.
        root: the folder that the base, data, templates and functions are looked for in first: that
            of the plan's file if not given.
    """
    document = document or document_of(plan, "The plan")
    folder = Path(root) if root is not None else Path(document.source).expanduser().parent
    written = plan.model_name_or_path
    plan = located(plan, folder)
    base, faults = open_base(plan, folder)
    data, wrong = look_at_data(plan, document, folder, base.tokenizer if base else None)
    faults += wrong
    faults += faults_of_functions(plan, document, folder)
    faults += faults_of_arguments(plan, document)
    adapters: list[Adapter] = []
    needs: tuple[Need, ...] = ()
    notes: list[str] = []
    if base is not None:
        adapters, wrong = look_at_adapters(plan, document, base)
        wrong += faults_of_one_file(plan, document, base, adapters)
        faults += wrong or faults_of_chain(plan, document, base, adapters)
        if not faults and base.tokenizer is not None:
            faults += faults_of_trainers(plan, document, folder, base, adapters)
        needs = (memory_need(plan, base, adapters), disk_need(plan, adapters))
        faults += _too_much(needs)
        notes += _tight(needs)
    reports = tuple(_stages(plan, base, adapters, data))
    notes += _idle(plan, reports)
    return PlanReport(
        source=document.source,
        base=written,
        base_class=type(base.model).__name__ if base else None,
        base_parameters=base.parameters if base else None,
        stages=reports,
        needs=needs,
        faults=tuple(fault_lines(document, faults)),
        notes=tuple(notes),
    )


def _stages(
    plan: Plan, base: Base | None, adapters: list[Adapter], data: list[DataReport]
) -> list[StageReport]:
    found = []
    for place, stage in enumerate(plan.stages):
        settings = plan.settings_of(stage)
        adapter = adapters[place] if base else None
        dry = adapter.found if adapter else None
        found.append(
            StageReport(
                name=stage.name,
                mode=stage.mode or "fresh",
                method=settings.method or "sft",
                rank=adapter.config.r if adapter else settings.lora_r or 0,
                layers=sum(kind.count for kind in dry.kinds) if dry else None,
                counts=dict(dry.counts) if dry else {},
                trainable=adapter.trainable if adapter else None,
                examples=data[place].examples,
                steps=_steps(plan, place, data[place].examples),
                formats=data[place].formats,
            )
        )
    return found


def _steps(plan: Plan, place: int, examples: int | None) -> int | None:
    settings = plan.settings_of(plan.stages[place])
    if settings.max_steps is not None:
        return settings.max_steps
    if examples is None or settings.packing or settings.method == "grpo":
        return None
    devices = max(1, torch.cuda.device_count())
    batches = math.ceil(examples / ((settings.per_device_train_batch_size or 1) * devices))
    steps = math.ceil(batches / (settings.gradient_accumulation_steps or 1))
    return math.ceil(steps * (settings.num_train_epochs or 1))


def _too_much(needs: tuple[Need, ...]) -> list[Fault]:
    """What can't go well: more disk than is free, more memory than there is, estimates aside."""
    faults: list[Fault] = []
    for need in needs:
        if need.what == "disk":
            limit, certain, where = need.free, need.bytes, "output_dir"
        else:
            certain = sum(need.parts[name] for name in _CERTAIN)
            limit, where = need.total, "model_name_or_path"
        if limit is not None and certain > limit:
            what = "free" if need.what == "disk" else "there"
            told = (
                f"needs {size(certain)} of {need.what}, and {need.where} has {size(limit)} {what}"
            )
            faults.append(((where,), told))
    return faults


def _tight(needs: tuple[Need, ...]) -> list[str]:
    return [
        f"about {size(need.bytes)} of {need.what} are needed and {size(need.free)} are free in "
        f"{need.where}: a smaller per_device_train_batch_size, max_length or "
        "gradient_checkpointing: true takes less"
        for need in needs
        if need.what == "memory" and need.free is not None and need.bytes > need.free
    ]


def _idle(plan: Plan, reports: tuple[StageReport, ...]) -> list[str]:
    return [
        f"{stage.name}: its only step is the first of a warmup, whose rate is 0, so that nothing "
        "is trained: warmup_steps: 0"
        for stage, report in zip(plan.stages, reports, strict=True)
        if report.steps == 1 and plan.settings_of(stage).warmup_steps
    ]
