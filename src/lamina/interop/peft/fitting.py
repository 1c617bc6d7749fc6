"""What a config means in a model, with peft's leniency: something has to match, not everything."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lamina.config import AdaLoraConfig
from lamina.config.patterns import means
from lamina.engine.layers import layer_class, lora_layers
from lamina.engine.names import places, suffixes
from lamina.engine.parameters import find_parameters
from lamina.engine.ties import input_embedding
from lamina.errors import ConfigError
from lamina.interop.peft import constants
from lamina.interop.peft.building import BuiltLayer
from lamina.interop.peft.experts import fuse_config
from lamina.interop.peft.matching import (
    ExcludedModule,
    check_target_module_exists,
    find_minimal_target_modules,
    maybe_include_all_linear_layers,
)
from lamina.interop.peft.types import NoMatchingPeftModuleError

if TYPE_CHECKING:
    from lamina.interop.peft.tuner import LoraModel

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_NUMBERS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Fit:
    """A config as it is to be applied, and what of it matches nothing.

    Attributes:
        config: the config; a copy of the caller's where names come from tensors instead.
        unused_exclusions: whether there are patterns to exclude, and none of them excludes.
        named: the modules that tensors are named after; None if there were none.
        by_config: those that the config means.
        idle_parameters: whether there are parameters to adapt, and none is found.
    """

    config: Any
    unused_exclusions: bool
    named: set[str] | None
    by_config: set[str]
    idle_parameters: bool = False


def fit(tuner: LoraModel, config: Any, state_dict: dict[str, Any] | None = None) -> Fit:
    """Work out a config's targets; they are written into it, as peft does.

    Raises:
        NoMatchingPeftModuleError: nothing in the model matches.
        ValueError: the architecture has no usual targets.
    """
    _refuse(config)
    _refuse_saved_containers(tuner, config)
    _set_usual(tuner, config)
    fuse_config(config, tuner.model)
    maybe_include_all_linear_layers(config, tuner.model)
    names = [place.name for place in places(tuner.model) if place.name]
    if _is_dummy(config):
        return Fit(config, False, None, set())
    _shorten(config, names)
    hits = {name: check_target_module_exists(config, name) for name in names}
    meant = {name for name, hit in hits.items() if hit}
    excluded = [name for name, hit in hits.items() if isinstance(hit, ExcludedModule)]
    named = None
    if state_dict is not None:
        if config.target_parameters:
            raise ValueError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses "
                "`target_parameters`. Please inject the adapter without the state_dict."
            )
        named = {_module_of(key) for key in state_dict} & set(names)
        exact = copy.copy(config)
        exact.target_modules = set(named)
        exact.exclude_modules, exact.layers_to_transform = None, None
    _refuse_rows_of(tuner.model, config, meant)
    parameters = find_parameters(places(tuner.model), config.target_parameters or ())
    if not (meant if named is None else named) and not parameters:
        raise NoMatchingPeftModuleError(_nothing(config, excluded, len(names)))
    unused = bool(config.exclude_modules) and not excluded
    idle = bool(config.target_parameters) and not parameters
    return Fit(config if named is None else exact, unused, named, meant, idle)


def _is_dummy(config: Any) -> bool:
    return bool(config.target_modules == constants.DUMMY_TARGET_MODULES)


def _refuse(config: Any) -> None:
    if not hasattr(config, "late_faults"):
        return
    config.refuse_unsupported()
    faults = config.late_faults()
    if faults:
        raise ConfigError(faults[0], faults=faults[1:])


def _refuse_saved_containers(tuner: LoraModel, config: Any) -> None:
    wanted = tuple(config.modules_to_save or ())
    for place in places(tuner.model) if wanted else ():
        if place.name.endswith(wanted) and isinstance(place.original, _CONTAINERS):
            raise TypeError(
                f"modules_to_save cannot be applied to modules of type {type(place.original)}"
            )


def _refuse_rows_of(model: nn.Module, config: Any, targets: set[str]) -> None:
    """Refuse rows of a table that is adapted itself; Lamina's own models do both."""
    rows = config.trainable_token_indices
    if not rows:
        return
    everything = list(places(model))
    tables = set(rows) if isinstance(rows, dict) else {input_embedding(model, everything)}
    for place in everything:
        if place.name in targets and tables & set(suffixes(place.name)):
            raise TypeError(
                "trainable_token_indices cannot be applied to modules of type "
                f"{layer_class(place.original, config)}: leave {place.name} out of target_modules, "
                "or train both with lamina.get_peft_model."
            )


def refuse_own_name(tuner: LoraModel, config: Any, adapter: str) -> None:
    """Refuse what names, beside the layers to adapt, the adapter itself: its parts are named so.

    Raises:
        ValueError: it does.
    """
    rows = config.trainable_token_indices
    wanted = {
        "ModulesToSaveWrapper": tuple(config.modules_to_save or ()),
        "TrainableTokensWrapper": tuple(rows) if isinstance(rows, dict) else (),
    }
    for wrapper, names in wanted.items():
        if not adapter.endswith(names or ("/",)):
            continue
        hits = (p for p in places(tuner.model) if check_target_module_exists(config, p.name))
        kind = next((layer_class(place.original, config) for place in hits), None)
        raise ValueError(
            f"You are trying to target a module with <class 'peft.utils.other.{wrapper}'> that is "
            f"a child of {kind}. This is almost certainly not the intended behavior. Please ensure "
            f"that the adapter name, '{adapter}', does not conflict with any of the targeted "
            "modules."
        )


def _set_usual(tuner: LoraModel, config: Any) -> None:
    if config.target_modules is not None:
        return
    kind = tuner.get_model_config(tuner.model).get("model_type")
    usual = tuner.target_module_mapping.get(str(kind))
    if usual is None and config.target_parameters:
        return
    if usual is None:
        raise ValueError("Please specify `target_modules` in `peft_config`")
    config.target_modules = usual if isinstance(usual, str) else set(usual)


def _shorten(config: Any, names: list[str]) -> None:
    """Replace a long list of targets by endings that mean the same."""
    targets = config.target_modules
    if not isinstance(targets, (list, set)):
        return
    if len(targets) < constants.MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return
    endings = tuple(f".{target}" for target in targets)
    others = [name for name in names if name not in targets and not name.endswith(endings)]
    shorter = find_minimal_target_modules(targets, others)
    if len(shorter) < len(targets):
        config.target_modules = shorter


def _module_of(key: str) -> str:
    return re.split(r"\.lora_", key.removeprefix("base_model.model."), maxsplit=1)[0]


def _nothing(config: Any, excluded: list[str], count: int) -> str:
    layers = ""
    if config.layers_to_transform is not None:
        layers += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if config.layers_pattern is not None:
        layers += f" You also specified 'layers_pattern': {config.layers_pattern}."
    if len(excluded) == count:
        return (
            "All modules were excluded. This is likely unintended. "
            "Check your `target_modules`, `exclude_modules` and `modules_to_save` configuration."
        )
    if not excluded and not config.target_modules:
        return (
            "No `target_modules` passed but also no `target_parameters` found. Please check the "
            "values for these arguments."
        )
    if not excluded:
        return (
            f"Target modules {config.target_modules} not found in the base model. "
            f"Please check the target modules and try again.{layers}"
        )
    return (
        "No modules were targeted for adaptation. This might be caused by a combination of "
        "mismatched target modules and excluded modules. Please check your `target_modules` and "
        "`exclude_modules` configuration. You may also have only targeted modules that are marked "
        f"to be saved (`modules_to_save`).{layers}"
    )


def warn_misfits(found: Fit, adapted: list[str]) -> None:
    """Warn of everything that had no effect."""
    config = found.config
    if found.named is not None:
        _warn_differences(found)
    if found.unused_exclusions:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were "
            "excluded. Please check that exclude_modules was set correctly.",
            stacklevel=4,
        )
    elif config.target_modules and not (adapted or _is_dummy(config)):
        warnings.warn(
            f"target_modules={config.target_modules} were set but no module was matched.",
            RuntimeWarning,
            stacklevel=4,
        )
    if found.idle_parameters:
        warnings.warn(
            f"target_parameters={config.target_parameters} were set but no parameter was matched.",
            RuntimeWarning,
            stacklevel=4,
        )
    # AdaLoRA's ranks are by the names of parameters.
    for field in () if isinstance(config, AdaLoraConfig) else _NUMBERS:
        silent = sorted(
            key
            for key in getattr(config, field) or ()
            if not any(means(key, name) for name in adapted)
        )
        if silent:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: "
                f"{silent}.",
                RuntimeWarning,
                stacklevel=4,
            )


def warn_of_custom(model: nn.Module, adapter: str, config: Any) -> None:
    """Warn of modules that are adapted only because the config says by what."""
    # Those that are built as peft's are say so themselves.
    kinds = config.layer_kinds.values()
    own = tuple(kind for kind in kinds if not issubclass(kind, BuiltLayer))
    for _, layer in lora_layers(model) if own else ():
        base = layer.get_base_layer()
        if adapter in layer.records and isinstance(layer, own) and not _is_usual(base):
            warnings.warn(
                f"Unsupported layer type '{type(base)}' encountered, proceed at your own risk.",
                stacklevel=4,
            )


def _is_usual(base: nn.Module) -> bool:
    return type(base).__module__.startswith(("torch.nn.modules.linear", "transformers."))


def _warn_differences(found: Fit) -> None:
    named = found.named or set()
    more, less = sorted(found.by_config - named), sorted(named - found.by_config)
    if not more and not less:
        return
    text = (
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT "
        "config and the provided state_dict. This is not necessarily an issue and can be ignored "
        "if this was the intent. "
    )
    if more:
        text += f"The PEFT config contained these additional target modules: {more}. "
    if less:
        text += f"The state_dict contained these additional target modules: {less}. "
    warnings.warn(text, RuntimeWarning, stacklevel=4)


__all__ = ["Fit", "fit", "refuse_own_name", "warn_misfits", "warn_of_custom"]
