"""Mend what libraries imported before `install()` remember of peft."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

_LIBRARIES = ("transformers", "trl", "accelerate", "diffusers", "sentence_transformers")
_GONE = object()


@dataclass
class Mended:
    """What was changed in other modules, so that it can be put back."""

    before: list[tuple[ModuleType, str, Any]] = field(default_factory=list)
    caches: list[Callable[[], None]] = field(default_factory=list)

    def set(self, module: ModuleType, name: str, value: Any) -> None:
        """Give a module's name another value."""
        self.before.append((module, name, module.__dict__.get(name, _GONE)))
        setattr(module, name, value)

    def undo(self) -> None:
        """Put everything back as it was."""
        for module, name, value in reversed(self.before):
            if value is _GONE:
                module.__dict__.pop(name, None)
            else:
                setattr(module, name, value)
        for clear in self.caches:
            clear()


def mend() -> Mended:
    """Let the loaded libraries see the peft that is importable now."""
    mended = Mended()
    for module in _loaded():
        _forget_answers(module, mended)
    for module in _loaded():
        for name, home, attribute in _imports(module):
            mended.set(module, name, _value(home, attribute))
    return mended


def _loaded() -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in _LIBRARIES and isinstance(module, ModuleType)
    ]


def _forget_answers(module: ModuleType, mended: Mended) -> None:
    """Let "is peft there?" be asked anew."""
    for name in ("is_peft_available", "is_peft_greater_or_equal", "_is_package_available"):
        clear = getattr(module.__dict__.get(name), "cache_clear", None)
        if clear is not None:
            clear()
            mended.caches.append(clear)
    # Diffusers answers the question once, and copies the answer into its modules.
    if module.__dict__.get("USE_PEFT_BACKEND") is False:
        mended.set(module, "USE_PEFT_BACKEND", True)
    if module.__dict__.get("_peft_available") is False:
        from lamina.interop.peft.types import VERSION

        mended.set(module, "_peft_available", True)
        mended.set(module, "_peft_version", VERSION)


def _imports(module: ModuleType) -> Iterator[tuple[str, str, str | None]]:
    """(name, module of peft, attribute) of the imports of peft outside of functions."""
    source = _source(module)
    if "peft" not in source:
        return
    for node in _outside_functions(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and _is_peft(node.module) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, node.module or "", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_peft(alias.name):
                    yield alias.asname or "peft", alias.name if alias.asname else "peft", None


def _source(module: ModuleType) -> str:
    path = str(module.__dict__.get("__file__") or "")
    if not path.endswith(".py"):
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _is_peft(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] == "peft"


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and _only_for_checkers(node.test):
            continue
        yield node
        yield from _outside_functions(node)


def _only_for_checkers(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def _value(home: str, attribute: str | None) -> Any:
    module = importlib.import_module(home)
    return module if attribute is None else getattr(module, attribute)
