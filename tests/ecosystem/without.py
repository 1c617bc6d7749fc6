"""Make a package that is installed look as if it weren't, to imports and to metadata alike."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterable
from typing import Any


class Without:
    """A finder that finds all that another one finds, but for one package."""

    def __init__(self, finder: Any, package: str) -> None:
        self.finder = finder
        self.package = package

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        hidden = fullname == self.package or fullname.startswith(f"{self.package}.")
        return None if hidden else self.finder.find_spec(fullname, path, target)

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        find = getattr(self.finder, "find_distributions", None)
        found = [] if find is None else find() if context is None else find(context)
        return (each for each in found if each.name != self.package)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide(package: str) -> None:
    """Hide a package from everything that this process imports from now on."""
    assert package not in sys.modules, f"{package} was imported before it could be hidden"
    sys.meta_path[:] = [Without(finder, package) for finder in sys.meta_path]
    importlib.invalidate_caches()
