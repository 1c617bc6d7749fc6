"""The standard library's modules as text: whole, as bare code, or as bare docstrings.

Nothing is imported: modules are read as files, so no module's import can run code or fail.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"__pycache__", "test", "tests", "idle_test", "site-packages"})

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A standard-library module: its dotted name and the file it is in."""

    name: str
    path: Path

    @property
    def package(self) -> str:
        """The first part of the dotted name."""
        return self.name.partition(".")[0]

    @property
    def order(self) -> int:
        """CRC-32 of the name: a shuffle that every machine and every Python agrees on."""
        return stable_hash(self.name)

    def source(self) -> str:
        """The file's text; bytes that are not UTF-8 become U+FFFD."""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def tree(self) -> ast.Module:
        """The file's syntax tree."""
        with warnings.catch_warnings():
            # Old modules hold escapes that newer compilers warn about; no news to a reader.
            warnings.simplefilter("ignore")
            return ast.parse(self.source())


def stable_hash(name: str) -> int:
    """CRC-32 of a name, in [0, 2**32): unlike ``hash`` the same in every process."""
    return zlib.crc32(name.encode())


def library_modules() -> list[Module]:
    """Every module of the standard library that is there as source, tests left out, shuffled."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            name = ".".join(parts).removesuffix(".__init__")
            found.append(Module(name, path))
    return sorted(found, key=lambda module: (module.order, module.name))


def bare_code(tree: ast.Module) -> str:
    """The module's code without docstrings and comments, in the layout of ``ast.unparse``."""
    return ast.unparse(ast.fix_missing_locations(_WithoutDocstrings().visit(tree)))


class _WithoutDocstrings(ast.NodeTransformer):
    """Drops every string that stands as a statement: docstrings, and strings used as comments."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        # A statement whose body was nothing but a string must keep a body.
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            setattr(node, "body", [ast.Pass()])  # noqa: B010 - ast.AST has no typed body
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        value = node.value
        is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
        return None if is_text else node


def bare_docstrings(tree: ast.Module) -> str:
    """The module's docstrings in source order, each under the name and arguments it describes."""
    entries = []
    opening = ast.get_docstring(tree)
    if opening:
        entries.append(opening)
    for signature, node in _definitions(tree.body, prefix=""):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            entries.append(f"{signature}\n{cleandoc(docstring)}")
    return "\n\n".join(entries)


def _definitions(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield f"class {prefix}{node.name}", node
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}({ast.unparse(node.args)})", node
