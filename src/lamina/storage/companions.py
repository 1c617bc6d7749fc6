"""Files that lie with an adapter and belong to it: the tokenizer's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# What transformers writes with `tokenizer.save_pretrained`.
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def copy_tokenizer(source: str | os.PathLike[str], target: Path) -> tuple[str, ...]:
    """Copy the tokenizer's files that lie in a local directory; their names.

    Args:
        source: the directory; a hub id has none.
        target: a directory that is there.
    """
    folder = Path(source).expanduser()
    found = [name for name in _TOKENIZER if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, target / name)
    return tuple(found)
