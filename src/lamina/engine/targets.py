"""From patterns to a plan: which layers are adapted, with which numbers. Touches nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from torch import nn

from lamina.config import ALL_LINEAR, AdaLoraConfig, LoraConfig
from lamina.config.expressions import fullmatch
from lamina.config.patterns import in_layers, matching
from lamina.engine.bypassed import why_bypassed
from lamina.engine.conflicts import conflicts
from lamina.engine.faults import init_error, plan_error, silent_patterns, unsupported
from lamina.engine.init import initialisation
from lamina.engine.layers import LayerAdapter, LoraLayer, ParamWrapper, SvdLayer, layer_class
from lamina.engine.linears import head_names, linear_names
from lamina.engine.names import Place, kind_at, places, suffixes, within
from lamina.engine.parameters import ParameterHit, find_parameters, skipped_experts, why_not
from lamina.engine.spelling import find_all_linear_names, spell, spell_saved
from lamina.engine.ties import tied_to_embedding
from lamina.engine.tokens import TokenPlan, find_tokens
from lamina.engine.usual import usual_targets

# Fields whose every pattern has to match something, beside target_modules.
_CHECKED = (
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)
_WITHOUT_BIAS = {
    "embedding": "an embedding",
    "experts": "adapted by its parameters",
    "attention": "an nn.MultiheadAttention",
}


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt: its plain name, the class that adapts it, its numbers.

    `parameter` names the parameter, where one is adapted by itself; `tied_to` is the plain name of
    the layer whose factors this one takes.
    """

    name: str
    kind: type[LoraLayer]
    record: LayerAdapter
    parameter: str | None = None
    tied_to: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Plain names of all modules that it adapts: an attention's output projection too."""
        return (
            (self.name, f"{self.name}.out_proj") if self.kind.kind == "attention" else (self.name,)
        )


@dataclass(frozen=True)
class Plan:
    """What an adapter will change in a model.

    Attributes:
        layers: the layers to adapt, in the model's order.
        saved: plain names of the modules to train whole.
        counts: how many layers each pattern of `target_modules` hit.
        tokens: the tables whose rows it replaces.
        ties: plain names of the modules that share the input embedding's weight, itself first,
            where the config asks for their adapters to be tied.
        skipped: plain names of expert parameters that "all-linear" doesn't take in.
    """

    layers: tuple[LayerPlan, ...]
    saved: tuple[str, ...]
    counts: dict[str, int]
    skipped: tuple[str, ...] = ()
    tokens: tuple[TokenPlan, ...] = ()
    ties: tuple[str, ...] = ()


def make_plan(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> Plan:
    """Find what `config` means in `model`, adapted already or not.

    Args:
        model: any module.
        config: the adapter to be.
        strict: every pattern must match; False where tensors from a file decide anyway.

    Raises:
        TargetError: with everything that is wrong; UnsupportedTargetError if a pattern hits
            something that can't be adapted.
    """
    everything = list(places(model))
    finder = _Finder(config, everything, model)
    layers = []
    seen: set[int] = set()
    for place in everything:
        patterns = finder.patterns_for(place.name)
        if not patterns or id(place.original) in seen:
            continue
        seen.add(id(place.original))
        layer = finder.plan(place, patterns)
        if layer is not None:
            layers.append(layer)
    layers = finder.with_tied(layers)
    hits = find_parameters(everything, frozenset(config.target_parameters or ()))
    layers += finder.plan_parameters(hits, {layer.name for layer in layers})
    faults = finder.faults(strict=strict)
    tokens, wrong = find_tokens(model, everything, config, finder.saved)
    faults += wrong
    faults += conflicts(everything, [layer.name for layer in layers], finder.saved)
    if finder.init_faults:
        raise init_error(finder.init_faults, [*finder.unsupported, *faults], config)
    if faults or finder.unsupported:
        raise plan_error(faults, finder.unsupported, linear_names(everything, model), config)
    skipped = skipped_experts(everything, hits) if finder.targets == ALL_LINEAR else ()
    return Plan(
        tuple(layers),
        tuple(finder.saved),
        dict(finder.counts),
        tuple(skipped),
        tuple(tokens),
        finder.ties,
    )


def _holders(everything: Iterable[Place]) -> dict[int, list[str]]:
    """id of a weight -> the names of the modules that hold it."""
    holders: dict[int, list[str]] = defaultdict(list)
    seen: set[int] = set()
    for place in everything:
        weight = place.original._parameters.get("weight")
        if weight is not None and id(place.original) not in seen:
            seen.add(id(place.original))
            holders[id(weight)].append(place.name)
    return holders


class _Finder:
    """One search: patterns in, hits and faults collected."""

    def __init__(self, config: LoraConfig, everything: list[Place], model: nn.Module) -> None:
        self.config, self.model = config, model
        self.everything = everything
        self.names = [place.name for place in everything if place.name]
        self.counts: Counter[str] = Counter()
        # field -> its patterns that matched; those of `shadowed` matched too late to count.
        self.used: dict[str, set[str]] = defaultdict(set)
        self.shadowed: dict[str, set[str]] = defaultdict(set)
        self.layer_indices: set[int] = set()
        self.unsupported: list[str] = []
        self.other_faults: list[str] = []
        # What keeps layers from beginning as asked, and what mends it.
        self.init_faults: dict[str, str] = {}
        self.init = initialisation(config.init_lora_weights)
        self.holders = _holders(everything) if self.init.changes_base else {}
        self.attention = {
            place.name for place in everything if isinstance(place.original, nn.MultiheadAttention)
        }
        self.all_linear: set[str] = set()
        self.targets = self._targets(model)
        self.ties = tied_to_embedding(model, everything) if config.ensure_weight_tying else ()
        self.saved = self._saved()
        if set(self.ties) & set(self.saved):
            self.saved = [*self.ties, *(name for name in self.saved if name not in self.ties)]

    def _targets(self, model: nn.Module) -> Collection[str] | str:
        targets = self.config.target_modules
        if targets is None:
            # Who names parameters means these, not what is usual beside them.
            return () if self.config.target_parameters else usual_targets(self.names)
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            self.all_linear = set(linear_names(self.everything, model))
            return ALL_LINEAR
        return targets if isinstance(targets, str) else frozenset(targets)

    def _saved(self) -> list[str]:
        wanted = set(self.config.modules_to_save or ())
        saved: list[str] = []
        for name in self.names:
            hits = [suffix for suffix in suffixes(name) if suffix in wanted]
            self.used["modules_to_save"].update(hits)
            if hits and not any(within(name, outer) for outer in saved):
                saved.append(name)
        return saved

    def patterns_for(self, name: str) -> list[str]:
        """The patterns by which a module is adapted, the most precise first; none if it isn't."""
        patterns = self._hits(self.targets, name) if name else []
        if not patterns or self._excluded(name) or self._inside_saved(name):
            return []
        if not self._layer_wanted(name):
            return []
        self.used["target_modules"].update(patterns)
        return patterns

    def _hits(self, targets: Collection[str] | str, name: str) -> list[str]:
        if targets == ALL_LINEAR:
            return [ALL_LINEAR] if name in self.all_linear else []
        if isinstance(targets, str):
            return [targets] if fullmatch(targets, name) else []
        return [suffix for suffix in suffixes(name) if suffix in targets]

    def _excluded(self, name: str) -> bool:
        hits = self._hits(self.config.exclude_modules or (), name)
        self.used["exclude_modules"].update(hits)
        return bool(hits)

    def _inside_saved(self, name: str) -> bool:
        return any(within(name, saved) for saved in self.saved)

    def _layer_wanted(self, name: str) -> bool:
        wanted = self.config.layers_to_transform
        if wanted is None or wanted == []:
            return True
        index = layer_index(name, self.config.layers_pattern)
        if index is None:
            return False
        self.layer_indices.add(index)
        return index in ([wanted] if isinstance(wanted, int) else wanted)

    def plan(self, place: Place, patterns: list[str]) -> LayerPlan | None:
        """The plan for a module that is hit, or None and a fault."""
        self.counts.update(patterns)
        parent = place.name.rpartition(".")[0]
        kind = None if parent in self.attention else kind_at(place, self.config)
        if kind is None:
            self.unsupported.append(
                unsupported(place.name, place.original, patterns[0], parent in self.attention)
            )
            return None
        record = self._record(place.name)
        self._check_layer(place, kind, record)
        return LayerPlan(place.name, kind, record)

    def with_tied(self, layers: list[LayerPlan]) -> list[LayerPlan]:
        """The plans, those of all tied modules among them where one is hit, each after its own."""
        hit = {layer.name: layer for layer in layers}
        if not hit.keys() & set(self.ties):
            return layers
        by_name = {place.name: place for place in self.everything}
        first, *others = self.ties
        own = hit.get(first) or self.plan(by_name[first], [])
        rest = [layer for layer in layers if layer.name not in self.ties]
        if own is None:
            return rest
        tied = [
            LayerPlan(name, kind, replace(own.record, target=name), tied_to=first)
            for name in others
            if (kind := layer_class(by_name[name].original, self.config)) is not None
        ]
        return [own, *tied, *rest]

    def plan_parameters(
        self, hits: Iterable[ParameterHit], adapted: Collection[str]
    ) -> list[LayerPlan]:
        """The plans for parameters that are hit; what can't be adapted becomes a fault."""
        plans = []
        for hit in hits:
            self.used["target_parameters"].update(hit.patterns)
            reason = why_not(hit, adapted)
            record = self._record(hit.name)
            if reason is not None:
                self.other_faults.append(reason)
                continue
            self._check_layer(hit.place, ParamWrapper, record)
            plans.append(LayerPlan(hit.place.name, ParamWrapper, record, hit.parameter))
        return plans

    def _record(self, name: str) -> LayerAdapter:
        if isinstance(self.config, AdaLoraConfig):
            return self._allocated(name, self.config)
        r = int(self._lookup("rank_pattern", name, self.config.r))
        alpha = self._lookup("alpha_pattern", name, self.config.lora_alpha)
        return LayerAdapter.of(self.config, r, alpha, name)

    def _allocated(self, name: str, config: AdaLoraConfig) -> LayerAdapter:
        mask = config.ranks_left(name)
        self.used["rank_pattern"].update(config.masks_of(name))
        r = config.init_r if mask is None else sum(mask)
        return LayerAdapter.of(config, r, config.lora_alpha, name)

    def _check_layer(self, place: Place, kind: type[LoraLayer], record: LayerAdapter) -> None:
        groups = getattr(place.original, "groups", 1) if kind.kind == "conv" else 1
        if record.r % groups:
            self.other_faults.append(
                f"{place.name} is a convolution with {groups} groups, which don't divide "
                f"r={record.r}: Targeting a {type(place.original).__name__} with groups={groups} "
                f"and rank {record.r}. Currently, support is limited to conv layers where the rank "
                "is divisible by groups. Either choose a different rank or do not target this "
                "specific layer."
            )
        now = place.module
        others = isinstance(now, LoraLayer) and bool(now.records)
        if others and isinstance(now, SvdLayer) != issubclass(kind, SvdLayer):
            self.other_faults.append(f"{place.name} can't have LoRA and AdaLoRA adapters both")
        self._check_beginning(place, kind, record)
        reasons = (
            kind.why_not(place.original),
            record.variant.why_not(kind.kind, place.original, self.config, place.name),
            why_bypassed(self.model, place.name),
        )
        self.other_faults += [f"{place.name}: {reason}" for reason in reasons if reason]
        if kind.kind in _WITHOUT_BIAS and self.config.lora_bias:
            what = _WITHOUT_BIAS[kind.kind]
            self.other_faults.append(
                f"{place.name} is {what}, which can't have a lora_bias: lora_bias=True is not "
                f"supported for {type(place.original).__name__}"
            )

    def _check_beginning(self, place: Place, kind: type[LoraLayer], record: LayerAdapter) -> None:
        if kind.kind not in self.init.kinds:
            self.other_faults.append(
                f"init_lora_weights={self.config.init_lora_weights!r} is not made for "
                f"{kind.kind} layers such as {place.name}"
            )
            return
        fault = self.init.why_not(kind.kind, place.original, record)
        if fault:
            self.init_faults[f"{place.name}: {fault.reason}"] = fault.cure
        weight = id(place.original._parameters.get("weight"))
        tied = [name for name in self.holders.get(weight, ()) if name != place.name]
        if tied and kind.kind == "linear":
            self.init_faults[f"{place.name}: its weight is tied to {tied[0]}, and would change"] = (
                "leave it out of target_modules, or untie the weights"
            )

    def _lookup(self, field: str, name: str, default: float) -> float:
        table: dict[str, float] = getattr(self.config, field)
        found = matching(table, name)
        if not found:
            return default
        self.used[field].add(found[0])
        self.shadowed[field].update(found[1:])
        return table[found[0]]

    def faults(self, *, strict: bool) -> list[str]:
        """Everything that is wrong, apart from what can't be adapted."""
        faults = list(self.other_faults)
        if not strict:
            return faults
        if self.config.target_modules is None and not (
            self.targets or self.config.target_parameters
        ):
            faults.append("target_modules is None, and this architecture has no usual ones")
        faults += self._silent("target_modules", self.targets)
        for field in _CHECKED:
            faults += self._silent(field, getattr(self.config, field) or ())
        return faults + self._silent_layers()

    def _silent(self, field: str, value: Iterable[str]) -> list[str]:
        patterns = [value] if isinstance(value, str) else value
        silent = set(patterns) - self.used[field]
        late = sorted(silent & self.shadowed[field])
        return [
            *silent_patterns(field, sorted(silent - self.shadowed[field]), self.names),
            *(f"{field}: {p!r} has no effect, since earlier entries match first" for p in late),
        ]

    def _silent_layers(self) -> list[str]:
        wanted = self.config.layers_to_transform
        if wanted is None:
            return []
        indices = [wanted] if isinstance(wanted, int) else wanted
        silent = sorted(set(indices) - self.layer_indices)
        if not silent:
            return []
        have = f"layers 0 to {max(self.layer_indices)}" if self.layer_indices else "no such layers"
        return [f"layers_to_transform has {silent}; the targets lie in {have}"]


def layer_index(name: str, pattern: list[str] | str | None) -> int | None:
    """The index of the layer that a module lies in: the first number after `pattern`."""
    patterns = [pattern] if isinstance(pattern, str) else (pattern or [])
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name) or re.match(r"[^.]*\.(\d+)\.", name)
        return int(match.group(1)) if match else None
    for each in patterns:
        match = re.match(in_layers(each), name)
        if match:
            return int(match["lamina_index"])
    return None


__all__ = [
    "LayerPlan",
    "Plan",
    "find_all_linear_names",
    "head_names",
    "layer_index",
    "make_plan",
    "spell",
    "spell_saved",
]
