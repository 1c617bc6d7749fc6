"""Parts of models by peft's names: wrappers of saved modules, devices, submodules."""

from __future__ import annotations

from typing import Any

from torch import nn

from lamina.engine.layers import ModulesToSaveWrapper
from lamina.interop.peft.standing import StandsFor


class AuxiliaryTrainingWrapper(nn.Module, metaclass=StandsFor):
    """The base of what is trained beside the adapted layers."""

    native: Any = ModulesToSaveWrapper


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A layer some of whose tokens are trained."""

    native: Any = ()
