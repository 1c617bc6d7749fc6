"""Functions of the user's: `package.module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.errors import PlanError, nearest


@contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Let modules in these folders be found inside, before installed ones of the same name."""
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def find_function(name: str) -> Callable[..., Any]:
    """Import `package.module:function`.

    Raises:
        PlanError: there is no such module, or no such function in it.
    """
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PlanError(
            f"{name}: {module_name} can't be imported: {error}.",
            cure="put the module beside the plan, or install its package",
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value)]
        close = nearest(function, functions)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PlanError(
            f"{name}: {module_name} has no function {function!r}{hint}",
            cure=f"define it in {getattr(module, '__file__', None) or module_name}",
        )
    return found  # type: ignore[no-any-return]
