"""Load an adapter over one that is there, as a trainer does when it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lamina.errors import ConfigError
from lamina.model import loading, saving
from lamina.model.original import on_base_of

if TYPE_CHECKING:
    from lamina.checkpoint.report import LoadReport
    from lamina.config import PeftConfig
    from lamina.model.facade import PeftModel
    from lamina.storage.source import PathOrId

# What two adapters with tensors of equal names and shapes can still differ in.
_COMPARED = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
)


def replace(
    model: PeftModel, model_id: PathOrId, adapter: str, options: dict[str, Any]
) -> LoadReport:
    """Put what a directory holds into an adapter that is there; what trains stays as it is.

    Raises:
        ConfigError: the directory's config means other numbers than the adapter's.
        KeyMismatchError: the tensors don't fit. Either way nothing has been changed.
    """
    file, how = loading.read(model_id, options.pop("config", None), options)
    checkpoints = getattr(model.stage, "checkpoints", None)
    if checkpoints is not None and checkpoints.wrote(file):
        report: LoadReport = checkpoints.restore(model, file)
        return report
    refuse_other_config(model, adapter, file.config, str(model_id))
    with on_base_of(model.get_base_model(), model.adapter_state, adapter, file.config):
        return loading.fill(model, adapter, file, how)


def refuse_other_config(model: PeftModel, adapter: str, found: PeftConfig, source: str) -> None:
    """Refuse weights that were trained under a config that computes something else.

    Raises:
        ConfigError: with every field that differs.
    """
    ours = saving.config_on_disk(model, adapter)
    faults = config_faults(found.to_dict(), ours.to_dict(), source)
    if faults:
        raise ConfigError(
            f"{source} was saved under another config than that of adapter {adapter!r}.",
            faults=faults,
            cure="give the model the config of the checkpoint, "
            f"lamina.LoraConfig.from_pretrained({source!r}), or begin a new run",
        )


def config_faults(theirs: Mapping[str, Any], ours: Mapping[str, Any], source: str) -> list[str]:
    """The fields in which the config of a checkpoint means other numbers than the model's."""
    return [
        f"{name}: {theirs.get(name)!r} in {source}, {ours.get(name)!r} in the model"
        for name in _COMPARED
        # No pattern is an empty pattern.
        if (theirs.get(name) or None) != (ours.get(name) or None)
    ]
