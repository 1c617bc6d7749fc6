"""A stage to begin on, and how a refusal is looked at."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lamina.errors import (
    LaminaError,
)
from lamina.stages import begin_stage
from tests import models
from tests.stages.chains import (
    Snapshot,
)


def named(name: str = "someone/tiny", **changes: Any) -> nn.Module:
    model = models.tiny_llama(**changes)
    model.name_or_path = name
    return model


def refused(base: nn.Module, kind: type[LaminaError], **call: Any) -> LaminaError:
    """The error of a call, after seeing that the base is what it was."""
    # Some may train already: that too is to stay.
    next(base.parameters()).requires_grad_(False)
    before = Snapshot(base)
    with pytest.raises(kind) as caught:
        begin_stage(base, **call)
    before.check()
    return caught.value
