"""Other tools' names for what a plan can say, where they mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lamina.training.plan.document import Document, Fault, Where

# Of LLaMA-Factory, Axolotl and TRL, in this order.
OF_SETTINGS = {
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "additional_target": "modules_to_save",
    "cutoff_len": "max_length",
    "pref_beta": "beta",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_linear": "lora_target_modules",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "dpo_beta": "beta",
    "rl_beta": "beta",
    "dataset": "datasets",
    "data": "datasets",
    "train_file": "datasets",
    "target_modules": "lora_target_modules",
    "r": "lora_r",
    "max_seq_length": "max_length",
    "reward_funcs": "reward_functions",
}
OF_PLAN = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "tokenizer": "tokenizer_name_or_path",
    "torch_dtype": "dtype",
    "revision": "model_revision",
}
OF_DATA = {"dataset_name": "path", "file": "path", "type": "format", "subset": "name"}
_DATASETS = ("datasets", "eval_datasets")


def rename(document: Document) -> list[Fault]:
    """Give all keys of a document their own names, in place; returns what can't be renamed."""
    faults: list[Fault] = []
    root = document.values
    if not isinstance(root, dict):
        return faults
    _rename(document, (), root, OF_PLAN, faults)
    for where, part in _parts(root):
        _rename(document, where, part, OF_SETTINGS, faults)
        for name in _DATASETS:
            for place, data in enumerate(_listed(part.get(name))):
                if isinstance(data, dict):
                    _rename(document, (*where, name, place), data, OF_DATA, faults)
    return faults


def _parts(root: dict[str, Any]) -> Iterator[tuple[Where, dict[str, Any]]]:
    """All that has settings of stages, or data."""
    if isinstance(root.get("defaults"), dict):
        yield ("defaults",), root["defaults"]
    for group in ("stages", "evals"):
        found = root.get(group)
        listed = dict(enumerate(found)) if isinstance(found, list) else found
        for key, part in listed.items() if isinstance(listed, dict) else ():
            if isinstance(part, dict):
                yield (group, key), part


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _rename(
    document: Document,
    where: Where,
    part: dict[str, Any],
    names: dict[str, str],
    faults: list[Fault],
) -> None:
    for alias in [key for key in part if key in names]:
        own = names[alias]
        if own in part:
            faults.append(((*where, alias), f"means {own}, which is given too"))
            del part[alias]
            continue
        value = part.pop(alias)
        if alias == "lora_target_linear":
            # Axolotl's switch for what is called "all-linear" everywhere else.
            if not isinstance(value, bool):
                faults.append(((*where, alias), f"must be true or false, not {value!r}"))
            if value is not True:
                continue
            value = "all-linear"
        part[own] = value
        _move(document, (*where, alias), (*where, own))


def _move(document: Document, old: Where, new: Where) -> None:
    size = len(old)
    for where in [where for where in document.lines if where[:size] == old]:
        document.lines[(*new, *where[size:])] = document.lines[where]
