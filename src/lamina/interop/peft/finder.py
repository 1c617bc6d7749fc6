"""What makes `import peft` find the drop-in, and its version."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from lamina.interop.peft.types import VERSION

_METADATA = f"Metadata-Version: 2.1\nName: peft\nVersion: {VERSION}\n"


class _Distribution(importlib.metadata.Distribution):
    """The metadata of an installed peft, without the files."""

    def read_text(self, filename: str) -> str | None:
        return {"METADATA": _METADATA, "top_level.txt": "peft\n"}.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> os.PathLike[str]:  # type: ignore[override]
        raise FileNotFoundError(path)


class Finder(importlib.metadata.DistributionFinder):
    """Finds `peft` and what lies below it; everything else is left to the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of the drop-in."""
        # What must not be needed to find other modules is imported here.
        if fullname != "peft" and not fullname.startswith("peft."):
            return None
        from lamina.interop.peft.modules import Loader
        from lamina.interop.peft.tree import TREE

        if fullname not in TREE:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in TREE)
        return ModuleSpec(fullname, Loader(), origin=__file__, is_package=is_package)  # type: ignore[arg-type]

    def find_distributions(
        self,
        context: importlib.metadata.DistributionFinder.Context | None = None,
    ) -> Iterable[importlib.metadata.Distribution]:
        """peft's metadata, where it, or everything, is asked for."""
        name = getattr(context, "name", None)
        return [_Distribution()] if name in (None, "peft") else []

    def invalidate_caches(self) -> None:
        """Nothing is cached."""
