"""A base model, described for the record and compared with what a record says."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from torch import nn

from lamina.checkpoint.record import Base
from lamina.engine.layers import is_linear
from lamina.engine.layers.linear import linear_shape
from lamina.engine.names import places
from lamina.engine.trainability import adapter_parameters, count_parameters
from lamina.engine.weights import BaseWeight, weight_of
from lamina.errors import StageError

# How the hub's cache spells `owner/name`.
_CACHED = re.compile(r"models--(?:[^/\\]+--)?([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")


def describe_base(model: nn.Module) -> Base:
    """What a record says of a base model, adapted by now or not."""
    config: Any = getattr(model, "config", None)
    views = [
        weight_of(place.original)
        for place in places(model)
        if place.original._parameters.get("weight") is not None or is_linear(place.original)
    ]
    # Where all is quantised, what it is computed in.
    plain = [view.dtype for view in views if view.quantised is None]
    dense = [dtype for dtype in plain if dtype.is_floating_point]
    dtypes = Counter(dense or [view.value_dtype for view in views])
    embedding = _input_embedding(model)
    own = sum(parameter.numel() for _, parameter in adapter_parameters(model))
    return Base(
        name_or_path=getattr(model, "name_or_path", None) or None,
        revision=getattr(config, "_commit_hash", None),
        model_class=type(model).__name__,
        dtype=str(dtypes.most_common(1)[0][0]).removeprefix("torch.") if dtypes else None,
        quantization=_quantization(config, views),
        vocab_size=getattr(embedding, "num_embeddings", None),
        parameters=count_parameters(model)[1] - own,
        shapes=shapes_digest(model),
    )


def _quantization(config: Any, views: Sequence[BaseWeight]) -> str | None:
    """What most quantised weights say of themselves; else the method that the config names."""
    said = Counter(view.quantised for view in views if view.quantised is not None)
    if said:
        return said.most_common(1)[0][0]
    settings = getattr(config, "quantization_config", None)
    known = settings if isinstance(settings, dict) else vars(settings or object)
    method = known.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _input_embedding(model: nn.Module) -> Any:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except NotImplementedError:
        return None


def shapes_digest(model: nn.Module) -> str:
    """SHA-256 of the sorted names and shapes of a model's weights, as they are unquantised.

    The same for a plain and an adapted model, and for one loaded dense or quantised.
    """
    lines = set()
    for place in places(model):
        module = place.original
        if is_linear(module):
            n_in, n_out = linear_shape(module)
            lines.add(f"{place.name} {n_out}x{n_in}")
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            lines.add(f"{place.name}.{leaf} {'x'.join(map(str, parameter.shape))}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary: its tokens and their ids.

    Raises:
        StageError: it has no vocabulary.
    """
    get = getattr(tokenizer, "get_vocab", None)
    if not callable(get):
        raise StageError(
            f"A {type(tokenizer).__name__} was given where a tokenizer is wanted.",
            cure="give the tokenizer itself: AutoTokenizer.from_pretrained(...)",
        )
    return hashlib.sha256(json.dumps(sorted(get().items())).encode()).hexdigest()


def base_faults(recorded: Base, actual: Base) -> list[str]:
    """How the base at hand differs from the one on record, by name, class and shapes."""
    faults = []
    if _differ(_last(recorded.name_or_path), _last(actual.name_or_path)):
        faults.append(f"trained on {recorded.name_or_path!r}, this base is {actual.name_or_path!r}")
    if _differ(recorded.vocab_size, actual.vocab_size):
        faults.append(
            f"trained with a vocabulary of {recorded.vocab_size}, this base has {actual.vocab_size}"
        )
    elif _differ(recorded.shapes, actual.shapes):
        faults.append(
            f"trained on a {recorded.model_class} of {recorded.parameters:,d} parameters, this "
            f"base is a {actual.model_class} of {actual.parameters:,d}: names or shapes differ"
        )
    return faults


def _differ(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other


def _last(name: str | None) -> str | None:
    # The same model may lie in another folder; its own folder's name stays.
    if not name:
        return None
    cached = _CACHED.search(name)
    return cached[1] if cached else PurePath(name).name or None
