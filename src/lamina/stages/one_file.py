"""Whether the adapters that a chain has in a model can be saved as one file, and folded."""

from __future__ import annotations

from lamina.engine.layers import lora_layers
from lamina.errors import FoldError, StageError
from lamina.model import PeftModel
from lamina.stages.original import check_saveable
from lamina.stages.rows import tables_with_ranks

# What lies in a file otherwise than as ranks of modules.
_NO_RANKS = ("target_parameters", "layer_replication")


def check_one_file(model: PeftModel) -> None:
    """Refuse what could not be saved as one adapter after training.

    Raises:
        StageError: with what can't be laid beside what.
    """
    check_saveable(model)
    faults = [
        f"{name!r}: {field}={getattr(config, field)!r}"
        for name, config in model.peft_config.items()
        for field in _NO_RANKS
        if getattr(config, field)
    ]
    faults += [
        f"{path} is an nn.{type(layer).__name__}"
        for path, layer in lora_layers(model)
        if layer.kind == "attention"
    ]
    faults += [
        f"{table} has rows of its own and a low-rank update"
        for table in tables_with_ranks(model.get_base_model())
    ]
    if faults:
        raise StageError(
            "These can't be laid beside other stages in one file yet.",
            faults=faults,
            cure="train without stages: get_peft_model and save_pretrained",
        )
    embeddings = [path for path, layer in lora_layers(model) if layer.is_embedding]
    biased = [name for name, config in model.peft_config.items() if config.lora_bias]
    if embeddings and biased:
        raise StageError(
            f"lora_bias=True ({', '.join(map(repr, biased))}) can't be saved in one file with an "
            f"adapted embedding ({embeddings[0]}): an embedding's adapter has no bias.",
            cure="leave lora_bias out, or don't target the embedding",
        )


def check_biases_apart(model: PeftModel, frozen: list[str]) -> None:
    """Refuse to fold biases of B into biases that are saved as they are.

    Raises:
        FoldError: one of `frozen` has a bias of B, and some adapter trains biases of the base.
    """
    biased = [name for name in frozen if model.peft_config[name].lora_bias]
    if biased and model.adapter_state.biases.parameters:
        raise FoldError(
            f"lora_bias=True ({', '.join(map(repr, biased))}) can't be folded into biases that "
            "the chain trains and saves by themselves (bias='all' or 'lora_only').",
            cure='mode="stack", which computes the same',
        )
