"""Text that every Python installation has, for three stages and for the base before them.

Which module belongs to which text follows from its name alone, so a base trained under one Python
has not read the stage texts of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module

from lamina.demo.sources import (
    Module,
    bare_code,
    bare_docstrings,
    library_modules,
    stable_hash,
)
from lamina.errors import LaminaError

TRAIN_CHARS = 400_000
HELD_OUT_CHARS = 50_000
HELD_OUT_ONE_IN = 8

# In every Python from 3.10 on, and in no distributor's optional package.
STAGE_PACKAGES = frozenset(
    {
        "argparse",
        "asyncio",
        "collections",
        "concurrent",
        "configparser",
        "contextlib",
        "dataclasses",
        "difflib",
        "email",
        "enum",
        "functools",
        "http",
        "importlib",
        "inspect",
        "json",
        "logging",
        "multiprocessing",
        "pathlib",
        "shutil",
        "socketserver",
        "statistics",
        "string",
        "tempfile",
        "threading",
        "typing",
        "unittest",
        "urllib",
        "wsgiref",
        "xml",
        "xmlrpc",
        "zipfile",
    }
)
# One field, so that a model can learn from some modules what helps it with others.
CODE_PACKAGES = frozenset({"asyncio", "concurrent", "multiprocessing"})
# The stage's prose, and tables that teach nothing about language.
NEVER_READ = frozenset({"pydoc_data", "encodings", "this"})

# A document: the name that decides its part, and its text.
Document = tuple[str, str]


@dataclass(frozen=True)
class Text:
    """A kind of text in two parts that share no document and no paragraph."""

    name: str
    train: str
    held_out: str


def stage_texts() -> tuple[Text, Text, Text]:
    """The texts of the demo's stages: language reference, concurrent code, library docstrings.

    Each part is cut to `TRAIN_CHARS` and `HELD_OUT_CHARS` characters.

    Raises:
        LaminaError: this Python came without its library's source or its help topics.
    """
    modules = [module for module in library_modules() if module.package in STAGE_PACKAGES]
    if not modules:
        raise LaminaError(
            "the demo's text cannot be read",
            faults=["this Python has no source files of its standard library"],
            cure="lamina demo   # under a Python installed with its library's .py files",
        )
    return (
        _limited("prose", _topics()),
        _limited("code", _code(modules)),
        _limited("docstrings", _docstrings(modules)),
    )


def base_text() -> Text:
    """What the demo's base model is trained on: the source of all modules that no stage reads."""
    read_later = STAGE_PACKAGES | NEVER_READ
    modules = [module for module in library_modules() if module.package not in read_later]
    return _split("base", ((module.name, module.source()) for module in modules))


def _topics() -> Iterator[Document]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise LaminaError(
            "the demo's text cannot be read",
            faults=["this Python has no pydoc_data.topics, the text behind help()"],
            cure="lamina demo   # under a Python with its whole standard library",
        ) from error
    yield from sorted(topics.items(), key=lambda item: (stable_hash(item[0]), item[0]))


def _code(modules: Iterable[Module]) -> Iterator[Document]:
    for module in modules:
        if module.package in CODE_PACKAGES:
            yield module.name, bare_code(module.tree())


def _docstrings(modules: Iterable[Module]) -> Iterator[Document]:
    for module in modules:
        text = bare_docstrings(module.tree())
        if text:
            yield module.name, f"{module.name}\n\n{text}"


def _limited(name: str, documents: Iterable[Document]) -> Text:
    return _split(name, documents, TRAIN_CHARS, HELD_OUT_CHARS)


def _split(
    name: str,
    documents: Iterable[Document],
    train_chars: int | None = None,
    held_out_chars: int | None = None,
) -> Text:
    train: list[str] = []
    held_out: list[str] = []
    for title, text in documents:
        part = held_out if stable_hash(f"part of {title}") % HELD_OUT_ONE_IN == 0 else train
        part.append(text)
        if _is_full(train, train_chars) and _is_full(held_out, held_out_chars):
            break
    kept = _cut("\n\n".join(held_out), held_out_chars)
    return Text(name, _cut(_without(kept, "\n\n".join(train)), train_chars), kept)


def _is_full(texts: list[str], chars: int | None) -> bool:
    return chars is not None and sum(map(len, texts)) > 1.2 * chars


def _cut(text: str, chars: int | None) -> str:
    """At most `chars` characters, ending with a paragraph so that none is in both parts."""
    if chars is None or len(text) <= chars:
        return text
    return text[:chars].rpartition("\n\n")[0]


def _without(held_out: str, train: str) -> str:
    """Drops the paragraphs of `train` that `held_out` has too, however they are indented.

    Topics quote each other at length, so that splitting by document is not enough.
    """
    taken = {_bare(paragraph) for paragraph in held_out.split("\n\n")}
    return "\n\n".join(part for part in train.split("\n\n") if _bare(part) not in taken)


def _bare(paragraph: str) -> str:
    return " ".join(paragraph.split())
