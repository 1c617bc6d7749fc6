"""The calls in a Python file, and the literals that their arguments lead to."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from lamina.training.plan.importing.draft import Draft

_DEEPEST = 20


class Unknown:
    """A value that only running the file would tell."""


_UNKNOWN = Unknown()


class Call:
    """One call.

    Attributes:
        name: of what is called: the last part of it.
        owner: the name before that, as `PeftModel` in `PeftModel.from_pretrained`.
        line: in the file.
    """

    def __init__(self, calls: Calls, node: ast.Call) -> None:
        self._calls, self._node = calls, node
        function = node.func
        self.line = node.lineno
        self.owner = ""
        self.name = ""
        if isinstance(function, ast.Attribute):
            self.name = function.attr
            self.owner = function.value.id if isinstance(function.value, ast.Name) else ""
        elif isinstance(function, ast.Name):
            self.name = function.id

    def keywords(self) -> set[str]:
        """The names of its keyword arguments."""
        return {each.arg for each in self._node.keywords if each.arg}

    def node(self, name: str, place: int | None = None) -> ast.expr | None:
        """An argument, by its name or its place."""
        found = next((each.value for each in self._node.keywords if each.arg == name), None)
        if found is None and place is not None and place < len(self._node.args):
            return self._node.args[place]
        return found

    def values(self, draft: Draft, positional: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
        """Name and value of each argument; those that are computed become notes."""
        pairs = list(zip(positional, self._node.args, strict=False))
        pairs += [(each.arg or "**", each.value) for each in self._node.keywords]
        for name, node in pairs:
            value = self._calls.literal(node)
            if isinstance(value, Unknown):
                told = f"{ast.unparse(node)} is computed, not written"
                draft.note(node.lineno, f"{self.name}({name}=)", told, "give its value")
            else:
                yield name, value


class Calls:
    """All calls of a file, and what its names were assigned to.

    Args:
        tree: the file.
    """

    def __init__(self, tree: ast.Module) -> None:
        self._assigned: dict[str, list[tuple[int, ast.expr]]] = defaultdict(list)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value, node.lineno)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._assign(node.target, node.value, node.lineno)
        for found in self._assigned.values():
            found.sort(key=lambda each: each[0])
        self.all = [Call(self, node) for node in sorted(nodes, key=lambda each: each.lineno)]

    def _assign(self, target: ast.expr, value: ast.expr, line: int) -> None:
        if isinstance(target, ast.Name):
            self._assigned[target.id].append((line, value))

    def literal(self, node: ast.expr | None, depth: int = 0) -> Any:
        """The value of an expression: written out, or a name that was given one once."""
        if node is None or depth > _DEEPEST:
            return None if node is None else _UNKNOWN
        if isinstance(node, ast.Name):
            given = self._assigned.get(node.id, [])
            return self.literal(given[0][1], depth + 1) if len(given) == 1 else _UNKNOWN
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return _UNKNOWN

    def call_at(self, node: ast.expr | None) -> Call | None:
        """The call that an expression is, or that its name was last assigned before it."""
        if isinstance(node, ast.Name):
            node = self._last(node.id, node.lineno)
        return Call(self, node) if isinstance(node, ast.Call) else None

    def behind(self, node: ast.expr | None, before: int) -> list[Call]:
        """All calls that a value came from: of methods, of arguments, of earlier assignments."""
        found: list[Call] = []
        waiting: list[tuple[ast.expr, int]] = [] if node is None else [(node, before)]
        seen: set[int] = set()
        while waiting:
            here, line = waiting.pop(0)
            if id(here) in seen:
                continue
            seen.add(id(here))
            if isinstance(here, ast.Call):
                call = Call(self, here)
                found.append(call)
                function = here.func
                if isinstance(function, ast.Attribute):
                    waiting.append((function.value, line))
                # The first argument of PeftModel.from_pretrained or get_peft_model is the base.
                waiting += [(each, line) for each in here.args[:1]]
                waiting += [(each.value, line) for each in here.keywords if each.arg == "model"]
            elif isinstance(here, ast.Subscript):
                waiting.append((here.value, line))
            elif isinstance(here, ast.Name):
                value = self._last(here.id, line)
                if value is not None:
                    waiting.append((value, value.lineno))
        return found

    def _last(self, name: str, before: int) -> ast.expr | None:
        given = [value for line, value in self._assigned.get(name, []) if line < before]
        return given[-1] if given else None
