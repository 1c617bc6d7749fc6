"""Save an adapter folded into its base, as an ordinary model, and compare what the file answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.errors import CheckpointError
from lamina.model.merging import Target, check_target
from lamina.stages.bases import describe_base
from lamina.stages.load import load
from lamina.storage.atomic import ADAPTER_FILES, atomic_directory

# What a saved model consists of; of an older one in the same place nothing may survive.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_LENGTH = 16


@dataclass(frozen=True)
class MergeReport:
    """What was saved.

    Attributes:
        path: the directory.
        model_class: of the saved model.
        dtype: of its weights.
        parameters: entries of its weights.
        files: name -> bytes.
        tokenizer: where its tokenizer came from; None without one.
        max_logit_difference: the largest difference between the answers of the model re-opened
            from the disk and those of base and adapter, on a fixed sequence of tokens; None for a
            model that doesn't take tokens.
        max_logit: the largest magnitude among those answers, to compare with.
    """

    path: str
    model_class: str
    dtype: str
    parameters: int
    files: dict[str, int]
    tokenizer: str | None
    max_logit_difference: float | None
    max_logit: float | None


def save_merged(
    path: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    target: Target | None = None,
    force: bool = False,
    **options: Any,
) -> MergeReport:
    """Fold an adapter into its base, save the result, re-open it and compare its answers.

    The sum is made in fp32 and rounded once, to `dtype`. A crash, or a file that can't be opened
    again, leaves at `out` what was there.

    Args:
        path: the adapter's directory or hub id.
        out: the directory for the model.
        base: the base's path or hub id; None takes the one on record.
        dtype: of the saved weights; None keeps the base's.
        target: what a base that is stored quantised becomes: "quantized" rounds the sums to its
            codes again, "dequantized" makes it dense.
        force: save into a directory that has files already.
        options: see `lamina.load`.

    Raises:
        CheckpointError: `out` has files already, or is where the adapter or the base lies.
        StageError: the base is not the one that the adapter was trained on.
        FoldError: the base can't be written, or is quantised and no target is given, or the sum
            has NaN or infinity.
        ConfigError: `target` is unknown, or there is a `dtype` for codes.
    """
    check_target(target, dtype if target == "quantized" else None)
    place = Path(out).expanduser()
    _refuse_sources(place, [str(path), base or ""])
    _refuse_occupied(place, force)
    model = load(path, base, **{"dtype": "auto", **options})
    source = str(getattr(model.get_base_model(), "name_or_path", "") or "")
    _refuse_sources(place, [source])
    described = describe_base(model.get_base_model())
    kept: torch.dtype = getattr(torch, described.dtype or "float32")
    quantised = described.quantization is not None
    if dtype is not None and not quantised:
        # Widening is exact, so that the only rounding is the one to `dtype`.
        model.to(torch.promote_types(kept, dtype))
    expected = answers(model)
    merged: Any = model.merge_and_unload(
        safe_merge=True, target=target, dtype=dtype if target == "dequantized" else None
    )
    if not quantised or target == "dequantized":
        merged = merged.to(dtype or kept)
    kind, parameters = type(merged), sum(p.numel() for p in merged.parameters())
    with atomic_directory(place, owned=(*ADAPTER_FILES, *_MODEL_FILES)) as staging:
        merged.save_pretrained(staging)
        tokenizer = _save_tokenizer([str(path), source], staging)
        del merged, model
        actual = answers(kind.from_pretrained(staging, dtype="auto").eval())
        files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    return MergeReport(
        path=str(place),
        model_class=kind.__name__,
        dtype=str(dtype or kept).removeprefix("torch."),
        parameters=parameters,
        files=files,
        tokenizer=tokenizer,
        max_logit_difference=_largest(expected, actual),
        max_logit=None if expected is None else float(expected.abs().max()),
    )


@torch.no_grad()
def answers(model: Any) -> torch.Tensor | None:
    """The fp32 logits, or hidden states, on a fixed sequence of tokens; None if it takes none."""
    embedding = _input_embedding(model)
    if embedding is None:
        return None
    count = min(_LENGTH, embedding.num_embeddings)
    ids = (torch.arange(count) * 7919 + 11) % embedding.num_embeddings
    inputs = {"input_ids": ids[None].to(embedding.weight.device)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    given = model(**inputs)
    logits = given["logits"] if "logits" in given else given[0]
    return torch.as_tensor(logits).float().cpu()


def _input_embedding(model: Any) -> nn.Embedding | None:
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    embedding = getattr(embedding, "base_layer", embedding)
    return embedding if isinstance(embedding, nn.Embedding) else None


def _largest(expected: torch.Tensor | None, actual: torch.Tensor | None) -> float | None:
    if expected is None or actual is None:
        return None
    return float((expected - actual).abs().max())


def _refuse_occupied(target: Path, force: bool) -> None:
    if force or not target.is_dir():
        return
    names = sorted(entry.name for entry in target.iterdir())
    if names:
        raise CheckpointError(
            f"'{target}' is not empty.",
            faults=[f"it has '{name}'" for name in names[:6]],
            cure="save to another directory, or pass force=True (--force) to replace the model",
        )


def _refuse_sources(target: Path, sources: Sequence[str]) -> None:
    for source in sources:
        place = Path(source).expanduser()
        if source and place.is_dir() and target.is_dir() and place.samefile(target):
            raise CheckpointError(
                f"'{target}' is where the adapter or its base lies; it would be overwritten.",
                cure="save to another directory",
            )


def _save_tokenizer(sources: Sequence[str], target: Path) -> str | None:
    """Save the tokenizer that lies with the adapter, else the base's; where it came from."""
    from transformers import AutoTokenizer

    for source in sources:
        place = Path(source).expanduser()
        local = place.is_dir()
        if not source or (local and not any((place / f).exists() for f in _TOKENIZER_FILES)):
            continue
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(target)
        except (OSError, ValueError, ImportError):
            # An adapter on the hub rarely has one, and a model may do without.
            continue
        return source
    return None
