"""Optional packages: imported here only, when something that needs them runs."""

from __future__ import annotations

import importlib
from types import ModuleType

from lamina.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: its dotted name, for example "torchao.quantization".
        extra: the extra of Lamina that brings it, for example "quant".

    Raises:
        MissingExtraError: it is not installed, or can't be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} is needed here, and can't be imported: {error}.",
            cure=f"pip install 'lamina[{extra}]'",
        ) from error
