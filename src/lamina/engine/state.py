"""What is active and trainable: one object, shared by all adapted layers of a model.

Layers read it in every forward, so that switching adapters or turning them off touches this
object and never walks the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

from torch import nn

from lamina.config import LoraConfig
from lamina.engine.biases import TrainedBiases
from lamina.engine.routing import Routing
from lamina.errors import AdapterNameError, nearest

# Filesystems allow a folder's name 255 bytes.
_LONGEST = 200


@dataclass(frozen=True)
class Override:
    """What a single layer was told, apart from the shared state.

    Attributes:
        active: the adapters that are active there.
        disabled: whether they are switched off there.
        trainable: the adapters that were made trainable by it.
    """

    active: tuple[str, ...]
    disabled: bool
    trainable: frozenset[str]


class Member(Protocol):
    """A layer that reads the state."""

    override: Override | None


@dataclass(eq=False)
class AdapterState:
    """The adapters of one model.

    Attributes:
        configs: every adapter's config, in the order in which they were added.
        active: the adapters that take part in the forward, in order.
        trainable: the adapters declared trainable. A parameter asks for a gradient when its
            adapter is both trainable and active; see `lamina.engine.trainability`.
        disabled: True inside `disable_adapter()`: the model answers as its base.
        biases: the base's biases that adapters have trained along.
        folded_layers: how many layers have adapters folded in; which ones, the layers know.
        members: the layers that read this state.
        replication: what repeated the model's layers, and can undo it; None if nothing did.
        overridden: how many of them were told something else, one by one.
        changes_stay: leave the base as initialisations changed it (PiSSA and its like), whether
            their adapters take part or not, and also when they go; else it gets back what it had.
        requantise: whether folding may round to the codes of a quantised base without being asked.
        copies_begin_as_base: let modules that are trained whole begin as the base has them; else
            as the forward takes them when an adapter is added.
        routing: which rows go to which adapters in the forward that is running; mostly None.
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trainable: frozenset[str] = frozenset()
    disabled: bool = False
    biases: TrainedBiases = field(default_factory=TrainedBiases)
    folded_layers: int = 0
    members: WeakSet[Any] = field(default_factory=WeakSet, repr=False)
    overridden: int = 0
    replication: Any = None
    changes_stay: bool = False
    requantise: bool = False
    copies_begin_as_base: bool = False
    routing: Routing | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A weak set can't be pickled.
        return {**self.__dict__, "members": list(self.members)}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values, members=WeakSet(values["members"]))

    @property
    def contributing(self) -> tuple[str, ...]:
        """The adapters that the forward adds up now: the active ones, or none while disabled."""
        return () if self.disabled else self.active

    def activate(self, names: Iterable[str]) -> None:
        """Let these adapters, and no others, take part in the forward, in this order."""
        self.active = self.check_known(names)
        self.drop_overrides()
        self.show_biases()

    def override(self, member: Member, told: Override) -> None:
        """Let one layer differ from the shared state; what all are told becomes the state."""
        if member.override is None:
            self.overridden += 1
        member.override = told
        if self.overridden < len(self.members) or any(m.override != told for m in self.members):
            return
        self.active = tuple(name for name in told.active if name in self.configs)
        self.disabled, self.trainable = told.disabled, told.trainable
        self.drop_overrides()
        self.show_biases()

    def drop_overrides(self) -> None:
        """Let all layers follow the shared state again."""
        for member in self.members if self.overridden else ():
            member.override = None
        self.overridden = 0

    def show_biases(self) -> None:
        """Put the biases into the model that go with what contributes now."""
        self.biases.show(self.contributing)

    def register(self, name: str, config: LoraConfig, *, trainable: bool) -> None:
        """Make room for a new adapter; it is not active yet."""
        self.check_new_name(name)
        self.configs[name] = config
        if trainable:
            self.trainable |= {name}

    def forget(self, name: str) -> None:
        """Drop an adapter; if it was the last active one, the first that is left takes over."""
        self.check_known([name])
        del self.configs[name]
        self.trainable -= {name}
        if self.active == (name,):
            self.active = tuple(self.configs)[:1]
        self.active = tuple(other for other in self.active if other != name)
        self.drop_overrides()
        self.biases.drop(name)
        self.show_biases()

    def check_known(self, names: Iterable[str]) -> tuple[str, ...]:
        """`names` as a tuple without repetitions.

        Raises:
            AdapterNameError: one of them is no adapter here; names are compared whole.
        """
        wanted = tuple(dict.fromkeys(names))
        unknown = [name for name in wanted if name not in self.configs]
        if unknown:
            have = ", ".join(map(repr, self.configs)) or "none"
            raise AdapterNameError(
                f"There is no adapter {', '.join(map(repr, unknown))} here; the model has: {have}.",
                faults=[
                    f"did you mean {close!r} instead of {name!r}?"
                    for name in unknown
                    for close in nearest(str(name), self.configs)
                ],
                cure="model.load_adapter(path, adapter_name) or model.add_adapter(name, config)",
            )
        return wanted

    def check_new_name(self, name: str) -> None:
        """Refuse a name that is taken or that torch can't have as a module's name."""
        if not isinstance(name, str):
            raise AdapterNameError(
                f"{name!r} can't be an adapter's name: {type(name).__name__} is no string.",
                cure=f'use a string, such as "{name}"',
            )
        if name in self.configs:
            raise AdapterNameError(
                f"The model already has an adapter {name!r}.",
                cure=f"choose another name, or model.delete_adapter({name!r}) first",
            )
        reserved = not name or "." in name or name == "__base__" or hasattr(nn.ModuleDict, name)
        # As a folder's name, "/x" would lie outside of the directory that is saved to.
        no_folder = (
            name.startswith("/") or "\0" in name or len(name.encode("utf-8", "replace")) > _LONGEST
        )
        if reserved or no_folder or hasattr(nn.ParameterDict, name):
            raise AdapterNameError(
                f"{name!r} can't be an adapter's name: it becomes a part of parameter names, and a "
                "folder's name.",
                cure="use a short string without dots that is no attribute of a torch module, nor "
                "a path from the root",
            )

    @contextmanager
    def routed(self, routing: Routing | None) -> Iterator[None]:
        """Send the rows of the batch their ways inside."""
        before = self.routing
        self.routing = routing
        try:
            yield
        finally:
            self.routing = before

    @contextmanager
    def while_disabled(self) -> Iterator[None]:
        """Turn all adapters off for a while; what was is restored exactly, errors included."""
        before = self.disabled
        self.disabled = True
        self.show_biases()
        try:
            yield
        finally:
            self.disabled = before
            self.show_biases()
