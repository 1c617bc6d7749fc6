"""Save a stage as one laminated adapter."""

from __future__ import annotations

import datetime
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from pydantic_core import to_jsonable_python

from lamina.checkpoint.adapter import AdapterFile, write_adapter
from lamina.checkpoint.digest import tensors_digest
from lamina.checkpoint.keys import slots
from lamina.checkpoint.origin import LEAVES, PREFIX
from lamina.checkpoint.record import Lamina, Probe, Stage, StageRecord
from lamina.checkpoint.written import check_whole
from lamina.config import LoraConfig, PeftConfig
from lamina.engine.compose import Factors
from lamina.engine.flat_config import flat_config
from lamina.engine.layers import LayerAdapter
from lamina.engine.layers.linear import store_in_by_out
from lamina.engine.names import adapted_layers
from lamina.errors import MismatchWarning, ProbeWarning, StageError
from lamina.model import PeftModel
from lamina.model.tasks import base_class
from lamina.model.vocabulary import unsaved_rows
from lamina.stages.context import StageContext, context_of
from lamina.stages.lamination import Part, put_together, to_tensors
from lamina.stages.likeness import tell
from lamina.stages.original import on_original_base
from lamina.stages.probing import probe_of
from lamina.stages.rows import gather
from lamina.stages.tokenizers import (
    describe_tokenizer,
    tokenizer_faults,
    tokenizer_remarks,
    with_tokenizer,
)
from lamina.storage.atomic import atomic_directory


def save_stage(
    model: PeftModel,
    path: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    data: Any = None,
    tokenizer: Any = None,
    probe: bool = True,
) -> StageRecord:
    """Write the chain that a model holds as one ordinary PEFT adapter with a stage record.

    Ranks of older stages come first. The newest stage's scaling becomes the file's, so its own
    factors are stored untouched. A crash leaves the old directory or the new one.

    Args:
        model: from `begin_stage`.
        path: the stage's directory.
        metrics: numbers to record, by name.
        data: what the stage was trained on: anything that JSON can hold.
        tokenizer: the one that it was trained with: the hashes of its vocabulary and its chat
            template are recorded. None keeps what `begin_stage` was given.
        probe: record what the model, and its base alone, answer to a few tokens, so that
            `lamina verify` can replay it. A model that can't be asked is saved without, which a
            `ProbeWarning` tells.

    Returns:
        The record that was written.

    Raises:
        StageError: no stage was begun on the model, or a value can't be recorded.
    """
    context = context_of(model)
    _check_whole(model, context)
    _check_recordable(metrics, data)
    parts = [
        *(_part(model, adapter, lamina) for adapter, lamina in context.older),
        _newest_part(model, context),
    ]
    newest = parts[-1]
    scaling = LayerAdapter.of(newest.config, newest.config.r, newest.config.lora_alpha).scaling
    wholes = put_together(parts, scaling)
    saved, biases, others = _others(model, context)
    adapters = _adapters(context)
    owners, rows, replaced = gather(model.get_base_model(), adapters)
    record = _record(
        _with_tokenizer(context, tokenizer), parts, saved, biases, owners, metrics, data
    )
    config = flat_config(
        model.get_base_model(),
        newest.config,
        [part.config for part in parts],
        {module: whole.rank for module, whole in wholes.items()},
        scaling,
        list(saved),
    )
    config.trainable_token_indices = rows or None
    config.base_model_name_or_path = context.base.name_or_path
    if config.task_type is None:
        config.auto_mapping = base_class(model.get_base_model())
    layers = dict(adapted_layers(model.get_base_model()))
    embeddings = {module for module, layer in layers.items() if layer.is_embedding}
    config.fan_in_fan_out = store_in_by_out(layers.values())
    if config.bias == "lora_only":
        others = {**_untrained_biases(model), **others}
    tensors = {**to_tensors(wholes, embeddings), **newest.extras, **others, **replaced}
    asked, failure = None, None
    if probe:
        asked, failure = probe_of(model, adapters, list(saved))
    record = _proved(record, asked, tensors)
    with atomic_directory(path) as staging:
        write_adapter(staging, config, tensors, record.to_metadata())
    saved_file = AdapterFile(str(path), config, tensors, {})
    for fault in unsaved_rows(model.get_base_model(), saved_file):
        _warn_of_rows(path, fault)
    if failure is not None:
        warnings.warn(f"{path} is saved without a probe: {failure}", ProbeWarning, stacklevel=2)
    return record


def _warn_of_rows(path: str | Path, fault: str) -> None:
    warnings.warn(
        f"{path} is saved without values that it needs: {fault}. Nobody can load it but on this "
        "very base: train them by trainable_token_indices, which puts them into the file, or save "
        "the resized base and train on that.",
        MismatchWarning,
        stacklevel=3,
    )


def _proved(
    record: StageRecord, probe: Probe | None, tensors: Mapping[str, torch.Tensor]
) -> StageRecord:
    """The record with what the stage's model answers, and the digest of what is saved."""
    newest = record.newest.model_copy(update={"probe": probe})
    stages = (*record.stages[:-1], newest)
    # What has no values can't be written either, and is refused there.
    empty = any(tensor.is_meta for tensor in tensors.values())
    weights = None if empty else tensors_digest(tensors)
    return record.model_copy(update={"stages": stages, "weights": weights})


def _adapters(context: StageContext) -> list[str]:
    """All adapters of the chain in the model, oldest first."""
    return [*(adapter for adapter, _ in context.older), context.name]


def _check_whole(model: PeftModel, context: StageContext) -> None:
    adapters = _adapters(context)
    gone = [adapter for adapter in adapters if adapter not in model.peft_config]
    if gone:
        raise StageError(
            f"The model no longer has {', '.join(map(repr, gone))} of the chain "
            f"{' -> '.join(adapters)}.",
            cure="begin the stage again; to turn an older adapter off, use set_adapter",
        )
    if not any(True for _ in adapted_layers(model.get_base_model())):
        raise StageError(
            "The model's adapters were taken out (merge_and_unload or unload); nothing is left to "
            "save as a stage.",
            cure="save_stage first, then load(path, base).merge_and_unload()",
        )
    strange = [adapter for adapter in model.active_adapters if adapter not in adapters]
    if strange:
        raise StageError(
            f"{', '.join(map(repr, strange))} takes part in what the model answers, and is no part "
            f"of the chain {' -> '.join(adapters)}: the file would answer otherwise.",
            cure=f"model.set_adapter({adapters!r}, train={[context.name]!r}); a new adapter over "
            "these is a stage of its own",
        )


def _check_recordable(metrics: Mapping[str, float] | None, data: Any) -> None:
    faults = [
        f"metrics[{name!r}]={value!r} is not a finite number"
        for name, value in (metrics or {}).items()
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value)
    ]
    faults += [
        f"metrics[{name!r}]: a name is a string"
        for name in metrics or {}
        if not isinstance(name, str)
    ]
    try:
        json.dumps(to_jsonable_python(data, inf_nan_mode="constants"), allow_nan=False)
    except ValueError as error:
        faults.append(f"data can't be written as JSON: {error}")
    if faults:
        raise StageError("The stage can't be saved with what it was given.", faults=faults)


def _part(model: PeftModel, adapter: str, lamina: Lamina) -> Part:
    config = cast(LoraConfig, PeftConfig.from_dict(lamina.config))
    factors = {}
    extras = {}
    layers = [(m, x) for m, x in adapted_layers(model.get_base_model()) if adapter in x.records]
    check_whole(
        {f"{PREFIX}{m}.{leaf}": t for m, x in layers for leaf, t in x.tensors(adapter).items()}
    )
    for module, layer in layers:
        record = layer.records[adapter]
        a, b = layer.factors(adapter)
        for leaf, tensor in layer.tensors(adapter).items():
            if leaf not in LEAVES:
                extras[f"{PREFIX}{module}.{leaf}"] = tensor.detach()
        bias = layer.tensors(adapter).get("lora_B.bias")
        factors[module] = Factors(
            a.detach(), b.detach(), record.scaling, None if bias is None else bias.detach()
        )
    return on_original_base(model, adapter, Part(lamina, config, factors, extras))


def _newest_part(model: PeftModel, context: StageContext) -> Part:
    ranks = {
        module: layer.records[context.name].r
        for module, layer in adapted_layers(model.get_base_model())
        if context.name in layer.records
    }
    before = context.continued
    lamina = Lamina(
        stage=context.name,
        config=dict(context.config),
        ranks=ranks,
        began=before.began if before else None,
        made_of=before.made_of if before else (),
        error=before.error if before else None,
    )
    return _part(model, context.name, lamina)


def _others(
    model: PeftModel, context: StageContext
) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Saved modules and biases with their owners, and their tensors; the newest copy wins."""
    saved: dict[str, str] = {}
    biases: dict[str, str] = {}
    tensors: dict[str, Any] = {}
    for adapter in _adapters(context):
        for key, slot in slots(model, adapter, model.adapter_state).items():
            if slot.kind == "factor":
                continue
            tensors[key] = slot.tensor.detach()
            module = slot.module.removeprefix(PREFIX)
            if slot.kind == "saved":
                saved[module] = adapter
            else:
                biases[f"{module}.bias"] = adapter
    return saved, biases, tensors


def _with_tokenizer(context: StageContext, tokenizer: Any) -> StageContext:
    if tokenizer is None:
        return context
    before = context.base if context.base.tokenizer else with_tokenizer(context.parent)
    # Trained is trained: what is wrong is told, and nothing is lost for it.
    apart = [*tokenizer_faults(before, tokenizer), *tokenizer_remarks(before, tokenizer)]
    tell(f"Stage {context.name!r}", apart, stacklevel=3)
    known = context.base.model_copy(update=describe_tokenizer(tokenizer))
    return replace(context, base=known)


def _without_repetition(stage: Stage, newest: Stage) -> Stage:
    """An older stage without the sketch of its base, where that is the newest's."""
    sketch, kept = stage.base.sketch, newest.base.sketch
    if sketch is None or kept is None:
        return stage
    # What the base was loaded in stays in its description.
    if sketch.model_copy(update={"dtype": kept.dtype}) != kept:
        return stage
    base = stage.base.model_copy(update={"sketch": None})
    return stage.model_copy(update={"base": base})


def _untrained_biases(model: PeftModel) -> dict[str, Any]:
    """The biases of all adapted layers: "lora_only" means every one of them to a reader."""
    layers = adapted_layers(model.get_base_model())
    biases = {module: layer.get_base_layer()._parameters.get("bias") for module, layer in layers}
    return {
        f"{PREFIX}{module}.base_layer.bias": bias.detach()
        for module, bias in biases.items()
        if bias is not None
    }


def _record(
    context: StageContext,
    parts: list[Part],
    saved: dict[str, str],
    biases: dict[str, str],
    rows: dict[str, dict[str, tuple[int, ...]]],
    metrics: Mapping[str, float] | None,
    data: Any,
) -> StageRecord:
    stage = Stage(
        name=context.name,
        mode=context.mode,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        metrics={key: float(value) for key, value in (metrics or {}).items()},
        data=data,
        base=context.base,
        versions=_versions(),
    )
    earlier = context.parent.stages if context.parent else ()
    return StageRecord(
        stages=(*(_without_repetition(each, stage) for each in earlier), stage),
        laminae=tuple(part.lamina for part in parts),
        saved_modules=saved,
        biases=biases,
        token_rows=rows,
        left_out=context.parent.left_out if context.parent else (),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("lamina", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
