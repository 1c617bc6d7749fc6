"""Every variant x layer x dtype, beside the real peft: what is compared, and what came out.

A cell begins with an adapter that one library has filled with random numbers and saved, and the
other opens: so the weights are identical, and the file has been exchanged.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lamina
from tests import models
from tests.parity.pairs import answer, gradients, trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative to the largest number. In bf16 a base's output and each step after it is rounded, to
# 2**-9 of itself; the two add in another order at some places.
TOLERANCE = {"fp32": 2e-5, "bf16": 4e-2}
DIRECTIONS = ("peft to Lamina", "Lamina to peft")


class Experts(nn.Module):
    """Three experts in one parameter, each token sent through all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ti,eio->to", x, self.up)


class Mixture(nn.Module):
    """Experts behind a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x))


class Attention(nn.Module):
    """`nn.MultiheadAttention`, attending to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def _made(kind: type[nn.Module]) -> nn.Module:
    with models.seeded(0):
        return nn.ModuleDict({"inner": kind()})["inner"]


def _image(dimensions: int) -> Tensor:
    return torch.linspace(-2, 2, 6 * 8**dimensions).reshape(2, 3, *[8] * dimensions).sin()


@dataclass(frozen=True)
class Layer:
    """A kind of layer: a model that has it, what to target, and an input."""

    make: Callable[[], nn.Module]
    targets: dict[str, Any]
    x: Tensor


_CONVS = {"target_modules": ["stem", "strided"]}
LAYERS = {
    "Linear": Layer(
        models.perceptron,
        {"target_modules": ["up", "down"]},
        torch.linspace(-1, 1, 48).reshape(3, 16),
    ),
    "Linear (llama)": Layer(
        models.tiny_llama, {"target_modules": ["q_proj", "up_proj"]}, models.token_ids()
    ),
    "Conv1D (gpt2)": Layer(
        models.tiny_gpt2,
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
        models.token_ids(),
    ),
    "Embedding": Layer(models.embedding_net, {"target_modules": ["embed"]}, models.token_ids()),
    "Conv1d": Layer(partial(models.convolution_net, 1), _CONVS, _image(1)),
    "Conv2d": Layer(partial(models.convolution_net, 2), _CONVS, _image(2)),
    "Conv3d": Layer(partial(models.convolution_net, 3), _CONVS, _image(3)),
    "MultiheadAttention": Layer(
        partial(_made, Attention),
        {"target_modules": ["attention"]},
        torch.linspace(-1, 1, 2 * 5 * 16).reshape(2, 5, 16).sin(),
    ),
    "experts (3-D parameter)": Layer(
        partial(_made, Mixture),
        {"target_modules": [], "target_parameters": ["experts.up"]},
        torch.linspace(-1, 1, 4 * 16).reshape(4, 16).sin(),
    ),
}
_INVOCATION = [3, 4]
# variant -> what its config has; a function of the library where there are settings.
VARIANTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "LoRA": lambda lib: {},
    "rsLoRA": lambda lib: {"use_rslora": True},
    "lora_bias": lambda lib: {"lora_bias": True},
    "DoRA": lambda lib: {"use_dora": True},
    "aLoRA": lambda lib: {"alora_invocation_tokens": _INVOCATION, "task_type": "CAUSAL_LM"},
    "PiSSA": lambda lib: {"init_lora_weights": "pissa"},
    "OLoRA": lambda lib: {"init_lora_weights": "olora"},
    "orthogonal": lambda lib: {"init_lora_weights": "orthogonal"},
    "MiCA": lambda lib: {"init_lora_weights": "mica"},
    "VeLoRA": lambda lib: {"velora_config": lib.VeloraConfig(num_groups=4, init_type="random")},
    "BD-LoRA": lambda lib: {
        "use_bdlora": _bd(lib)(
            target_modules_bd_a=["up", "q_proj"],
            target_modules_bd_b=["down"],
            nblocks=2,
            match_strict=False,
        )
    },
    "KaSA": lambda lib: {"kasa_config": lib.KasaConfig()},
    "MonteCLoRA": lambda lib: {"monteclora_config": lib.MontecloraConfig(num_samples=2)},
    "AdaLoRA": lambda lib: {"init_r": 4, "target_r": 2, "total_step": 10},
    "several adapters": lambda lib: {},
}


def _bd(lib: Any) -> Any:
    return lib.BdLoraConfig if hasattr(lib, "BdLoraConfig") else lib.tuners.lora.BdLoraConfig


@dataclass(frozen=True)
class Cell:
    """One entry: a variant on a layer in a dtype, by one direction of the file."""

    variant: str
    layer: str
    dtype: str
    direction: str

    def __str__(self) -> str:
        return "-".join((self.variant, self.layer, self.dtype, self.direction)).replace(" ", "_")


CELLS = [
    Cell(variant, layer, dtype, direction)
    for variant in VARIANTS
    for layer in LAYERS
    for dtype in DTYPES
    for direction in DIRECTIONS
]


# Where Lamina differs from peft 0.21.2 on purpose, and why: (variant, layer, dtype) -> reason.
_HALVED = (
    "peft computes half of the gradient of the output projection's factors, and none for all but "
    "the last of several adapters; a finite difference agrees with Lamina"
)
_TRAINED = "peft casts its half-precision adapters anew, and trains what it froze"
DELIBERATE: dict[tuple[str, str, str], str] = {
    **{
        (variant, "MultiheadAttention", dtype): _HALVED
        for variant in ("LoRA", "rsLoRA", "several adapters")
        for dtype in DTYPES
    },
    ("MiCA", "Embedding", "bf16"): f"{_TRAINED}: B",
    **{
        ("AdaLoRA", layer, "bf16"): f"{_TRAINED}: ranknum, which is a count"
        for layer in ("Linear", "Linear (llama)", "Conv1D (gpt2)", "Conv2d")
    },
    **{
        ("OLoRA", "Conv1D (gpt2)", dtype): (
            "peft takes the weight of a Conv1D for one that is stored out x in, and makes factors "
            "that don't fit the layer"
        )
        for dtype in DTYPES
    },
    **{
        ("lora_bias", "MultiheadAttention", dtype): (
            "peft gives B a bias and never adds it; Lamina refuses"
        )
        for dtype in DTYPES
    },
}


@dataclass(frozen=True)
class Outcome:
    """What came out of a cell.

    Attributes:
        peft: what the real peft says if it refuses the combination, else None.
        lamina: likewise.
        outputs: largest difference of the outputs, relative to the largest output.
        gradients: likewise of any parameter's gradient.
        moved: how far the adapter moves the outputs, likewise; 0 would prove nothing.
    """

    peft: str | None
    lamina: str | None
    outputs: float = 0.0
    gradients: float = 0.0
    moved: float = 1.0

    def verdict(self, cell: Cell) -> str:
        """What the table says of it."""
        if (cell.variant, cell.layer, cell.dtype) in DELIBERATE:
            return "deliberate" if self.outputs <= TOLERANCE[cell.dtype] else "differs"
        if self.peft and self.lamina:
            return "both refuse"
        if self.peft or self.lamina:
            return "Lamina only" if self.peft else "peft only"
        limit = TOLERANCE[cell.dtype]
        equal = self.outputs <= limit and self.gradients <= limit and self.moved > 10 * self.outputs
        return "equal" if equal else "differs"


def run(cell: Cell, directory: Path) -> Outcome:
    """Build, exchange and compare."""
    layer = LAYERS[cell.layer]
    base = layer.make().to(DTYPES[cell.dtype])
    refusals = {lib: _refusal(lib, base, cell) for lib in (peft, lamina)}
    if any(refusals.values()) or not exchangeable(cell):
        return Outcome(refusals[peft], refusals[lamina])
    first, second = (peft, lamina) if cell.direction == DIRECTIONS[0] else (lamina, peft)
    source = _adapted(first, base, cell)
    _fill(source)
    with _quiet():
        source.save_pretrained(str(directory))
    opened = _opened(second, base, cell, directory)
    x = layer.x.to(DTYPES[cell.dtype]) if layer.x.is_floating_point() else layer.x.clone()
    if cell.variant == "aLoRA":
        # It has to be invoked somewhere.
        x[:, 2:4] = torch.tensor(_INVOCATION)
    # A saved file of Lamina's stands on the original base, whatever began the adapter.
    ours, theirs = (opened, source) if second is lamina else (source, opened)
    with torch.no_grad():
        mine, other, plain = (answer(m.eval(), x) for m in (ours, theirs, base))
    return Outcome(
        None,
        None,
        outputs=_apart(mine, other),
        gradients=_gradients_apart(ours, theirs, x),
        moved=_apart(plain, other),
    )


def exchangeable(cell: Cell) -> bool:
    """Whether a file of one library can be opened by the other at all."""
    return (cell.variant, cell.layer) != ("OLoRA", "Conv1D (gpt2)")


def _config(lib: Any, cell: Cell) -> Any:
    kind = lib.AdaLoraConfig if cell.variant == "AdaLoRA" else lib.LoraConfig
    targets = dict(LAYERS[cell.layer].targets)
    settings = {"lora_alpha": 6, **targets, **VARIANTS[cell.variant](lib)}
    if kind is lib.LoraConfig:
        settings.setdefault("r", 4)
    return kind(**settings)


def _adapted(lib: Any, base: nn.Module, cell: Cell) -> Any:
    with _quiet(), models.seeded(3):
        model = lib.get_peft_model(copy.deepcopy(base), _config(lib, cell))
        if cell.variant == "several adapters":
            model.add_adapter("second", _config(lib, cell))
            _activate(lib, model, ["default", "second"])
    return model.eval()


def _opened(lib: Any, base: nn.Module, cell: Cell, directory: Path) -> Any:
    with _quiet():
        model = lib.PeftModel.from_pretrained(
            copy.deepcopy(base), str(directory), is_trainable=True
        )
        if cell.variant == "several adapters":
            model.load_adapter(str(directory / "second"), "second", is_trainable=True)
            _activate(lib, model, ["default", "second"])
    return model.eval()


def _activate(lib: Any, model: Any, names: list[str]) -> None:
    if lib is lamina:
        model.set_adapter(names, train=names)
    else:
        model.base_model.set_adapter(names)


def _refusal(lib: Any, base: nn.Module, cell: Cell) -> str | None:
    try:
        model = _adapted(lib, base, cell)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
        # peft says no to some of them by failing somewhere.
        if lib is lamina and not isinstance(error, lamina.LaminaError):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if trained(model) else "nothing is adapted"


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    with models.seeded(5):
        for name, parameter in sorted(trained(model).items()):
            if "sampler" not in name and "ranknum" not in name:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.2)


def _apart(first: Tensor, second: Tensor) -> float:
    difference = (first.double() - second.double()).abs().max()
    return float(difference / second.double().abs().max().clamp(min=1e-12))


def _gradients_apart(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    mine, other = gradients(ours, x), gradients(theirs, x)
    mine, other = (
        {n: g for n, g in found.items() if "sampler" not in n} for found in (mine, other)
    )
    if mine.keys() != other.keys():
        return float("inf")
    if any(mine[name].shape != gradient.shape for name, gradient in other.items()):
        # The same update in more ranks, as it stands on the original base.
        return 0.0
    largest = max(float(g.double().abs().max()) for g in other.values())
    return max(
        float((mine[n].double() - g.double()).abs().max()) / largest for n, g in other.items()
    )


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
