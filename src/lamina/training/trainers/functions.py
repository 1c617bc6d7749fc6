"""Functions of the user's: `package.module:function`."""

from __future__ import annotations

import importlib
import importlib.machinery
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


# Name of a module -> when its file was written that was imported.
_IMPORTED: dict[str, tuple[str, int]] = {}


def _forget_if_stale(name: str) -> None:
    """Let a module be imported anew if its file was changed, or another one is found now.

    A new process would import what is there; so does one that runs a plan again, or another plan.
    """
    top = name.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top)
    there = getattr(sys.modules.get(top), "__file__", None)
    stale = []
    if there is not None and spec is not None and spec.origin not in (None, there):
        stale = [each for each in sys.modules if f"{each}.".startswith(f"{top}.")]
    elif (now := _written(sys.modules.get(name))) and _IMPORTED.setdefault(name, now) != now:
        stale = [name]
    for each in stale:
        del sys.modules[each]
        _IMPORTED.pop(each, None)


def _written(module: object) -> tuple[str, int] | None:
    """The file of a module, and when it was written."""
    file = Path(getattr(module, "__file__", None) or "")
    return (str(file), file.stat().st_mtime_ns) if file.is_file() else None


def find_function(name: str) -> Callable[..., Any]:
    """Import `package.module:function`.

    Raises:
        PlanError: there is no such module, or no such function in it.
    """
    module_name, _, function = name.partition(":")
    _forget_if_stale(module_name)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PlanError(
            f"{name}: {module_name} can't be imported: {error}.",
            cure="put the module beside the plan, or install its package",
        ) from error
    if written := _written(module):
        _IMPORTED[module_name] = written
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
