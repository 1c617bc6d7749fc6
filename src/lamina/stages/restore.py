"""Put a lamina that was read from a file into a model, as a frozen adapter of its own."""

from __future__ import annotations

import copy

from lamina.checkpoint.keys import slots
from lamina.checkpoint.load import fill_adapter
from lamina.checkpoint.origin import PREFIX
from lamina.model import PeftModel
from lamina.stages.lamination import Chain, Part, to_tensors


def restore_part(model: PeftModel, chain: Chain, part: Part, adapter: str) -> None:
    """Add one lamina of a chain to a model, under the name `adapter`, and activate it too.

    What the file holds only once, modules trained whole and biases, goes to the lamina of the
    stage that owns it by the record.

    Raises:
        KeyMismatchError: the lamina's modules and the model's are not the same.
    """
    record, stage = chain.record, part.lamina.stage
    saved = [module for module, owner in record.saved_modules.items() if owner == stage]
    biases = [bias for bias, owner in record.biases.items() if owner == stage]
    config = copy.deepcopy(part.config)
    config.inference_mode = True
    config.modules_to_save = saved or None
    if not biases:
        config.bias = "none"
    model.base_model.add(adapter, config, trainable=False, initialise=False, strict=False)
    state = model.adapter_state
    _adopt(model, adapter, biases)
    embeddings = {
        slot.module
        for slot in slots(model, adapter, state).values()
        if slot.leaf.startswith("lora_embedding")
    }
    tensors = to_tensors(part.factors, {module.removeprefix(PREFIX) for module in embeddings})
    tensors.update(
        {key: tensor for key, tensor in chain.others.items() if _owned(key, saved, biases)}
    )
    fill_adapter(model, adapter, state, tensors, source=f"{chain.source}, ranks of stage {stage!r}")
    model.base_model.activate([*(n for n in state.active if n != adapter), adapter])


def _adopt(model: PeftModel, adapter: str, biases: list[str]) -> None:
    """Let an adapter own biases that its config alone would not give it."""
    state = model.adapter_state
    lacking = set(biases) - state.biases.of(adapter).keys()
    if not lacking:
        return
    parameters = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.get_base_model().named_parameters()
        if name.endswith("bias")
    }
    state.biases.adopt(adapter, {name: parameters[name] for name in lacking if name in parameters})


def _owned(key: str, saved: list[str], biases: list[str]) -> bool:
    plain = key.removeprefix(PREFIX)
    if plain.replace(".base_layer.", ".") in biases:
        return True
    return any(plain.startswith(f"{module}.") for module in saved)
