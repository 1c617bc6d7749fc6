"""Fold adapters into a model's base weights, and take them out again, as one step.

Sums are in fp32 with one rounding at the end. Everything that could refuse is asked before the
first weight is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lamina.engine.inject import strip
from lamina.engine.layers import LoraLayer, lora_layers
from lamina.engine.layers.displacing import Displaced
from lamina.engine.layers.folding import warn_of_rounding
from lamina.engine.names import places
from lamina.engine.state import AdapterState
from lamina.engine.ties import shared_folds, untie
from lamina.errors import FoldError, NotFoldableError

_SHOWN = 8
_CURE = "leave the adapter unfolded (mode 'stack'), or load a dense base, in bf16 or fp32"
_ON_META = "no weights yet: they are on the meta device"
_EMPTY = "load its weights first: model.load_adapter(path, adapter_name)"
_UNTIE = "; where weights are tied, merge_and_unload(untie=True) gives each module its own"
_QUANTISED = (
    "; or choose: merge_and_unload(target='quantized') rounds the sums to the base's codes, "
    "target='dequantized' makes the layers dense; lamina.compare_merges(model, inputs) measures "
    "what each costs"
)


def fold(
    model: nn.Module,
    state: AdapterState,
    names: Iterable[str] | None = None,
    *,
    safe: bool = False,
    keep_unfolded: bool = True,
    requantise: bool | None = None,
) -> list[str]:
    """Add adapters to the base weights of all their layers.

    Args:
        model: the adapted model.
        state: its shared state.
        names: the adapters; None means the active ones. Those already folded in are skipped.
        safe: look for NaN and Inf in all results before any weight is changed.
        keep_unfolded: keep the weights as they were for a bit-exact `unfold`.
        requantise: whether quantised bases may round the sums to their codes again; None asks the
            shared state, and warns where that allows it.

    Returns:
        The adapters that were folded in now.

    Raises:
        FoldError: a weight can't be written, or a result is not finite; nothing was changed.
    """
    wanted = state.check_known(state.active if names is None else names)
    work = list(_to_fold(model, wanted))
    _check_foldable(model, work, requantise)
    if keep_unfolded:
        _check_biases_apart(state, wanted)
    if safe:
        _check_finite(work)
    if requantise is None:
        warn_of_rounding(layer for _, layer, _ in work)
    _fold_all(model, work, keep_unfolded=keep_unfolded)
    done = {name for _, _, missing in work for name in missing}
    return [name for name in wanted if name in done]


def _fold_all(
    model: nn.Module, work: list[tuple[str, LoraLayer, list[str]]], *, keep_unfolded: bool = True
) -> None:
    """Fold each weight once, however many layers of `work` hold it."""
    sources = shared_folds(places(model), work).sources
    for _, layer, missing in work:
        if id(layer) not in sources:
            layer.fold(missing, keep_unfolded=keep_unfolded)
    for _, layer, missing in work:
        if id(layer) in sources:
            layer.follow(sources[id(layer)], missing)


def _to_fold(
    model: nn.Module, wanted: tuple[str, ...]
) -> Iterator[tuple[str, LoraLayer, list[str]]]:
    for path, layer in lora_layers(model):
        missing = [n for n in wanted if n in layer.records and n not in layer.merged_adapters]
        if missing:
            yield path, layer, missing


def check_foldable(model: nn.Module, names: Iterable[str], *, with_values: bool = True) -> None:
    """Refuse, changing nothing, if any layer of these adapters can't be folded into.

    Args:
        model: the adapted model.
        names: of the adapters.
        with_values: whether base and adapters must have values by now.

    Raises:
        FoldError: with the layers and the reason for each.
    """
    _check_foldable(model, list(_to_fold(model, tuple(names))), None, with_values=with_values)


def _check_foldable(
    model: nn.Module,
    work: list[tuple[str, LoraLayer, list[str]]],
    requantise: bool | None,
    *,
    with_values: bool = True,
) -> None:
    tied = shared_folds(places(model), work).refused
    reasons = [
        (
            path,
            tied.get(id(layer.get_base_layer()))
            or layer.why_not_foldable(missing)
            or _why_empty(layer, missing)
            or layer.why_not_rounded(requantise),
        )
        for path, layer, missing in work
    ]
    if not with_values:
        reasons = [each for each in reasons if not (each[1] or "").endswith("on the meta device")]
    faults = [f"{path}: {reason}" for path, reason in reasons if reason]
    if faults:
        quantised = any(layer.weight_view.quantised for _, layer, _ in work)
        raise not_foldable(faults, len(work), tied=bool(tied), quantised=quantised)


def not_foldable(
    faults: Sequence[str], count: int, *, tied: bool, quantised: bool = False
) -> NotFoldableError:
    """The error that says why layers can't be folded into.

    Args:
        faults: a line for each such layer.
        count: how many layers were to be folded into.
        tied: whether weights are tied.
        quantised: whether weights are quantised.
    """
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return NotFoldableError(
        f"{len(faults)} of {count} layers can't be folded into; nothing was changed.",
        faults=[*faults[:_SHOWN], *more],
        cure=(_EMPTY if any(fault.endswith(_ON_META) for fault in faults) else _CURE)
        + (_UNTIE if tied else "")
        + (_QUANTISED if quantised else ""),
    )


def _why_empty(layer: LoraLayer, names: Iterable[str]) -> str | None:
    """None if all adapters have values: where they are on meta, torch adds nothing in silence."""
    for name in names:
        if any(tensor.is_meta for tensor in layer.tensors(name).values()):
            return f"{name!r} has {_ON_META}"
    return None


def _check_biases_apart(state: AdapterState, names: Iterable[str]) -> None:
    # While folded, the parameter would hold the sum, and switching swaps what it holds.
    biased = [name for name in names if state.configs[name].lora_bias]
    if biased and state.biases.parameters:
        raise FoldError(
            f"lora_bias=True ({', '.join(map(repr, biased))}) can't be folded reversibly into "
            "biases that adapters train by themselves (bias='all' or 'lora_only').",
            cure="leave the adapter unfolded, or merge_and_unload() for good",
        )


def _check_finite(work: list[tuple[str, LoraLayer, list[str]]]) -> None:
    faults = []
    for path, layer, missing in work:
        if not layer.is_finite(missing):
            faults.append(f"{path} with {', '.join(map(repr, missing))}")
    if faults:
        raise FoldError(
            f"NaN or Inf would come out in {len(faults)} layer(s); nothing was changed.",
            faults=faults[:_SHOWN],
            cure="look for the adapter that is broken; train it again with a lower learning rate",
        )


def unfold(model: nn.Module) -> None:
    """Give all base weights back as they were, bit for bit.

    Raises:
        FoldError: some were folded without being kept; then nothing is changed.
    """
    layers = [(path, layer) for path, layer in lora_layers(model) if layer.merged_adapters]
    lost = [path for path, layer in layers if not layer.can_unfold]
    if lost:
        raise FoldError(
            f"{len(lost)} layers were folded without keeping their weights.",
            faults=lost[:_SHOWN],
            cure="load the base model again",
        )
    # A layer around another one was folded before it.
    for _, layer in reversed(layers):
        layer.unfold()


def folded_adapters(model: nn.Module) -> list[str]:
    """The adapters that are folded in anywhere, in the order of folding."""
    names = (name for _, layer in lora_layers(model) for name in layer.merged_adapters)
    return list(dict.fromkeys(names))


@contextmanager
def as_base(model: nn.Module, state: AdapterState) -> Iterator[None]:
    """The model answers as its base for a while: adapters off, folded ones taken out.

    Whatever was folded, active and trainable is so again afterwards, bit for bit.
    """
    with unfolded(model, state), state.while_disabled():
        yield


@contextmanager
def unfolded(model: nn.Module, state: AdapterState) -> Iterator[None]:
    """Nothing is folded in for a while; afterwards what was is so again, bit for bit."""
    # The model is walked only where something is folded in.
    folded = _folded_by_path(model) if state.folded_layers else {}
    if folded:
        unfold(model)
    try:
        yield
    finally:
        if folded:
            _fold_again(model, folded)


def _folded_by_path(model: nn.Module) -> dict[str, list[str]]:
    layers = lora_layers(model)
    return {path: list(layer.merged_adapters) for path, layer in layers if layer.merged_adapters}


def _fold_again(model: nn.Module, folded: dict[str, list[str]]) -> None:
    """Fold what was folded before an `unfold`; where nothing was unfolded nothing is done."""
    work = []
    for path, layer in lora_layers(model):
        # An adapter may have been deleted in between.
        here = [name for name in folded.get(path, ()) if name in layer.records]
        missing = [name for name in here if name not in layer.merged_adapters]
        if missing:
            work.append((path, layer, missing))
    _fold_all(model, work)


def merge_and_unload(
    model: nn.Module,
    state: AdapterState,
    names: Iterable[str] | None = None,
    *,
    safe: bool = False,
    requantise: bool | None = None,
    untied: bool = False,
) -> nn.Module:
    """The plain model with adapters (None: the active ones) folded in for good; see `fold`.

    With `untied`, modules that share a weight get one each first, so that folding into one of them
    leaves the others as they are.
    """
    wanted, active = state.check_known(state.active if names is None else names), state.active
    folded = _folded_by_path(model)
    if not set(folded_adapters(model)) <= set(wanted):
        unfold(model)
    tie_again = untie(model, places(model)) if untied else None
    # What other adapters took out of the base has to be in it again before anything is added.
    given = give_back(model, [name for name in state.configs if name not in wanted])
    try:
        # First: what is folded into a bias has to go into the values that stay.
        state.activate(wanted)
        fold(model, state, wanted, safe=safe, keep_unfolded=False, requantise=requantise)
    except FoldError:
        for layer, name, taken in reversed(given):
            layer.take(name, taken)
        state.activate(active)
        if tie_again is not None:
            tie_again()
        _fold_again(model, folded)
        raise
    return strip(model, keep_saved=True)


def give_back(model: nn.Module, names: Iterable[str]) -> list[tuple[LoraLayer, str, Displaced]]:
    """Give base weights back what the initialisations of these adapters took out of them.

    Returns:
        What was given back, to be taken again by `layer.take(name, taken)`, last one first.
    """
    wanted, given = list(names), []
    for _, layer in lora_layers(model):
        for name in [name for name in wanted if name in layer.displaced]:
            given.append((layer, name, layer.displaced[name]))
            layer.give_back(name)
    return given


def unload(model: nn.Module, state: AdapterState) -> nn.Module:
    """The plain model as it was before it was adapted."""
    unfold(model)
    give_back(model, state.configs)
    state.biases.show(())
    bare = strip(model, keep_saved=False)
    if state.replication is not None:
        state.replication.undo()
    return bare
