"""A YAML file as values, with the line at which each stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import yaml

from lamina.errors import PlanError

# Where something stands in a document: keys of mappings and places in lists.
Where = tuple[str | int, ...]
# What is wrong, and where.
Fault = tuple[Where, str]

_LARGEST_BYTES = 4 << 20
# Aliases make a small file a large document; no plan is that long.
_MOST_NODES = 200_000


@dataclass
class Document:
    """What a plan's file says.

    Attributes:
        source: its name, for messages.
        values: what it holds.
        lines: where -> line, counted from 1.
        faults: (line, what is wrong) with the file as such, such as a key given twice.
        overridden: what the command line says otherwise.
        unread: what the command line says and nobody understands.
    """

    source: str
    values: Any
    lines: dict[Where, int] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)
    overridden: set[Where] = field(default_factory=set)
    unread: set[str | int] = field(default_factory=set)

    def line_of(self, where: Where) -> int | None:
        """The line of a value, or of the innermost one around it that the file has."""
        for end in range(len(where), 0, -1):
            if where[:end] in self.lines:
                return self.lines[where[:end]]
        return None


def read_document(path: File) -> Document:
    """Read a YAML (or JSON) file.

    Raises:
        PlanError: it can't be read, or is no YAML.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise PlanError(
                f"'{path}' is {path.stat().st_size >> 20} MB large, and no plan is.",
                cure="give the plan's own file",
            )
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PlanError(
            f"'{path}' can't be read: {told}.", cure="lamina init writes a plan to begin with"
        ) from error
    return parse_document(text, str(path))


def parse_document(text: str, source: str) -> Document:
    """Read a document from text.

    Raises:
        PlanError: it is no YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        found = Document(source, None)
        if root is not None:
            _Survey(found).visit(root, ())
            found.values = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise PlanError(
            f"{source} is not YAML.",
            faults=[f"{line}{error.problem or error.context}"],
            cure="mend that line; spaces indent, tabs don't, and text with ': ' needs quotes",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise PlanError(f"{source} is not YAML: {error or type(error).__name__}.") from error
    finally:
        loader.dispose()
    return found


class _Survey:
    """Notes the line of every value, and keys that are given twice or are no text."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def visit(self, node: yaml.Node, where: Where) -> None:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise ValueError("its aliases make it larger than any plan")
        self._document.lines.setdefault(where, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for place, each in enumerate(node.value):
                self.visit(each, (*where, place))
        elif isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, where)

    def _visit_mapping(self, node: yaml.MappingNode, where: Where) -> None:
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._document.faults.append((line, "a key is a word, not a list or a mapping"))
                continue
            if key.value in seen:
                told = f"{key.value!r} is given twice, first in line {seen[key.value]}"
                self._document.faults.append((line, told))
            seen[key.value] = line
            self._document.lines[(*where, key.value)] = line
            self.visit(value, (*where, key.value))
