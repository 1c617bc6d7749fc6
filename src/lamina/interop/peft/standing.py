"""Classes of the drop-in that Lamina's own objects count as instances of."""

from __future__ import annotations

from typing import Any


class StandsFor(type):
    """The metaclass of a class that names, as `stands_for`, a class of Lamina.

    Of that, it may leave out a class, `stands_not_for`, and what derives from it.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        return isinstance(instance, _natives(cls)) and not isinstance(instance, _others(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        if super().__subclasscheck__(subclass):
            return True
        return issubclass(subclass, _natives(cls)) and not issubclass(subclass, _others(cls))


def _natives(cls: type) -> tuple[type, ...]:
    # A subclass that somebody derives stands for nothing but itself.
    own = cls.__dict__.get("stands_for", ())
    return own if isinstance(own, tuple) else (own,)


def _others(cls: type) -> tuple[type, ...]:
    other = cls.__dict__.get("stands_not_for", ())
    return other if isinstance(other, tuple) else (other,)
