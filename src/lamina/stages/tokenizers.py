"""The tokenizer of a stage: what a record says of it, and how another one differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lamina.checkpoint.record import Base, StageRecord
from lamina.errors import StageError


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The entries of a record's `Base` that are of a tokenizer.

    Raises:
        StageError: it has no vocabulary.
    """
    vocabulary = _vocabulary(tokenizer)
    return {
        "tokenizer": _digest(vocabulary),
        "tokenizer_size": _size(vocabulary),
        "chat_template": _template_digest(tokenizer),
    }


def tokenizer_digest(tokenizer: Any, size: int | None = None) -> str:
    """SHA-256 of a tokenizer's vocabulary: its tokens and their ids, those below `size`.

    Raises:
        StageError: it has no vocabulary.
    """
    return _digest(_vocabulary(tokenizer), size)


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    get = getattr(tokenizer, "get_vocab", None)
    if not callable(get):
        raise StageError(
            f"A {type(tokenizer).__name__} was given where a tokenizer is wanted.",
            cure="give the tokenizer itself: AutoTokenizer.from_pretrained(...)",
        )
    vocabulary: Mapping[str, int] = get()
    return vocabulary


def _size(vocabulary: Mapping[str, int]) -> int:
    return max(vocabulary.values(), default=-1) + 1


def _digest(vocabulary: Mapping[str, int], size: int | None = None) -> str:
    known = sorted((t, i) for t, i in vocabulary.items() if size is None or i < size)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _template_digest(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_tokenizer(record: StageRecord | None) -> Base | None:
    """The base of the newest stage of which the tokenizer is known."""
    stages = record.stages if record else ()
    return next((s.base for s in reversed(stages) if s.base.tokenizer is not None), None)


def tokenizer_faults(recorded: Base | None, tokenizer: Any) -> list[str]:
    """What makes a tokenizer another one: known tokens that are gone, or have other ids."""
    if recorded is None or tokenizer is None:
        return []
    vocabulary, known = _vocabulary(tokenizer), recorded.tokenizer_size
    if _digest(vocabulary, known) == recorded.tokenizer:
        return []
    fault = "trained with a tokenizer of another vocabulary than this one's"
    size = _size(vocabulary)
    if known is not None and size < known:
        return [f"{fault}: of {known:,} ids it has {size:,}"]
    return [f"{fault}: tokens have other ids, or are others"]


def tokenizer_remarks(recorded: Base | None, tokenizer: Any) -> list[str]:
    """What else differs, and may be meant: tokens that were added, and the chat template."""
    # Records of earlier versions say too little to tell.
    if recorded is None or tokenizer is None or recorded.tokenizer_size is None:
        return []
    remarks = []
    added = _size(_vocabulary(tokenizer)) - recorded.tokenizer_size
    if added > 0:
        remarks.append(f"the tokenizer has {added:,} token(s) that it was not trained with")
    template = template_remark(recorded, tokenizer)
    return [*remarks, template] if template else remarks


def template_remark(recorded: Base | None, tokenizer: Any) -> str | None:
    """How its chat template differs; None if it doesn't, or if none can be told."""
    if recorded is None or tokenizer is None or recorded.tokenizer_size is None:
        return None
    before, now = recorded.chat_template, _template_digest(tokenizer)
    if before == now:
        return None
    words = {
        (True, True): "another chat template than the one that it was trained with",
        (False, True): "a chat template, and the one that it was trained with had none",
        (True, False): "no chat template, and the one that it was trained with had one",
    }
    return f"the tokenizer has {words[before is not None, now is not None]}"
