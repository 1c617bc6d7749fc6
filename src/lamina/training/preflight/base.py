"""Whether the base of a plan is there: its config, weights and tokenizer."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.checkpoint.structure import empty_model
from lamina.engine.targets import find_all_linear_names
from lamina.errors import DataError, LaminaError, PlanError, nearest
from lamina.storage.shards import weight_map
from lamina.training.plan import Plan
from lamina.training.plan.document import Fault
from lamina.training.run.base import load_tokenizer

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Base:
    """The base without its weights.

    Attributes:
        model: on the meta device.
        config: of its text part.
        linear: entries of the weights that "all-linear" means, which a quantiser packs.
        parameters: entries of all weights.
        quantised: the method that its config says its weights are quantised by.
        tokenizer: None if it can't be loaded.
    """

    model: nn.Module
    config: Any
    linear: int
    parameters: int
    quantised: str | None
    tokenizer: Any

    def empty(self, head: str) -> nn.Module:
        """The model that a method with this head trains, anew, on the meta device.

        Raises:
            LaminaError: transformers has no reward model of this kind.
        """
        return copy.deepcopy(self.model) if head == "language" else _with_score(self.model)

    def matching(self, names: list[str]) -> int:
        """Entries of all parameters in modules by these names or ends of names."""
        hit: dict[int, int] = {}
        for path, module in self.model.named_modules():
            if any(path == name or path.endswith(f".{name}") for name in names):
                hit |= {id(each): each.numel() for each in module.parameters()}
        return sum(hit.values())


def open_base(plan: Plan, root: Path) -> tuple[Base | None, list[Fault]]:
    """Look at the base and its tokenizer; nothing is loaded but the config and the tokenizer.

    Args:
        plan: with its base as it is found from anywhere, see `plan.located`.
        root: the folder of its file.
    """
    faults: list[Fault] = []
    name = plan.model_name_or_path
    model = None
    try:
        _refuse_missing(name)
        model = empty_model(
            name, revision=plan.model_revision, trust_remote_code=plan.trust_remote_code
        )
    except LaminaError as error:
        faults.append((("model_name_or_path",), f"{error.what}{_nearest(name, root)}"))
    tokenizer = None
    # Without a base there is no tokenizer either; that is one fault.
    if model is not None or plan.tokenizer_name_or_path:
        where = "tokenizer_name_or_path" if plan.tokenizer_name_or_path else "model_name_or_path"
        try:
            _refuse_missing(plan.tokenizer_name_or_path or name)
            tokenizer = load_tokenizer(plan, root)
        except DataError as error:
            faults.append((("chat_template",), error.what.removeprefix("chat_template: ")))
        except LaminaError as error:
            faults.append(((where,), error.what))
    if model is None:
        return None, faults
    faults += [(("model_name_or_path",), told) for told in _without_weights(plan)]
    faults += _of_loading(plan, model)
    return _described(model, tokenizer), faults


def _of_loading(plan: Plan, model: Any) -> Iterator[Fault]:
    """How the plan wants the weights kept and computed with, where that can't be."""
    quantised = getattr(model.config, "quantization_config", None) is not None
    for key in ("load_in_4bit", "load_in_8bit"):
        if not getattr(plan, key):
            continue
        if quantised:
            yield (key,), "the base's weights are quantised already"
        elif importlib.util.find_spec("bitsandbytes") is None:
            yield (key,), "needs bitsandbytes: pip install bitsandbytes"
    asked = plan.attn_implementation
    if asked is None:
        return
    if asked == "flex_attention" and not torch.cuda.is_available():
        yield ("attn_implementation",), "flex_attention can't be trained through on a CPU"
    try:
        with torch.device("meta"):
            type(model)._from_config(copy.deepcopy(model.config), attn_implementation=asked)
    except (ImportError, ValueError) as error:
        lines = str(error).splitlines()
        yield ("attn_implementation",), lines[0] if lines else f"{asked!r} can't be used"


def _with_score(model: Any) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            made: nn.Module = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise LaminaError(
            "a reward model can't be trained on this base: transformers has no "
            f"{config.model_type} that gives one number"
        ) from error
    return made


def _refuse_missing(name: str) -> None:
    """Don't ask the hub for what can only be a folder.

    Raises:
        PlanError: it is a path, and no folder is there.
    """
    path = Path(name).expanduser()
    spelled = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if spelled and not path.is_dir():
        raise PlanError(f"There is no folder '{name}'")


def _described(model: Any, tokenizer: Any) -> Base:
    names = set(find_all_linear_names(model))
    linear = sum(
        each.weight.numel()
        for path, each in model.named_modules()
        if path.rpartition(".")[2] in names and hasattr(each, "weight")
    )
    quantisation = getattr(model.config, "quantization_config", None)
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    return Base(
        model=model,
        config=model.config.get_text_config(),
        linear=linear,
        parameters=sum(each.numel() for each in model.parameters()),
        quantised=None if quantisation is None else str(method or "quantised"),
        tokenizer=tokenizer,
    )


def _nearest(name: str, root: Path) -> str:
    """What lies near a name that isn't there, if it is a path."""
    path = Path(name).expanduser()
    for folder in dict.fromkeys((root / path.parent, path.parent)):
        models = [each.parent.name for each in folder.glob("*/config.json")]
        close = nearest(path.name, models)
        if close and path.name != close[0]:
            return f"; did you mean '{path.parent / close[0]}'?"
    return ""


def _without_weights(plan: Plan) -> Iterator[str]:
    folder = Path(plan.model_name_or_path).expanduser()
    if not folder.is_dir():
        return
    if (folder / _INDEX).is_file():
        try:
            shards = set(weight_map(folder / _INDEX, str(folder)).values())
        except LaminaError as error:
            yield error.what
            return
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            yield f"{len(missing)} of its {len(shards)} files of weights aren't there: {missing[0]}"
    elif not any((folder / name).is_file() for name in _WEIGHTS):
        yield f"'{folder}' has no weights: {_WEIGHTS[0]} is not there"
