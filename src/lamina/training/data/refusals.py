"""Several refusals of data, told as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lamina.errors import DataError, LaminaError


def together(errors: Sequence[LaminaError], what: str) -> LaminaError:
    """The only one, or one that tells all of them.

    Args:
        errors: at least one.
        what: is told of several.
    """
    if len(errors) == 1:
        return errors[0]
    faults = [line for error in errors for line in lines_of(error)]
    return DataError(what, faults=faults, cure=cure_of(errors))


def lines_of(error: LaminaError) -> list[str]:
    """All that an error says, but how to mend it."""
    return [error.what, *error.faults]


def cure_of(errors: Iterable[LaminaError]) -> str | None:
    """How to mend several."""
    return "; ".join(dict.fromkeys(each.cure for each in errors if each.cure)) or None
