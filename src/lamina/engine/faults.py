"""How a plan's faults are told: what was hit or missed, what is nearest, what mends it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.names import suffixes
from lamina.errors import InitialisationError, TargetError, UnsupportedTargetError, nearest

_SHOWN = 8
_FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}


def unsupported(name: str, module: nn.Module, pattern: str, in_attention: bool) -> str:
    """One line on a module that a pattern hit and that can't be adapted."""
    kind = type(module).__name__
    hit = f"{name} ({kind}), hit by {pattern!r}"
    if isinstance(module, (nn.Dropout, nn.AlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
        return f"{hit}, has no weights to adapt; the dropout of LoRA itself is lora_dropout"
    if in_attention:
        return f"{hit}, is read by nn.MultiheadAttention behind the back of any layer around it"
    if next(module.parameters(), None) is None:
        return f"{hit}, has no weights to adapt"
    if next(module.children(), None) is not None:
        return f"{hit}, is a container; name the layers in it"
    return f"{hit}, is no linear, embedding or convolution layer"


def silent_patterns(field: str, patterns: Sequence[str], names: Collection[str]) -> list[str]:
    """A line for each pattern that matched nothing."""
    endings = {ending for name in names for ending in suffixes(name)} if patterns else set()
    # To find what is nearest takes a while each time.
    return [
        f"{field}: {p!r} matched 0 modules{_hint(p, endings, look=i < _SHOWN)}"
        for i, p in enumerate(patterns)
    ]


def _hint(pattern: str, endings: set[str], *, look: bool) -> str:
    if pattern in endings:
        return "; there are modules of that name, but none that this adapter adapts"
    close = nearest(pattern, endings) if look else []
    return f"; nearest: {close[0]!r}" if close else ""


def plan_error(
    faults: list[str], unsupported_hits: list[str], linear: Iterable[str], config: LoraConfig
) -> TargetError:
    """The one error that lists everything."""
    shown = unsupported_hits[:_SHOWN]
    if len(unsupported_hits) > _SHOWN:
        shown.append(f"and {len(unsupported_hits) - _SHOWN} more of the same kind")
    cure = _cure(faults, bool(unsupported_hits), linear)
    if unsupported_hits:
        return UnsupportedTargetError(
            f"target_modules hits {len(unsupported_hits)} module(s) that can't be adapted.",
            faults=[*shown, *faults],
            cure=cure,
        )
    return TargetError(
        f"This {type(config).__name__} doesn't fit the model: {len(faults)} fault(s).",
        faults=faults,
        cure=cure,
    )


def _cure(faults: Iterable[str], hits: bool, linear: Iterable[str]) -> str:
    """What mends it: the field that each fault begins with, or the layers that it names."""
    fields = dict.fromkeys(re.match(r"\w*", fault)[0] for fault in faults)  # type: ignore[index]
    named = [name for name in fields if name in _FIELDS]
    ways = []
    if hits or "target_modules" in named:
        leaves = sorted({name.rpartition(".")[2] for name in linear})
        have = (
            f"the linear layers here are {leaves}" if leaves else "the model has no linear layers"
        )
        ways.append(f"choose target_modules that exist ({have}), or target_modules='all-linear'")
    others = [name for name in named if name != "target_modules"]
    if others:
        ways.append(
            f"correct {' and '.join(others)}, or leave {'it' if len(others) == 1 else 'them'} out"
        )
    if len(named) < len(fields):
        ways.append("leave layers out by exclude_modules, or change what the faults say of them")
    return "; ".join(ways)


def init_error(
    init_faults: Mapping[str, str], faults: list[str], config: LoraConfig
) -> InitialisationError:
    """The one error for layers that can't begin as asked; other faults are told along.

    Args:
        init_faults: fault -> what mends it.
        faults: everything else that is wrong.
        config: the adapter to be.
    """
    shown = list(init_faults)[:_SHOWN]
    if len(init_faults) > _SHOWN:
        shown.append(f"and {len(init_faults) - _SHOWN} more layers")
    return InitialisationError(
        f"init_lora_weights={config.init_lora_weights!r} can't begin {len(init_faults)} layer(s); "
        "nothing was changed.",
        faults=[*shown, *faults],
        cure="; ".join(dict.fromkeys(init_faults.values())),
    )
