"""Replay the probe of a record on a base: it alone, and with the adapter over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lamina.checkpoint.origin import B_LEAVES
from lamina.checkpoint.probe import (
    Effect,
    Outputs,
    ProbeComparison,
    along,
    ask,
    compare_answers,
    effect_of,
)
from lamina.checkpoint.record import Answers, Lamina, Probe
from lamina.engine.fold import as_base
from lamina.engine.names import adapted_layers
from lamina.errors import FoldError
from lamina.model import PeftModel


@dataclass(frozen=True)
class Answered:
    """What base and adapter answered here.

    Attributes:
        base: the base alone; None if it couldn't be asked.
        chain: base and adapter; None if they couldn't be asked together.
    """

    base: Outputs | None
    chain: Outputs | None


@dataclass(frozen=True)
class Judgement:
    """What was answered here, beside the record.

    Attributes:
        base: the base alone; None where one of the two isn't known.
        chain: base and adapter, likewise.
        effect: how much of the adapter's recorded effect is there.
        early: how much of it the base alone has already.
    """

    base: ProbeComparison | None = None
    chain: ProbeComparison | None = None
    effect: Effect | None = None
    early: Effect | None = None

    @property
    def base_passed(self) -> bool:
        """Whether nothing is known against the base."""
        if self.base is not None and not self.base.passed:
            return False
        return self.early is None or self.early.is_none

    @property
    def passed(self) -> bool:
        """Whether base and adapter together answer as they should."""
        if self.chain is None or not self.chain.passed:
            return False
        return (self.effect is None or self.effect.passed) and (
            self.early is None or self.early.is_none
        )


def ask_both(model: PeftModel, tokens: Sequence[int] | None) -> Answered:
    """Ask a model, and its base alone.

    Raises:
        ProbeError: it can't be asked.
    """
    chain = ask(model, tokens)
    if chain is None:
        return Answered(None, None)
    try:
        with as_base(model.get_base_model(), model.adapter_state):
            return Answered(ask(model, chain.tokens), chain)
    except FoldError:
        return Answered(None, chain)


def compared(probe: Probe, recorded: Answers, actual: Outputs) -> ProbeComparison:
    """Recorded answers beside those here, by the tolerance for what both were computed in."""
    return compare_answers(recorded, actual, dtype=probe.dtype, quantization=probe.quantization)


def judge(probe: Probe, answered: Answered) -> Judgement:
    """Compare what was answered here with the record."""
    base, chain, recorded = answered.base, answered.chain, probe.base
    effect = None
    if chain is not None and base is not None and chain.is_finite and base.is_finite:
        effect = effect_of(probe.chain, base, chain, recorded_base=probe.base)
    return Judgement(
        base=None if recorded is None or base is None else compared(probe, recorded, base),
        chain=None if chain is None else compared(probe, probe.chain, chain),
        effect=effect,
        early=None if recorded is None or base is None else along(probe.chain, recorded, base),
    )


@contextmanager
@torch.no_grad()
def scaled(
    model: PeftModel, adapter: str, laminae: Sequence[Lamina], factors: Mapping[int, float]
) -> Iterator[None]:
    """Multiply the update of some laminae for a while, by their index.

    Afterwards the weights are what they were, bit for bit.
    """
    alike = {factors.get(index, 1.0) for index in range(len(laminae))}
    kept = []
    for module, layer in adapted_layers(model.get_base_model()):
        here = layer.tensors(adapter) if adapter in layer.records else {}
        for leaf, tensor in here.items():
            if leaf not in (*B_LEAVES, "lora_B.bias"):
                continue
            kept.append((tensor, tensor.detach().clone()))
            if leaf == "lora_B.bias" or len(alike) == 1:
                # A bias is the sum of all laminae's: it can't be told apart.
                tensor.mul_(min(alike) if len(alike) == 1 else 1.0)
                continue
            at = 0
            for index, lamina in enumerate(laminae):
                rank = lamina.ranks.get(module, 0)
                tensor.narrow(1, at, rank).mul_(factors.get(index, 1.0))
                at += rank
    try:
        yield
    finally:
        for tensor, before in kept:
            tensor.copy_(before)
