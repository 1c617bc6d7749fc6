"""Modules of the drop-in in which a name can be set, and is then set where its object lives.

Tests and scripts patch names of peft's modules; what uses them is elsewhere here.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from lamina.interop.peft.tree import TREE


class PatchedAtHome(ModuleType):
    """A module that passes on what is set in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        home, _, attribute = TREE[self.__name__].get(name, "").partition(":")
        if not home:
            return
        try:
            owner = importlib.import_module(home)
        except ModuleNotFoundError:
            # A placeholder has no home.
            return
        if getattr(owner, attribute, None) is not value:
            setattr(owner, attribute, value)
