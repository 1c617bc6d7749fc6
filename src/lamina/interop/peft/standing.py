"""Classes of the drop-in that Lamina's own objects count as instances of."""

from __future__ import annotations

from typing import Any


class StandsFor(type):
    """The metaclass of a class that names, as `stands_for`, a class of Lamina."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or isinstance(instance, _natives(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or issubclass(subclass, _natives(cls))


def _natives(cls: type) -> tuple[type, ...]:
    # A subclass that somebody derives stands for nothing but itself.
    own = cls.__dict__.get("stands_for", ())
    return own if isinstance(own, tuple) else (own,)
