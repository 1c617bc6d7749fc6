"""Put a lamina that was read from a file into a model, as an adapter of its own."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn

from lamina.checkpoint.keys import slots
from lamina.checkpoint.load import fill_adapter
from lamina.checkpoint.origin import PREFIX, ROWS
from lamina.checkpoint.report import LoadReport
from lamina.config import LoraConfig
from lamina.engine.names import places
from lamina.engine.targets import make_plan
from lamina.model import PeftModel
from lamina.stages.lamination import Chain, Part, to_tensors
from lamina.stages.rows import Rows, fill_rows, rows_of, without


def restore_part(
    model: PeftModel,
    chain: Chain,
    part: Part,
    adapter: str,
    *,
    drop_out: bool,
    taken: Rows | None = None,
) -> None:
    """Add one lamina of a chain to a model, under the name `adapter`, and activate it too.

    What the file holds only once, modules trained whole and biases, goes to the lamina of the
    stage that owns it by the record.

    Args:
        model: the model, with the older laminae.
        chain: what the lamina is from.
        part: the lamina.
        adapter: what to call it in the model.
        drop_out: keep its `lora_dropout`. Ranks that are frozen for good are part of what the
            new stage learns on, and act in training as they do in inference.
        taken: rows of tables that a newer stage has taken over.

    Raises:
        KeyMismatchError: the lamina's modules and the model's are not the same.
    """
    saved, biases = _owned_by(chain, part.lamina.stage)
    config = copy.deepcopy(part.config)
    config.inference_mode = True
    config.modules_to_save = saved or None
    config.bias = "none"
    rows = without(rows_of(chain.record.token_rows, part.lamina.stage), taken or {})
    config.trainable_token_indices = rows or None
    if not drop_out:
        config.lora_dropout = 0.0
    _hit_exactly(model, config, set(part.factors))
    model.base_model.add(adapter, config, trainable=False, initialise=False, strict=False)
    state = model.adapter_state
    if biases:
        config.bias = part.config.bias
        _adopt(model, adapter, biases)
    fill_part(model, chain, part, adapter)
    model.base_model.activate([*(n for n in state.active if n != adapter), adapter])


def fill_part(model: PeftModel, chain: Chain, part: Part, adapter: str) -> LoadReport:
    """Put one lamina of a chain into an adapter that is in the model already.

    Raises:
        KeyMismatchError: the lamina's modules and the adapter's are not the same.
    """
    state, stage = model.adapter_state, part.lamina.stage
    embeddings = {
        slot.module
        for slot in slots(model, adapter, state).values()
        if slot.leaf.startswith("lora_embedding")
    }
    tensors = to_tensors(part.factors, {module.removeprefix(PREFIX) for module in embeddings})
    tensors.update(part.extras)
    saved, biases = _owned_by(chain, stage)
    tensors.update(
        {key: tensor for key, tensor in chain.others.items() if _owned(key, saved, biases)}
    )
    tensors.update(fill_rows(model.get_base_model(), adapter, chain.rows, chain.others))
    where = f"{chain.source}, ranks of stage {stage!r}"
    return fill_adapter(model, adapter, state, tensors, source=where)


def _owned_by(chain: Chain, stage: str) -> tuple[list[str], list[str]]:
    """The modules trained whole and the biases that a stage brought."""
    record = chain.record
    saved = [module for module, owner in record.saved_modules.items() if owner == stage]
    return saved, [bias for bias, owner in record.biases.items() if owner == stage]


def base_weight_faults(base: nn.Module, chain: Chain) -> list[str]:
    """Weights of the base that a file brings along, as PEFT does with embeddings, and `base` lacks.

    They are not a stage's: without them the older ranks would lie over another base.
    """
    record = chain.record
    weights = {
        f"{place.name}.{leaf}": parameter
        for place in places(base)
        for leaf, parameter in place.original.named_parameters(recurse=False)
    }
    names = {
        key: key.removeprefix(PREFIX).replace(".base_layer.", ".")
        for key in chain.others
        if not key.endswith(("bias", ROWS)) and not _owned(key, [*record.saved_modules], [])
    }
    return [
        f"{names[key]} in the parent's file has other values than this base's; "
        "lamina.PeftModel.from_pretrained(base, parent).unload() is a base with the file's"
        for key in names
        if not _equal(weights.get(names[key]), chain.others[key])
    ]


def _equal(mine: nn.Parameter | None, theirs: torch.Tensor) -> bool:
    if mine is None or mine.shape != theirs.shape:
        return False
    return mine.is_meta or torch.equal(mine.detach(), theirs.to(mine))


def _hit_exactly(model: PeftModel, config: LoraConfig, modules: set[str]) -> None:
    """Narrow the targets to `modules` where the config alone would hit more.

    That happens when a module that the stage trained whole now belongs to a newer stage: nothing
    keeps the config from hitting what lies inside it.
    """
    plan = make_plan(model.get_base_model(), config, strict=False)
    hit = {layer.name for layer in plan.layers}
    if modules < hit:
        config.target_modules = "|".join(map(re.escape, sorted(modules)))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _adopt(model: PeftModel, adapter: str, biases: list[str]) -> None:
    """Let an adapter own exactly these biases."""
    modules = {
        f"{name}.bias".removeprefix(".").replace(".base_layer.", "."): module
        for name, module in model.get_base_model().named_modules()
        if module._parameters.get("bias") is not None
    }
    model.adapter_state.biases.adopt(
        adapter, {name: modules[name] for name in biases if name in modules}
    )


def _owned(key: str, saved: list[str], biases: list[str]) -> bool:
    plain = key.removeprefix(PREFIX)
    if plain.replace(".base_layer.", ".") in biases:
        return True
    return any(plain.startswith(f"{module}.") for module in saved)
