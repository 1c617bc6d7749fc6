"""Models to ask, and their answers."""

from __future__ import annotations

from torch import nn

from lamina.checkpoint.probe import (
    Outputs,
    ask,
)

TOKENS = (11, 58, 41, 24, 7, 54, 37, 20, 3, 50, 33, 16, 63, 46, 29, 12)


def asked(model: nn.Module) -> Outputs:
    found = ask(model)
    assert found is not None
    return found
