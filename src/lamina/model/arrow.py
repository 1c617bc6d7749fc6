"""`create_arrow_model`: adapters as experts, among which each token chooses its own.

Source: Arrow, arXiv:2405.11157; general knowledge is subtracted as by GenKnowSub,
arXiv:2505.10939.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lamina.config import CONFIG_NAME, ArrowConfig, LoraConfig
from lamina.engine.layers import LoraLayer
from lamina.engine.names import adapted_layers
from lamina.errors import MissingFileError, RoutingError
from lamina.model.facade import PeftModel
from lamina.model.loading import undone_on_error

ROUTER = "arrow_router"
TASK_PREFIX = "task_"
GENERAL_PREFIX = "gks_"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load adapters as experts, and activate a router that sends each token to those that fit it.

    The experts are called `task_0`, `task_1` ..., the general adapters `gks_0` ..., the router
    `arrow_router`. Adapters that are loaded later are experts too, and deleted ones none any more.

    Args:
        base_model: the model.
        task_specific_adapter_paths: the experts: directories, or `owner/name[/subfolder]`.
        arrow_config: how many experts a token has, and how they are weighed. It is completed by
            the adapters' names.
        general_adapter_paths: with `use_gks`, the adapters whose mean is subtracted.
        adapter_kwargs: options of `PeftModel.from_pretrained` and `load_adapter`.

    Raises:
        RoutingError: the experts can't be mixed, with all that is wrong; the model has no adapters.
        CheckpointError, KeyMismatchError: an adapter can't be loaded; likewise.
    """
    task, general = list(task_specific_adapter_paths or ()), list(general_adapter_paths or ())
    _refuse_nothing(task, general, arrow_config)
    with undone_on_error(base_model):
        model: PeftModel = load_experts(
            PeftModel, base_model, task, general, arrow_config, adapter_kwargs
        )
        model.add_adapter(ROUTER, router_config(model, arrow_config))
        # Nothing of a router is trained.
        model.set_adapter(ROUTER, train=())
    return model


def _refuse_nothing(task: Sequence[str], general: Sequence[str], config: ArrowConfig) -> None:
    if not task:
        raise RoutingError("`task_specific_adapter_paths` should contain at least one adapter path")
    if config.use_gks and not general:
        raise RoutingError(
            "You should provide general LoRA paths if you want to use GenKnowSub.",
            cure="create_arrow_model(..., general_adapter_paths=[DIR]), or use_gks=False",
        )


def load_experts(
    facade: Any,
    base_model: Any,
    task: Sequence[str],
    general: Sequence[str],
    config: ArrowConfig,
    options: dict[str, Any],
) -> Any:
    """The model with all adapters loaded, and their names written into the config.

    Args:
        facade: the class of the model, a `PeftModel`.
        base_model: the model to adapt.
        task: the experts' paths.
        general: the general adapters' paths; not loaded without `use_gks`.
        config: to be completed.
        options: of loading.
    """
    _refuse_nothing(task, general, config)
    config.task_adapter_names = [f"{TASK_PREFIX}{i}" for i in range(len(task))]
    general = general if config.use_gks else []
    config.gks_adapter_names = [f"{GENERAL_PREFIX}{i}" for i in range(len(general))]
    names = [*config.task_adapter_names, *config.gks_adapter_names]
    model = None
    for name, path in zip(names, [*task, *general], strict=True):
        where, subfolder = source_of(path)
        how = {"subfolder": subfolder, **options} if subfolder else options
        if model is None:
            model = facade.from_pretrained(base_model, where, adapter_name=name, **how)
        else:
            model.load_adapter(where, adapter_name=name, **how)
    refuse_unlike(model, names)
    return model


def source_of(path: str) -> tuple[str, str | None]:
    """(directory or hub id, subfolder in it) of an adapter's path.

    Raises:
        MissingFileError: it is a directory without an adapter.
    """
    if Path(path).is_dir():
        if not (Path(path) / CONFIG_NAME).is_file():
            raise MissingFileError(
                f"Local adapter path '{path}' does not contain '{CONFIG_NAME}'.",
                cure="name the directory of the adapter itself",
            )
        return path, None
    parts = path.strip("/").split("/")
    if len(parts) < 2:
        return path, None
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def refuse_unlike(model: Any, names: Sequence[str]) -> None:
    """Raise unless these adapters are plain LoRA on the same linear layers, with equal ranks.

    Raises:
        RoutingError: with all that is wrong.
    """
    faults, first = [], names[0]
    for layer_name, layer in adapted_layers(model.get_base_model()):
        faults += [
            f"LoRA adapters must only target Linear layers: [{name}] {layer_name} is "
            f"{type(layer.get_base_layer()).__name__}"
            for name in names
            if name in layer.records and layer.kind != "linear"
        ]
        faults += [f"[{n}] target_modules mismatch: {layer_name}" for n in _absent(layer, names)]
        faults += [
            f"[{n}] rank mismatch in {layer_name}: {layer.r[n]} != {layer.r[first]}"
            for n in names
            if n in layer.records and first in layer.records and layer.r[n] != layer.r[first]
        ]
        faults += [
            f"[{n}] is more than scaling * B @ A in {layer_name}"
            for n in names
            if n in layer.records and (layer.lora_bias[n] or not layer.records[n].variant.is_plain)
        ]
    if faults:
        shown = faults[:6]
        raise RoutingError(
            f"These adapters can't be mixed by Arrow: {shown[0]}.",
            faults=shown,
            cure="train the experts, and the general adapters, with the same r and target_modules",
        )


def _absent(layer: LoraLayer, names: Sequence[str]) -> list[str]:
    here = [name for name in names if name in layer.records]
    return [name for name in names if name not in layer.records] if here else []


def router_config(model: Any, config: ArrowConfig) -> LoraConfig:
    """The router's config: on the layers that the experts adapt."""
    targets, r = router_targets(model)
    return LoraConfig(arrow_config=config, target_modules=targets, r=r, inference_mode=True)


def router_targets(model: Any) -> tuple[list[str], int]:
    """(plain names of the layers that have adapters, a rank of theirs)."""
    found = dict(adapted_layers(model.get_base_model()))
    layer = next(iter(found.values()))
    return list(found), int(next(iter(layer.r.values())))
