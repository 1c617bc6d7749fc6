"""`import lamina` has every public name and costs no torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
import lamina.errors

SOURCE = Path(lamina.__file__).read_text(encoding="utf-8")


def declared() -> dict[str, str]:
    """name -> module, as the import statements say it to type checkers."""
    return {
        alias.name: node.module or ""
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lamina.")
        for alias in node.names
    }


def test_type_checkers_and_all_agree() -> None:
    assert sorted(declared()) == sorted(lamina.__all__)
    assert len(set(lamina.__all__)) == len(lamina.__all__)


@pytest.mark.parametrize("name", sorted(set(lamina.__all__) - {"__version__"}))
def test_a_name_is_that_of_the_module_it_is_declared_in(name: str) -> None:
    assert getattr(lamina, name) is getattr(importlib.import_module(declared()[name]), name)


def test_every_error_is_public() -> None:
    errors = {
        name
        for name, value in vars(lamina.errors).items()
        if isinstance(value, type) and issubclass(value, lamina.LaminaError)
    }
    assert errors <= set(lamina.__all__)


def test_names_are_listed_before_they_are_used() -> None:
    assert set(lamina.__all__) <= set(dir(lamina))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lamina.nonsense  # noqa: B018
    assert not hasattr(lamina, "nonsense")


def test_importing_costs_no_torch() -> None:
    code = (
        "import sys, lamina; lamina.LoraConfig, lamina.TargetError; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
