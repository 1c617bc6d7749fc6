"""The directions in which the inputs of layers vary, and how many of them each layer gets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lamina.engine.preparing.inputs import PrepareLayer, fingerprint, gathered
from lamina.engine.preparing.pca import IncrementalPCA
from lamina.errors import InitialisationError

_SEED = 42


@dataclass
class Watched:
    """A layer whose inputs are looked at.

    Attributes:
        name: its name in the model.
        module: the layer.
        r: its rank before ranks are divided anew.
        components: how many directions are followed: the most it can get.
        prepare: which of its inputs count.
    """

    name: str
    module: nn.Module
    r: int
    components: int
    prepare: PrepareLayer


@dataclass
class Follower:
    """Follows the directions of one layer's inputs over the batches.

    Attributes:
        layer: the layer.
        tau: cosine similarity from which on a direction counts as settled.
        gather: whether rows of all processes are taken together.
        mask: what `prepare` is told of the batch.
        settled: for each direction, whether the last batch left it as it was.
        faults: what was wrong with its inputs.
    """

    layer: Watched
    tau: float
    gather: bool
    mask: Any = None
    settled: torch.Tensor = field(init=False)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = self.layer.components
        self.pca = IncrementalPCA(count, copy=True, lowrank=True, lowrank_seed=_SEED)
        self.settled = torch.zeros(count, dtype=torch.bool)

    @property
    def begun(self) -> bool:
        """Whether any batch had enough rows."""
        return hasattr(self.pca, "components_")

    def __call__(self, module: nn.Module, args: Any, output: object) -> None:
        """Take the inputs of one call in; a hook of the layer's forward."""
        rows = rows_of(self.layer, args, self.mask, self.gather)
        if not bool(torch.isfinite(rows).all()):
            self.faults.append("its inputs have NaN or Inf in them")
            return
        if rows.shape[0] < self.layer.components:
            return
        before = self.pca.components_.clone() if self.begun else None
        self.pca.partial_fit(rows.float())
        if before is not None:
            alike = torch.cosine_similarity(self.pca.components_, before)
            self.settled = alike >= self.tau


def rows_of(layer: Watched, args: Any, mask: Any, gather: bool) -> torch.Tensor:
    """The rows (n x features) of a layer's input that count."""
    rows = layer.prepare(args, mask, layer.name)
    return gathered(rows) if gather else rows


@dataclass(frozen=True)
class Groups:
    """Layers by their inputs: those with the same inputs share one follower.

    Attributes:
        leader: layer -> the first layer that has the same inputs.
    """

    leader: dict[str, str]

    @property
    def leaders(self) -> list[str]:
        """The layers that are followed."""
        return list(dict.fromkeys(self.leader.values()))


def group(layers: list[Watched], run: Callable[[], object], mask: Any, gather: bool) -> Groups:
    """Run one batch and find the layers with the same inputs.

    Raises:
        InitialisationError: with the layers that it doesn't reach.
    """
    prints: dict[str, bytes] = {}

    def hook_for(layer: Watched) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: object) -> None:
            prints.setdefault(layer.name, fingerprint(rows_of(layer, args, mask, gather)))

        return hook

    with hooked({layer.name: (layer.module, hook_for(layer)) for layer in layers}):
        run()
    missing = [layer.name for layer in layers if layer.name not in prints]
    if missing:
        raise InitialisationError(
            f"The forward pass doesn't reach {len(missing)} of {len(layers)} adapted layers.",
            faults=missing[:8],
            cure="leave them out of target_modules, or let forward_fn use them",
        )
    same: dict[bytes, list[Watched]] = defaultdict(list)
    for layer in layers:
        same[prints[layer.name]].append(layer)
    for members in same.values():
        most = max(member.components for member in members)
        for member in members:
            member.components = most
    leader = {m.name: members[0].name for members in same.values() for m in members}
    firsts = {
        layer.name: leader[layer.name] for layer in layers if leader[layer.name] == layer.name
    }
    return Groups({**firsts, **{name: first for name, first in leader.items() if name != first}})


@contextmanager
def hooked(hooks: Mapping[str, tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Call hooks after their modules' forward, for a while."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divide(
    groups: Groups, followers: Mapping[str, Follower], layers: Iterable[Watched]
) -> dict[str, int]:
    """Divide the ranks that the layers had among the directions that explain most, of all layers.

    A layer that is followed for others gets at least what they get.
    """
    layers = list(layers)
    budget = sum(layer.r for layer in layers)
    ratios = {name: each.pca.explained_variance_ratio_ for name, each in followers.items()}
    owners = [name for name, leader in groups.leader.items() for _ in ratios[leader]]
    explained = torch.cat([ratios[leader] for leader in groups.leader.values()])
    best = explained.argsort(descending=True)[:budget].tolist()
    counted = Counter(owners[i] for i in best)
    counts = {name: counted.get(name, 0) for name in groups.leader}
    for name, leader in groups.leader.items():
        if counts[leader] < counts[name]:
            counts[leader], counts[name] = counts[name], counts[leader]
    return counts
