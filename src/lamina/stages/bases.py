"""A base model, described for the record and compared with what a record says."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from torch import nn

from lamina.checkpoint.record import Base
from lamina.checkpoint.sketch import Likeness
from lamina.checkpoint.sketch.memory import sketch_model
from lamina.engine.layers import is_linear
from lamina.engine.layers.linear import linear_shape
from lamina.engine.names import places
from lamina.engine.trainability import adapter_parameters, count_parameters
from lamina.engine.weights import BaseWeight, weight_of

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
        sketch=sketch_model(model),
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


def base_faults(recorded: Base, actual: Base, likeness: Likeness | None = None) -> list[str]:
    """How the base at hand differs from the one on record, where an adapter doesn't belong on it.

    Where weights could be compared, they decide: the same weights in another folder are the same
    base. Else its name, its vocabulary, and the names and shapes of its weights do.
    """
    names = _name_faults(recorded, actual)
    vocabulary = _vocabulary_faults(recorded, actual)
    if likeness is not None and likeness.verdict != "unknown":
        if likeness.ok:
            return []
        return [likeness.sentence, *(vocabulary if likeness.verdict == "other" else ())]
    if not vocabulary and _differ(recorded.shapes, actual.shapes):
        return [*names, _shapes_fault(recorded, actual)]
    return [*names, *vocabulary]


def _shapes_fault(recorded: Base, actual: Base) -> str:
    return (
        f"trained on a {recorded.model_class} of {recorded.parameters:,d} parameters, this base is "
        f"a {actual.model_class} of {actual.parameters:,d}: names or shapes differ"
    )


def base_remarks(likeness: Likeness | None) -> list[str]:
    """How it differs where an adapter does belong on it."""
    apart = likeness is not None and likeness.ok and likeness.verdict not in ("same", "unknown")
    return [likeness.sentence] if apart and likeness is not None else []


def _name_faults(recorded: Base, actual: Base) -> list[str]:
    if not _differ(_last(recorded.name_or_path), _last(actual.name_or_path)):
        return []
    return [f"trained on {recorded.name_or_path!r}, this base is {actual.name_or_path!r}"]


def _vocabulary_faults(recorded: Base, actual: Base) -> list[str]:
    if not _differ(recorded.vocab_size, actual.vocab_size):
        return []
    return [
        f"trained with a vocabulary of {recorded.vocab_size}, this base has {actual.vocab_size}"
    ]


def _differ(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other


def _last(name: str | None) -> str | None:
    # The same model may lie in another folder; its own folder's name stays.
    if not name:
        return None
    cached = _CACHED.search(name)
    return cached[1] if cached else PurePath(name).name or None
