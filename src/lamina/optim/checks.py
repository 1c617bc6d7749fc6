"""What an optimizer is asked for is checked as a whole, before anything changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lamina.errors import OptimizerError


def refuse(maker: str, faults: Sequence[str], cure: str | None = None) -> None:
    """Raise one error that lists all faults; nothing where there are none."""
    if faults:
        raise OptimizerError(
            f"{maker} can't make an optimizer as asked.",
            faults=faults,
            cure=cure or f"help(lamina.{maker}) says what it takes",
        )


def check_number(
    name: str, value: object, *, above: float = 0.0, included: bool = True, below: float = math.inf
) -> list[str]:
    """The fault of a setting that is no finite number from `above` to, without it, `below`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (above < value < below or (included and value == above)):  # type: ignore[operator]
        return []
    least = "at least" if included else "more than"
    most = "" if below == math.inf else f" and less than {below:g}"
    return [f"{name} is {value!r}; it has to be a finite number, {least} {above:g}{most}"]


def check_class(optimizer_cls: object) -> list[str]:
    """The fault of what is no class of optimizers."""
    if isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer):
        return []
    return [f"optimizer_cls is {optimizer_cls!r}; it has to be a subclass of torch.optim.Optimizer"]


def check_trainable(model: nn.Module) -> list[str]:
    """The fault of a model in which nothing trains."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return []
    return ["no parameter of the model asks for a gradient: see lamina.preflight(model)"]
