"""Put Lamina in the place of peft in this process, and take it away again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from lamina.interop.peft.finder import Finder
from lamina.interop.peft.mending import Mended, mend

_finder: Finder | None = None
_before: dict[str, ModuleType] = {}
_mended: Mended | None = None


def install() -> None:
    """Let `import peft`, anywhere in this process, give Lamina, whether peft is installed or not.

    Call it before transformers, TRL and diffusers are imported. Where they came first, what they
    remember of peft is replaced as far as it can be found: names at the top of their modules and
    cached answers to "is peft there?". What can't be: classes that were defined from peft's own,
    and parts that a library left out because peft wasn't there. Doing it twice does nothing.
    """
    global _finder, _mended  # noqa: PLW0603 - one process, one peft
    if _finder is not None:
        return
    _finder = Finder()
    _before.update(_take_modules())
    sys.meta_path.insert(0, _finder)
    importlib.invalidate_caches()
    _mended = mend()


def uninstall() -> None:
    """Take Lamina away: modules, finders and what libraries remembered are as they were."""
    global _finder, _mended  # noqa: PLW0603 - one process, one peft
    if _finder is None:
        return
    sys.meta_path.remove(_finder)
    _take_modules()
    sys.modules.update(_before)
    _before.clear()
    if _mended is not None:
        _mended.undo()
    _finder = _mended = None
    importlib.invalidate_caches()


def installed() -> bool:
    """Whether Lamina stands in for peft now."""
    return _finder is not None


@contextmanager
def standing_in() -> Iterator[None]:
    """Lamina in the place of peft inside, whether it was before or not."""
    if installed():
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()


def _take_modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == "peft" or name.startswith("peft.")]
    return {name: sys.modules.pop(name) for name in names}
