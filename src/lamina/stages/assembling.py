"""From laminae to the config and the tensors of a plain adapter, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.adapter import AdapterFile, write_adapter
from lamina.checkpoint.digest import tensors_digest
from lamina.checkpoint.origin import faults_of_others
from lamina.checkpoint.record import KEY, Probe, StageRecord
from lamina.config import LoraConfig, numbers
from lamina.engine.compose import Factors
from lamina.engine.flat_config import EVERYWHERE, as_written, flat_config_of_names
from lamina.errors import RecordError
from lamina.model import PeftModel
from lamina.stages.lamination import Chain, Part, put_together, to_tensors
from lamina.stages.narrowing import Written, targets_of
from lamina.stages.selection import Selection, trains_whole

# What makes a config mean something else than plain LoRA.
PLAIN: dict[str, Any] = {
    "use_dora": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "velora_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}


def adapter_of(
    file: AdapterFile, chain: Chain, selection: Selection, newest: LoraConfig, scaling: float
) -> AdapterFile:
    """One file with all laminae of a selection, by the rules of `save_stage`.

    Args:
        file: what the chain was read from.
        chain: the whole chain.
        selection: some of its laminae.
        newest: what is not about ranks is taken from it.
        scaling: of the file; factors with this scaling in front are stored untouched.
    """
    chosen = selection.chain
    wholes = put_together(chosen.parts, scaling)
    begun = replace(newest, **surroundings(file, chain, selection))
    config = flat_config_of_names(
        begun,
        [part.config for part in chosen.parts],
        {module: whole.rank for module, whole in wholes.items()},
        scaling,
    )
    config = with_biases(config, selection)
    return replace(file, config=config, tensors=tensors_of(chosen, wholes))


def own_adapter(file: AdapterFile, chain: Chain, selection: Selection) -> AdapterFile:
    """A file with one lamina as it was trained, its own config included."""
    (part,) = selection.chain.parts
    wrong = [m for m, own in part.factors.items() if numbers(part.config, m)[0] != own.rank]
    if wrong:
        raise RecordError(
            f"In {file.source} the config of stage {part.lamina.stage!r} gives other ranks than it "
            f"has in {len(wrong)} module(s).",
            faults=wrong[:8],
            cure="lamina flatten DIR -o OUT goes by the ranks in the file",
        )
    config = replace(as_written(part.config), **surroundings(file, chain, selection))
    tensors = tensors_of(selection.chain, part.factors)
    return replace(file, config=with_biases(config, selection), tensors=tensors)


def with_biases(config: LoraConfig, selection: Selection) -> LoraConfig:
    """The config, which asks for no biases if none are left."""
    if selection.whole or selection.chain.record.biases:
        return config
    return replace(config, bias="none")


def tensors_of(chain: Chain, wholes: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """The tensors of a file: factors, what variants keep beside them, all others."""
    extras = {key: tensor for part in chain.parts for key, tensor in part.extras.items()}
    return {**to_tensors(wholes, set(chain.embeddings)), **extras, **chain.others}


def surroundings(file: AdapterFile, chain: Chain, selection: Selection) -> dict[str, Any]:
    """The fields of a config that say where ranks and other weights of a selection lie."""
    saved = selection.chain.record.saved_modules
    if selection.whole:
        fields = {name: getattr(file.config, name) for name in ("target_modules", *EVERYWHERE)}
        whole = file.config.modules_to_save
    else:
        fields = targets_of(selection.modules, saved, _written(file, chain))
        whole = sorted(saved) or None
    fields |= {
        "modules_to_save": whole,
        "trainable_token_indices": _rows(file, selection),
        "base_model_name_or_path": file.config.base_model_name_or_path,
        "revision": file.config.revision,
        "auto_mapping": file.config.auto_mapping,
        "fan_in_fan_out": file.config.fan_in_fan_out,
        "task_type": _task(file.config, selection),
    }
    return fields


def _written(file: AdapterFile, chain: Chain) -> list[Written]:
    saved = chain.record.saved_modules
    everything = frozenset(module for part in chain.parts for module in part.factors)
    return [
        Written(file.config, everything, frozenset(saved)),
        *(
            Written(part.config, frozenset(part.factors), _whole_by(part, saved))
            for part in chain.parts
        ),
    ]


def _whole_by(part: Part, saved: Mapping[str, str]) -> frozenset[str]:
    return frozenset(module for module in saved if trains_whole(part.config, module))


def _rows(file: AdapterFile, selection: Selection) -> Any:
    if selection.whole:
        return file.config.trainable_token_indices
    return {table: list(rows) for table, rows in selection.chain.rows.items()} or None


def _task(config: LoraConfig, selection: Selection) -> Any:
    """The file's task, unless a head that it trains whole belongs to a stage that is left out."""
    heads = PeftModel.for_task(config.task_type).task_heads
    saved = selection.chain.record.saved_modules
    has_head = any(module.endswith(heads) for module in saved) if heads else True
    return config.task_type if has_head else None


def with_probe(record: StageRecord, probe: Probe | None) -> StageRecord:
    """The record with what the newest stage's model answers."""
    newest = record.newest.model_copy(update={"probe": probe})
    return record.model_copy(update={"stages": (*record.stages[:-1], newest)})


def write_stage(directory: Path, file: AdapterFile, record: StageRecord) -> None:
    """Write an adapter with its record, which gets the digest of its weights.

    Strings that another tool has put into the header stay.
    """
    strings = {name: text for name, text in file.metadata.items() if name not in (KEY, "format")}
    if not no_stages(file, record):
        record = record.model_copy(update={"weights": tensors_digest(file.tensors)})
        strings |= record.to_metadata()
    write_adapter(directory, file.config, file.tensors, strings)


def no_stages(file: AdapterFile, record: StageRecord) -> list[str]:
    """Tensors that no stage owns, so that the file can't have a record; a line each.

    PEFT writes the embeddings of a base along where its vocabulary was resized.
    """
    return [fault.partition(" ")[0] for fault in faults_of_others(record, file.tensors)]
