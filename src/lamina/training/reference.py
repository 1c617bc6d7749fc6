"""The reference of a preference stage: the same model, with other adapters in its forward."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.checkpoint.adapter import read_adapter
from lamina.errors import StageError
from lamina.model import PeftModel
from lamina.stages.context import context_of
from lamina.stages.lamination import take_apart
from lamina.stages.restore import restore_part


class Reference(nn.Module):
    """A view on a model that is being trained: what it answers with `adapters`, and no others.

    A call switches the adapters, answers in eval mode without gradients and without drawing random
    numbers, and switches back, so that training goes on as if it hadn't been. It has no weights of
    its own, and trainers that prepare, patch or evaluate it touch nothing of the model.

    Args:
        model: the model, which a stage was begun on.
        adapters: those that take part, in their order; none means the base.
    """

    def __init__(self, model: PeftModel, adapters: tuple[str, ...]) -> None:
        super().__init__()
        # In a tuple torch doesn't see it: nothing that is done to the view's modules reaches it.
        self._viewed = (model,)
        self.adapters = adapters
        self.training = False

    @property
    def model(self) -> PeftModel:
        """The model that is viewed."""
        return self._viewed[0]

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.model.get_base_model().config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model answers with these adapters. Patches of `forward` don't change it."""
        with torch.no_grad(), self.shown():
            return self.model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As when called."""
        return self(*args, **kwargs)

    @contextmanager
    def shown(self) -> Iterator[PeftModel]:
        """The model itself, answering as the reference inside."""
        with _evaluating(self.model), _switched(self.model, self.adapters):
            yield self.model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's, with the names of the adapters: two references are never taken for one."""
        named = hashlib.sha256(repr(self.adapters).encode()).digest()
        state = dict(self.model.state_dict(*args, **kwargs))
        return {**state, "reference": torch.tensor(list(named), dtype=torch.uint8)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # On a CPU bitsandbytes repacks the weights of a layer in place when that infers, and the layer
    # can't be trained over any more.
    training = [
        module
        for module in model.modules()
        if module.training and not type(module).__module__.startswith("bitsandbytes.")
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _switched(model: PeftModel, adapters: tuple[str, ...]) -> Iterator[None]:
    if not adapters:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapters
    model.set_adapter(adapters)
    try:
        yield
    finally:
        model.set_adapter(active)


def reference_of(model: PeftModel, stage: str | Path | None) -> Reference:
    """The view on a model as it was at the end of an earlier stage.

    Ranks that are in the model as that stage left them are used where they are. Ranks that were
    trained on since are added once more, frozen, as `NAME-reference`; they are never saved.

    Args:
        model: what `begin_stage` returned.
        stage: the directory of a stage that the model's chain was built on; None means the base.

    Raises:
        StageError: the model's parent is folded into the base, and the stage is not the parent.
    """
    if stage is None:
        return Reference(model, ())
    context = context_of(model)
    older = [adapter for adapter, _ in context.older]
    chain = take_apart(read_adapter(stage))
    _check_ancestor(model, chain.record.stages, stage)
    names = [part.lamina.stage for part in chain.parts]
    shared = _shared(names, older)
    if context.mode == "merge" and (shared != len(names) or names != older):
        raise StageError(
            f"Stage {names[-1]!r} can't be the reference: its ranks are folded into the base "
            "together with those of later stages.",
            cure='mode="stack", which computes the same, or reference="parent" or "base"',
        )
    active = model.active_adapters
    used = names[:shared]
    for part in chain.parts[shared:]:
        adapter = _free_name(model, f"{part.lamina.stage}-reference")
        restore_part(model, chain, part, adapter, drop_out=False)
        used.append(adapter)
    model.set_adapter(active, train=[context.name])
    return Reference(model, tuple(used))


def _check_ancestor(model: PeftModel, stages: Any, path: str | Path) -> None:
    context = context_of(model)
    ours = [stage.name for stage in context.parent.stages] if context.parent else []
    theirs = [stage.name for stage in stages]
    if theirs != ours[: len(theirs)]:
        raise StageError(
            f"{path} is no part of the chain that stage {context.name!r} is built on.",
            faults=[f"{' -> '.join(theirs)}, not a beginning of {' -> '.join(ours) or 'nothing'}"],
            cure="name a stage of the chain, or the base",
        )


def _shared(names: list[str], older: list[str]) -> int:
    """How many of `names` are in the model as they were; ranks trained on have a newer name."""
    count = 0
    for name, there in zip(names, older, strict=False):
        if name != there:
            break
        count += 1
    return count


def _free_name(model: PeftModel, name: str) -> str:
    taken = set(model.peft_config)
    return name if name not in taken else _free_name(model, f"{name}-again")
