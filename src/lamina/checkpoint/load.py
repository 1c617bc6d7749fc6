"""Fill a model's adapter from named tensors: strict, counted, all or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lamina.checkpoint.keys import Slot, disk_names, is_double, map_keys, parts, respelt_bias, slots
from lamina.checkpoint.origin import PREFIX, plain_key
from lamina.checkpoint.ranks import misfits
from lamina.checkpoint.report import LoadReport, mismatch_error
from lamina.engine.layers import lora_layers
from lamina.engine.names import way_in
from lamina.engine.state import AdapterState
from lamina.errors import CheckpointError, FoldError, KeyMismatchError

_B_LEAVES = ("lora_B.weight", "lora_embedding_B")


def fill_adapter(
    model: nn.Module,
    adapter: str,
    state: AdapterState,
    tensors: Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    key_mapping: dict[str, str] | None = None,
    source: str = "this state dict",
) -> LoadReport:
    """Put tensors from a file into the places of an adapter that is in the model already.

    Args:
        model: the model.
        adapter: the adapter's name.
        state: the model's shared state.
        tensors: name on disk -> tensor. Wrapper prefixes, adapter names inside the names and a
            missing or extra `base_model.model.` are understood.
        strict: refuse unless every tensor lands and every adapter weight is filled.
        ignore_mismatched_sizes: skip tensors of another shape, and report them.
        key_mapping: regular expression -> replacement, applied to the file's names.
        source: what to call the file in messages.

    Raises:
        KeyMismatchError, CheckpointError: nothing has been changed.
        FoldError: the adapter is folded into the base weights; likewise.
    """
    _refuse_folded(model, adapter, state)
    found = match_tensors(model, adapter, state, tensors, key_mapping)
    wanted, given, base, matched = found.wanted, found.given, found.base, found.matched
    wrong = found.mismatched
    zero = [
        key
        for key, slot in matched.items()
        if slot.leaf in _B_LEAVES and not bool(given[key].any())
    ]
    report = LoadReport(
        loaded=tuple(matched),
        missing_keys=found.missing_keys,
        unexpected_keys=found.unexpected_keys,
        mismatched_keys=wrong,
        base_keys=tuple(base),
        replaced_keys=tuple(key for key in base if not _holds(base[key], given[key])),
        zero_B=tuple(zero),
        count_B=sum(slot.leaf in _B_LEAVES for slot in wanted.values()),
    )
    refused = bool(wrong) and not ignore_mismatched_sizes
    if refused or (strict and (report.missing_keys or report.unexpected_keys)):
        raise mismatch_error(report, source, list(given), list(wanted))
    _refuse_meta(matched, base, source)
    _begin_unfilled(model, adapter, wanted, matched)
    _put(matched, base, given)
    return report


@dataclass(frozen=True)
class Matching:
    """Which tensors of a file go where in a model.

    Attributes:
        wanted: name on disk -> slot, for all of the adapter.
        given: the tensors under the names that the model uses.
        base: weights of the base that the file brings along.
        matched: the slots that a tensor of the right shape goes into.
        mismatched: (name, shape in the file, shape in the model) of those of another shape.
    """

    wanted: Mapping[str, Slot]
    given: Mapping[str, torch.Tensor]
    base: dict[str, nn.Parameter]
    matched: dict[str, Slot]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @property
    def missing_keys(self) -> list[str]:
        """Adapter weights of the model that the file has no tensor for."""
        return sorted(self.wanted.keys() - self.given.keys())

    @property
    def unexpected_keys(self) -> list[str]:
        """Tensors of the file that have no place in the model."""
        return sorted(self.given.keys() - self.wanted.keys() - self.base.keys())


def match_tensors(
    model: nn.Module,
    adapter: str,
    state: AdapterState,
    tensors: Mapping[str, torch.Tensor],
    key_mapping: dict[str, str] | None = None,
) -> Matching:
    """Find where the tensors of a file go; names and shapes decide, nothing is changed.

    Args:
        model: the model, with the adapter in it.
        adapter: its name.
        state: the model's shared state.
        tensors: name on disk -> tensor, which may be on the meta device.
        key_mapping: regular expression -> replacement, applied to the file's names.

    Raises:
        KeyMismatchError: the mapping gives two tensors one name.
    """
    wanted = slots(model, adapter, state)
    given = _renamed(tensors, wanted, key_mapping or {})
    matched = {key: slot for key, slot in wanted.items() if key in given}
    wrong = misfits(matched, given)
    for key, _, _ in wrong:
        del matched[key]
    return Matching(wanted, given, _base_tensors(model, given, wanted), matched, wrong)


def _refuse_folded(model: nn.Module, adapter: str, state: AdapterState) -> None:
    # The base would go on answering with what was folded in.
    layers = lora_layers(model) if state.folded_layers else ()
    if any(adapter in layer.merged_adapters for _, layer in layers):
        raise FoldError(
            f"The adapter {adapter!r} is folded into the base weights.",
            cure="model.unmerge_adapter() first, then load into it",
        )


def _holds(parameter: nn.Parameter, value: torch.Tensor) -> bool:
    return parameter.is_meta or torch.equal(parameter.detach(), value.to(parameter))


def _refuse_meta(matched: dict[str, Slot], base: dict[str, nn.Parameter], source: str) -> None:
    """Values copied into the base's own parameters would vanish where those are on meta."""
    lost = [key for key, slot in matched.items() if slot.kind == "bias" and slot.tensor.is_meta]
    lost += [key for key, parameter in base.items() if parameter.is_meta]
    if lost:
        raise CheckpointError(
            f"{source} has values for {len(lost)} weight(s) of the base, which are on the meta "
            "device and can't take them up.",
            faults=lost[:6],
            cure="load the weights of the base first",
        )


def _begin_unfilled(
    model: nn.Module, adapter: str, wanted: Mapping[str, Slot], matched: Mapping[str, Slot]
) -> None:
    """Give weights that no tensor fills, and that don't exist yet, their initial values."""
    unfilled = {s.module for key, s in wanted.items() if key not in matched and s.tensor.is_meta}
    if not unfilled:
        return
    for place, on_disk in disk_names(model):
        for name, layer in parts(place.module, on_disk, adapter):
            if name in unfilled:
                layer.initialise(adapter, layer.adapter_state.configs[adapter].init_lora_weights)


@torch.no_grad()
def _put(
    matched: dict[str, Slot], base: dict[str, nn.Parameter], given: Mapping[str, torch.Tensor]
) -> None:
    for key, slot in matched.items():
        slot.put(given[key])
    for key, parameter in base.items():
        parameter.data.copy_(given[key])


def _renamed(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, Slot], mapping: dict[str, str]
) -> dict[str, torch.Tensor]:
    """The tensors under the names that the model uses, as far as that is sure."""
    tensors = {key: tensor for key, tensor in tensors.items() if not is_double(key, tensors)}
    renamed = map_keys(tensors, mapping)
    _refuse_collisions(renamed)
    plain = {plain_key(renamed[key]): tensor for key, tensor in tensors.items()}
    if len(plain) != len(tensors):
        # Two adapters in one file, say: names that differ only in what is left out.
        plain = {renamed[key]: tensor for key, tensor in tensors.items()}
    model_has = any(key.startswith(PREFIX) for key in wanted)
    file_has = any(key.startswith(PREFIX) for key in plain)
    if model_has and not file_has:
        plain = {PREFIX + key: tensor for key, tensor in plain.items()}
    if file_has and not model_has:
        plain = {key.removeprefix(PREFIX): tensor for key, tensor in plain.items()}
    return {respelt_bias(key, wanted): tensor for key, tensor in plain.items()}


def _refuse_collisions(renamed: Mapping[str, str]) -> None:
    counts = Counter(renamed.values())
    faults = [f"{old} -> {new}" for old, new in renamed.items() if counts[new] > 1]
    if faults:
        raise KeyMismatchError(
            f"key_mapping gives {len(faults)} tensors names that others have too.",
            faults=sorted(faults)[:6],
            cure="make its regular expressions narrower",
        )


def _base_tensors(
    model: nn.Module, given: Mapping[str, torch.Tensor], wanted: Mapping[str, Slot]
) -> dict[str, nn.Parameter]:
    """Weights of the base that a file brings along: PEFT saves adapted embeddings whole."""
    if all(key in wanted for key in given):
        return {}
    found = {}
    for place, on_disk in disk_names(model):
        inner = way_in(place.module)
        for leaf, parameter in place.original.named_parameters(recurse=False):
            key = f"{on_disk}.{inner}{leaf}"
            if key in given and key not in wanted and given[key].shape == parameter.shape:
                found[key] = parameter
    return found
