"""Apply a plan: put layers around what is adapted, and take them away again."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.init import changes_base
from lamina.engine.layers import (
    LayerAdapter,
    LoraLayer,
    ModulesToSaveWrapper,
    ParamWrapper,
    TrainableTokensLayer,
    TrainableTokensWrapper,
    lora_layers,
    saved_modules,
)
from lamina.engine.layers.parameter import wrapped, wrappers
from lamina.engine.layers.tying import tie
from lamina.engine.names import Place, places, unadapted, within
from lamina.engine.parameters import endings
from lamina.engine.replication import replicated
from lamina.engine.state import AdapterState
from lamina.engine.targets import LayerPlan, Plan, make_plan
from lamina.engine.tokens import TokenPlan
from lamina.engine.trainability import apply_trainability, freeze_base
from lamina.errors import FoldError


def inject(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    state: AdapterState,
    *,
    trainable: bool = True,
    initialise: bool = True,
    upcast: bool = True,
    strict: bool = True,
) -> Plan:
    """Add an adapter to a model; it is not active yet.

    Args:
        model: any module, adapted already (with the same `state`) or not.
        name: the adapter's name.
        config: what it adapts and how.
        state: the model's shared state.
        trainable: whether its weights ask for gradients while it is active.
        initialise: False leaves the factors on the meta device, to be assigned from a file.
        upcast: keep adapters over half-precision weights in fp32.
        strict: every pattern of the config must match something.

    Raises:
        AdapterNameError, TargetError: nothing has been changed.
    """
    state.check_new_name(name)
    with replicated(model, config, state):
        plan = make_plan(model, config, strict=strict)
    occupied: dict[int, list[Place]] = defaultdict(list)
    by_name: dict[str, Place] = {}
    for place in places(model):
        occupied[id(place.original)].append(place)
        by_name.setdefault(place.name, place)
    if not state.configs:
        freeze_base(model)
    state.register(name, config, trainable=trainable)
    if config.target_modules is None:
        config.target_modules = set(plan.counts)
    for layer_plan in plan.layers:
        place = by_name[layer_plan.name]
        record = layer_plan.record
        layer = _layer_for(layer_plan, place, occupied[id(place.original)], state, name)
        if layer_plan.tied_to is not None:
            tie(layer, name, record, _layer_at(by_name[layer_plan.tied_to]))
            continue
        # What an initialisation changes in the base has to be changed before a file is loaded too.
        changes = changes_base(config.init_lora_weights) or record.variant.changes_base
        wanted = initialise or changes
        init = config.init_lora_weights if wanted else None
        layer.add_adapter(name, record, init=init, upcast=upcast)
        if record.variant.changes_base and not initialise:
            layer.leave_to_be_filled(name)
    _save_modules(plan, by_name, occupied, name, state)
    for tokens in plan.tokens:
        _replace_rows(tokens, by_name, occupied, name, state, (config, initialise, upcast))
    adopted = _biases(model, config.bias, {name for each in plan.layers for name in each.names})
    if adopted:
        state.biases.adopt(name, adopted)
    apply_trainability(model, state, {name})
    _warn_skipped(plan)
    _warn_of_ties(config, plan)
    return plan


def _layer_for(
    plan: LayerPlan, place: Place, spots: list[Place], state: AdapterState, name: str
) -> LoraLayer:
    """The layer that takes up an adapter; it is put into the model if it isn't there yet."""
    if plan.parameter is not None:
        kind: Any = plan.record.config.instead.get(ParamWrapper, ParamWrapper)
        outermost, wrapper = wrapped(_now(place), plan.parameter, state, kind)
        _put(spots, outermost)
        return wrapper
    now = place.module
    if isinstance(now, (TrainableTokensLayer, TrainableTokensWrapper)):
        return _inside(now, plan, state, name)
    # One that no adapter is left in may be of another method's kind.
    if isinstance(now, LoraLayer) and (now.records or isinstance(now, plan.kind)):
        return now
    layer = plan.kind.made_for(place.original, state, name, plan.record)
    _put(spots, layer)
    return layer


def _inside(outer: nn.Module, plan: LayerPlan, state: AdapterState, name: str) -> LoraLayer:
    """The layer inside what replaces rows of the same table."""
    holder = outer.token_adapter if isinstance(outer, TrainableTokensWrapper) else outer
    assert isinstance(holder, TrainableTokensLayer)
    if not isinstance(holder.base_layer, LoraLayer):
        holder.base_layer = plan.kind.made_for(holder.base_layer, state, name, plan.record)
    layer: LoraLayer = holder.base_layer
    return layer


def _replace_rows(
    plan: TokenPlan,
    by_name: dict[str, Place],
    occupied: dict[int, list[Place]],
    name: str,
    state: AdapterState,
    how: tuple[LoraConfig, bool, bool],
) -> None:
    """Give an adapter rows of its own in a table, or those of the table that it is tied to."""
    config, initialise, upcast = how
    place = by_name[plan.name]
    holder = _token_layer(place)
    if holder is None:
        source = None if plan.tied_to is None else _token_layer(by_name[plan.tied_to])
        if config.rows_alone:
            outer: nn.Module = TrainableTokensLayer(_now(place), state, source)
        else:
            outer = TrainableTokensWrapper(_now(place), state, source)
        _put(occupied[id(place.original)], outer)
        holder = _token_layer(place)
        assert holder is not None
    holder.expect(name, plan.indices)
    record = LayerAdapter.of_rows(config, len(plan.indices), plan.name)
    # Noise is for tests of LoRA's factors; beside them, rows always begin as they are.
    begin = config.init_lora_weights if config.rows_alone else True
    holder.add_adapter(name, record, init=begin if initialise else None, upcast=upcast)


def _token_layer(place: Place) -> TrainableTokensLayer | None:
    now = _now(place)
    if isinstance(now, TrainableTokensWrapper):
        return now.token_adapter
    return now if isinstance(now, TrainableTokensLayer) else None


def _now(place: Place) -> nn.Module:
    """What is at a place by now: it may have been wrapped since the place was looked up."""
    now: nn.Module = getattr(place.parent, place.child)
    return now


def _warn_skipped(plan: Plan) -> None:
    if plan.skipped:
        warnings.warn(
            f'"all-linear" leaves out {len(plan.skipped)} parameters that hold experts, such as '
            f"{plan.skipped[0]}; target_parameters={endings(plan.skipped)} takes them in.",
            stacklevel=3,
        )


def _warn_of_ties(config: LoraConfig, plan: Plan) -> None:
    if not config.ensure_weight_tying:
        return
    named = {*plan.saved, *(layer.name for layer in plan.layers), *(t.name for t in plan.tokens)}
    if not plan.ties:
        told = (
            "no tied modules were found in the model (ensure_weight_tying=True but the model does "
            "not have tied weights)"
        )
    elif not named & set(plan.ties):
        told = "no tied modules are added in either `modules_to_save` or `target_modules`"
    else:
        return
    warnings.warn(f"You have requested ensure_weight_tying=True, but {told}.", stacklevel=3)


def _layer_at(place: Place) -> LoraLayer:
    """The layer with the factors at a place."""
    return next(each for each in reversed(_chain(_now(place))) if isinstance(each, LoraLayer))


def _save_modules(
    plan: Plan,
    by_name: dict[str, Place],
    occupied: dict[int, list[Place]],
    name: str,
    state: AdapterState,
) -> None:
    embedding = None
    # The embedding comes first of those that are tied to it.
    for saved in plan.saved:
        tied_to = embedding if saved in plan.ties else None
        wrapper = _save_module(by_name[saved], occupied, name, state, tied_to)
        embedding = embedding or wrapper


def _save_module(
    place: Place,
    occupied: dict[int, list[Place]],
    name: str,
    state: AdapterState,
    tied_to: ModulesToSaveWrapper | None,
) -> ModulesToSaveWrapper:
    wrapper = place.module
    if not isinstance(wrapper, ModulesToSaveWrapper):
        wrapper = ModulesToSaveWrapper(place.original, state)
        _put(occupied[id(place.original)], wrapper)
    wrapper.add_adapter(name, tied_to)
    return wrapper


def _biases(model: nn.Module, which: str, adapted: set[str]) -> dict[str, nn.Module]:
    """The modules whose biases `bias=which` means, by the biases' plain names."""
    if which == "none":
        return {}
    found: dict[str, nn.Module] = {}
    whole: list[str] = []
    for place in places(model):
        if isinstance(place.module, ModulesToSaveWrapper):
            # The copy that is trained in its place has biases of its own.
            whole.append(place.name)
        bias = place.original._parameters.get("bias")
        if bias is None or any(within(place.name, outer) for outer in whole):
            continue
        known = any(bias is other.bias for other in found.values())
        if not known and (which == "all" or place.name in adapted):
            found[f"{place.name}.bias" if place.name else "bias"] = place.original
    return found


def _put(spots: list[Place], layer: nn.Module) -> None:
    for spot in spots:
        assert spot.parent is not None
        setattr(spot.parent, spot.child, layer)
        if isinstance(spot.parent, nn.TransformerEncoderLayer):
            # Its fast path reads the weights of its children and never calls them; a hook on
            # a child keeps it from being taken.
            layer.register_forward_pre_hook(_call_me)


def _call_me(module: nn.Module, args: object) -> None:
    return None


def find_state(model: nn.Module) -> AdapterState | None:
    """The state that a model's adapted layers share; None on a model without any."""
    for module in model.modules():
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
            return module.adapter_state
    return None


def delete_adapter(model: nn.Module, name: str, state: AdapterState) -> None:
    """Remove an adapter; layers that no adapter is left in stay as they are.

    Raises:
        AdapterNameError: there is no such adapter.
        FoldError: it is folded into the base weights.
    """
    state.check_known([name])
    folded = [path for path, layer in lora_layers(model) if name in layer.merged_adapters]
    if folded:
        raise FoldError(
            f"The adapter {name!r} is folded into {len(folded)} layers.",
            cure="model.unmerge_adapter() first, then delete it",
        )
    for _, layer in lora_layers(model):
        if name in layer.records:
            layer.delete_adapter(name)
    for _, wrapper in saved_modules(model):
        if name in wrapper.modules_to_save:
            wrapper.delete_adapter(name)
    state.forget(name)
    apply_trainability(model, state)


def strip_idle(model: nn.Module) -> None:
    """Put the base layers back where no adapter is left."""
    for place in list(places(model)):
        module = place.module
        layers = _chain(module)
        idle = all(isinstance(layer, LoraLayer) and not layer.records for layer in layers) or (
            isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save
        )
        if idle and place.parent is not None:
            setattr(place.parent, place.child, place.original)


def _chain(module: nn.Module) -> list[nn.Module]:
    """All adapted layers that lie one inside the other at a place."""
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    if isinstance(module, TrainableTokensLayer):
        inner = module.base_layer
        return [module, inner] if isinstance(inner, LoraLayer) else [module]
    return [*wrappers(module)] or [module]


def strip(model: nn.Module, *, keep_saved: bool) -> nn.Module:
    """Put the base layers back where adapted ones are; the base weights stay as they are now.

    Args:
        model: the adapted model.
        keep_saved: put the effective copy of a saved module back, rather than the original.
    """
    for place in list(places(model)):
        module = place.module
        if isinstance(module, ModulesToSaveWrapper) and keep_saved:
            replacement: nn.Module = module.effective()
        else:
            replacement = unadapted(module)
        if replacement is not module and place.parent is not None:
            setattr(place.parent, place.child, replacement)
    return model
