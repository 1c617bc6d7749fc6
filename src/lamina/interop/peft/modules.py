"""Modules that look their names up in the tree when they are asked for them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lamina.interop.peft.patching import PatchedAtHome
from lamina.interop.peft.placeholders import placeholder
from lamina.interop.peft.tree import TREE


class Loader:
    """Makes the modules of the drop-in; there is nothing to run in them."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module."""
        return PatchedAtHome(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Let the module look its names up, each once, when it is first read."""
        here = module.__name__
        inside = TREE[here]

        def look_up(name: str) -> Any:
            if name in inside:
                value = resolve(here, name)
            elif f"{here}.{name}" in TREE:
                value = importlib.import_module(f"{here}.{name}")
            else:
                raise AttributeError(
                    f"module {here!r} has no attribute {name!r}; Lamina stands in for peft here"
                )
            # What may change at home, such as a switch, is looked up each time.
            return module.__dict__.setdefault(name, value) if callable(value) else value

        module.__dict__.update(
            __doc__=f"Lamina in the place of {here}.",
            __file__=__file__,
            __all__=[name for name in inside if not name.startswith("_")],
            __getattr__=look_up,
            __dir__=lambda: sorted({*module.__dict__, *inside}),
        )


def resolve(module: str, name: str) -> Any:
    """The object that `module` of peft has by this name."""
    found = find(module, name)
    if found is None:
        return _made.setdefault((module, name), placeholder(module, name))
    return found[0]


# A placeholder is one object, however often the drop-in is taken away and put back.
_made: dict[tuple[str, str], Any] = {}


def find(module: str, name: str) -> tuple[Any] | None:
    """The object, in a tuple; None where a placeholder stands."""
    home, _, attribute = TREE[module][name].partition(":")
    if home in TREE:
        found = find(home, attribute)
        if found is None:
            return (resolve(home, attribute),) if (home, attribute) != (module, name) else None
        return found
    try:
        owner = importlib.import_module(home)
    except ModuleNotFoundError as error:
        # Only the absence of the home itself means a placeholder.
        if error.name is None or not home.startswith(error.name):
            raise
        return None
    return (getattr(owner, attribute),) if hasattr(owner, attribute) else None


def names() -> Iterator[tuple[str, str]]:
    """Every (module, name) of the drop-in."""
    for module, inside in TREE.items():
        for name in inside:
            yield module, name


def placeholders() -> list[tuple[str, str]]:
    """Every (module, name) at which nothing but a placeholder stands, at its first place."""
    return [(module, name) for module, name in names() if find(module, name) is None]
