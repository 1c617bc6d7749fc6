"""Every name that the libraries around it import from peft is found in the drop-in."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBRARIES = ("transformers", "trl", "accelerate", "diffusers", "sentence_transformers")

RESOLVE = """
import importlib, json, sys
from lamina.interop.peft import install
install()
for module, name in json.load(sys.stdin):
    try:
        found = importlib.import_module(module)
        if name is not None and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
    except ImportError as error:
        print(module, name, error)
"""


def _is_peft(node: ast.ImportFrom) -> bool:
    return not node.level and (node.module or "").split(".")[0] == "peft"


def statements(source: str) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each import from peft, wherever in the source it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.split(".")[0] == "peft")
        elif isinstance(node, ast.ImportFrom) and _is_peft(node):
            yield from ((node.module, alias.name) for alias in node.names)


def imports_of(library: str) -> set[tuple[str, str | None]]:
    spec = importlib.util.find_spec(library)
    if spec is None:
        return set()
    found = set()
    for path in Path(spec.origin).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8", errors="ignore")
        if "peft" in source:
            found |= set(statements(source))
    return found


def missing(wanted: set[tuple[str, str | None]]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE],
        input=json.dumps(sorted(wanted, key=str)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_import_of_the_installed_libraries_resolves():
    wanted = set().union(*(imports_of(library) for library in LIBRARIES))

    assert ("peft", "PeftModel") in wanted
    assert missing(wanted) == ""


@pytest.mark.slow
def test_a_name_that_peft_lacks_is_told():
    assert "peft NoSuchName" in missing({("peft", "NoSuchName")})


def test_statements_are_found_wherever_they_stand():
    source = "import peft\nif x:\n    def f():\n        from peft.utils import a, b as c\n"

    assert set(statements(source)) == {
        ("peft", None),
        ("peft.utils", "a"),
        ("peft.utils", "b"),
    }
