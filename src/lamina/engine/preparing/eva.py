"""EVA: A begins as the directions in which a layer's inputs vary most over the data.

Source: arXiv:2410.07170.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.config.methods import EvaConfig
from lamina.engine import fold
from lamina.engine.inject import find_state
from lamina.engine.layers import lora_layers
from lamina.engine.layers.linear import is_conv1d
from lamina.engine.preparing.directions import Follower, Groups, Watched, divide, group
from lamina.engine.preparing.eva_apply import apply_state_dict, check_adapter
from lamina.engine.preparing.inputs import (
    PrepareLayer,
    all_rows,
    forward_fn_dict,
    language_modeling_mask,
    language_modeling_rows,
    to_device,
)
from lamina.engine.preparing.linear import linear_targets
from lamina.errors import InitialisationError

Forward = Callable[[nn.Module, Any], object]
PrepareModel = Callable[[Any, LoraConfig], Any]
PrepareLayers = PrepareLayer | Mapping[str, PrepareLayer] | None

# From here on rho is taken for "no limit".
_RHO_LIMIT = 1000
_MAX_PASSES = 100


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModel | None = language_modeling_mask,
    prepare_layer_inputs_fn: PrepareLayers = language_modeling_rows,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """Layer -> the directions (rank x in) that its A is to begin with.

    Batches are looked at, in turns, until no layer's directions turn any more (`tau`). The ranks
    that all layers have together go to the directions that explain most of their layer's
    variance; a layer gets from 0 to `r * rho`.

    Args:
        model: adapted or not.
        dataloader: batches, as `forward_fn` takes them; they are looked at several times.
        peft_config: of the adapter to be, where the model isn't adapted.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: batch, config -> what `prepare_layer_inputs_fn` is told of it; None
            passes the batch on.
        prepare_layer_inputs_fn: layer's input, what is told, layer's name -> rows (n x in) that
            count; or a dict of such functions by layers' names. None takes all rows.
        adapter_name: of the adapter, where the model is adapted.
        gather_distributed_inputs: take the rows of all processes together.
        show_progress_bar: show how many layers have settled.

    Raises:
        InitialisationError: with everything that is wrong.
    """
    state = find_state(model)
    config = peft_config or (state.configs.get(adapter_name) if state is not None else None)
    if config is None:
        raise InitialisationError(
            "peft_config is required if model is not a PeftModel",
            cure="get_eva_state_dict(model, dataloader, LoraConfig(init_lora_weights='eva', ...))",
        )
    batches = dataloader if not isinstance(dataloader, Iterator) else list(dataloader)
    first = next(iter(batches), None)
    if first is None or (isinstance(batches, Sized) and len(batches) == 0):
        raise InitialisationError(
            "The dataloader is empty: EVA has nothing to look at.",
            cure="pass a dataloader that gives batches",
        )
    run = _Pass(model, config, forward_fn, prepare_model_inputs_fn, gather_distributed_inputs)
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with nullcontext() if state is None else fold.as_base(model, state):
            run.layers = run.watched(
                adapter_name, prepare_layer_inputs_fn, adapted=state is not None
            )
            return run.directions(batches, first, show_progress_bar)
    finally:
        for module, mode in training:
            module.training = mode


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModel | None = language_modeling_mask,
    prepare_layer_inputs_fn: PrepareLayers = language_modeling_rows,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Begin an adapter anew, with ranks and A by the data; its config says the ranks afterwards.

    Layers that get no rank are no longer adapted. Embeddings and convolutions begin as ever.

    Args:
        model: adapted, with `init_lora_weights="eva"`; its weights may be on the meta device.
        dataloader: batches, as in `get_eva_state_dict`, whose arguments the others are.
        eva_state_dict: what that gave, to be used instead.
        forward_fn: see there.
        prepare_model_inputs_fn: see there.
        prepare_layer_inputs_fn: see there.
        adapter_name: the adapter.
        gather_distributed_inputs: see there.
        show_progress_bar: see there.

    Raises:
        InitialisationError: with everything that is wrong; the adapter is unchanged.
    """
    state = check_adapter(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise InitialisationError(
                "dataloader is required if eva_state_dict is not provided",
                cure="initialize_lora_eva_weights(model, dataloader)",
            )
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    apply_state_dict(model, state, adapter_name, eva_state_dict)


class _Pass:
    """One search for directions."""

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        forward: Forward,
        prepare: PrepareModel | None,
        gather: bool,
    ) -> None:
        self.model, self.config, self.forward = model, config, forward
        self.prepare, self.gather = prepare, gather
        self.settings = config.eva_config or EvaConfig()
        self.device = _device(model)
        self.layers: list[Watched] = []

    def watched(self, adapter: str, prepare: PrepareLayers, *, adapted: bool) -> list[Watched]:
        """The layers to look at."""
        assert isinstance(self.settings, EvaConfig)
        found = list(
            _adapted(self.model, adapter) if adapted else _targeted(self.model, self.config)
        )
        by_name = dict(prepare) if isinstance(prepare, Mapping) else None
        faults = []
        if by_name is not None and by_name.keys() - {name for name, _, _ in found}:
            strange = sorted(by_name.keys() - {name for name, _, _ in found})
            raise InitialisationError(
                "prepare_layer_inputs_fn is a mapping but the following module names were not "
                "found in the model:",
                faults=strange[:8],
                cure="name layers that are adapted, as named_modules() does",
            )
        layers = []
        for name, module, r in found:
            count = round(r * self._rho())
            features = _in_features(module)
            if count > features:
                faults.append(
                    f"{name}: n_components={count} invalid for n_features={features}: r={r} times "
                    f"rho={self._rho():g} is more than it has inputs"
                )
            own = by_name.get(name) if by_name is not None else prepare
            layers.append(Watched(name, module, r, count, own or all_rows))  # type: ignore[arg-type]
        if faults:
            raise InitialisationError(
                f"EVA can't begin {len(faults)} of {len(found)} layers.",
                faults=faults[:8],
                cure="lower r, or rho of the EvaConfig",
            )
        return layers

    def _rho(self) -> float:
        rho: float = self.settings.rho  # type: ignore[union-attr]
        if rho <= _RHO_LIMIT:
            return rho
        widest = max(max(p.shape, default=1) for p in self.model.parameters())
        return min(rho, widest // self.config.r)

    def directions(self, batches: Iterable[Any], first: Any, show: bool) -> dict[str, torch.Tensor]:
        """Look at the batches until all is settled; what each layer gets."""
        if not self.layers:
            return {}
        inputs = to_device(first, self.device)
        mask = self._mask(inputs)
        groups = group(self.layers, lambda: self.forward(self.model, inputs), mask, self.gather)
        by_name = {layer.name: layer for layer in self.layers}
        tau: float = self.settings.tau  # type: ignore[union-attr]
        followers = {name: Follower(by_name[name], tau, self.gather) for name in groups.leaders}
        ranks = {layer.name: layer.components for layer in self.layers}
        for batch in _turns(batches, followers, show):
            if not self._look(batch, groups, followers, ranks):
                break
            if all(follower.begun for follower in followers.values()):
                ranks = divide(groups, followers, self.layers)
        return {
            name: self._cut(followers[groups.leader[name]], rank) for name, rank in ranks.items()
        }

    def _look(
        self,
        batch: Any,
        groups: Groups,
        followers: Mapping[str, Follower],
        ranks: Mapping[str, int],
    ) -> bool:
        """Take one batch in; False if there was nothing left to look at."""
        open_ones = {
            name: follower
            for name, follower in followers.items()
            if not bool(follower.settled[: ranks[name]].all())
        }
        if not open_ones:
            return False
        inputs = to_device(batch, self.device)
        mask = self._mask(inputs)
        handles = []
        for follower in open_ones.values():
            follower.mask = mask
            handles.append(follower.layer.module.register_forward_hook(follower))
        try:
            self.forward(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        _refuse_faults(followers)
        return True

    def _mask(self, inputs: Any) -> Any:
        return deepcopy(inputs) if self.prepare is None else self.prepare(inputs, self.config)

    def _cut(self, follower: Follower, rank: int) -> torch.Tensor:
        found = follower.pca.components_[:rank].clone()
        if self.settings.whiten:  # type: ignore[union-attr]
            found /= follower.pca.singular_values_[:rank].sqrt()[:, None]
        return found.to(self.device)


def _refuse_faults(followers: Mapping[str, Follower]) -> None:
    faults = [f"{name}: {fault}" for name, each in followers.items() for fault in each.faults]
    if faults:
        raise InitialisationError(
            f"EVA can't look at {len(faults)} layers.",
            faults=faults[:8],
            cure="look for the batch, or the weight, that they come from",
        )


def _turns(batches: Iterable[Any], followers: Mapping[str, Follower], show: bool) -> Iterator[Any]:
    """The batches again and again, as long as that leads anywhere."""
    bar = _bar(len(followers)) if show else None
    for _ in range(_MAX_PASSES):
        for batch in batches:
            yield batch
            if bar is not None:
                bar.n = sum(bool(follower.settled.all()) for follower in followers.values())
                bar.refresh()
        short = [name for name, follower in followers.items() if not follower.begun]
        if short:
            raise InitialisationError(
                f"No batch has enough rows for {len(short)} layers: at least as many as "
                "directions are looked for, r * rho.",
                faults=[f"{name}: {followers[name].layer.components}" for name in short[:8]],
                cure="larger batches, or a lower r or rho",
            )
    raise InitialisationError(
        f"EVA's directions still turn after {_MAX_PASSES} passes over the data.",
        cure="a lower tau in the EvaConfig, or more data",
    )


def _bar(total: int) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, desc="EVA: layers settled", leave=False)


def _adapted(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module, int]]:
    for name, layer in lora_layers(model):
        if layer.kind == "linear" and adapter in layer.records:
            yield name, layer, layer.records[adapter].r


def _targeted(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module, int]]:
    if config.target_modules is not None:
        for target in linear_targets(model, config):
            yield target.name, target.module, target.r
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield name, module, config.r


def _in_features(module: Any) -> int:
    return int(module.weight.shape[0] if is_conv1d(module) else module.in_features)


def _device(model: nn.Module) -> torch.device:
    found = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    if len(found) == 1:
        return found.pop()
    what = "on several devices" if found else "on the meta device"
    raise InitialisationError(
        f"EVA has to run the model, whose weights are {what}.",
        faults=sorted(map(str, found)),
        cure="load the base's weights, onto one device",
    )
