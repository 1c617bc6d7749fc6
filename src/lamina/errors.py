"""Every error that Lamina raises on purpose.

A message says what happened, lists all that is wrong, and ends with the call that mends it.
Each class also derives from the builtin that callers of such an API already catch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

# Names from a file may hold what a terminal obeys, what turns a line around, or half a character.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LONGEST_LINE, _MOST_FAULTS = 4_000, 100


class LaminaError(Exception):
    """The base of all errors: `what` happened, the `faults` found, and the `cure`.

    Args:
        what: one sentence that names the offending thing.
        faults: everything that is wrong, a line each; all of them, not only the first.
        cure: the call or command that mends it.
    """

    def __init__(self, what: str, *, faults: Sequence[str] = (), cure: str | None = None) -> None:
        self.what = printable(what)
        if len(faults) > _MOST_FAULTS:
            rest = len(faults) - _MOST_FAULTS + 1
            faults = [*faults[: _MOST_FAULTS - 1], f"and {rest:,} more"]
        self.faults = tuple(map(printable, faults))
        self.cure = None if cure is None else printable(cure)
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what, *(f"  - {fault}" for fault in self.faults)]
        if self.cure:
            lines.append(f"To mend it: {self.cure}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.faults, self.cure))


def escaped(text: str) -> str:
    """Text with escapes in place of control characters, as JSON would have them too."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def printable(text: str) -> str:
    """Text as it may go to a terminal: control characters as escapes, and no line endless."""
    text = escaped(text)
    if len(text) <= _LONGEST_LINE:
        return text
    return f"{text[: _LONGEST_LINE - 200]} [...] {text[-150:]}"


def _rebuild(
    kind: type[LaminaError], what: str, faults: tuple[str, ...], cure: str | None
) -> LaminaError:
    return kind(what, faults=faults, cure=cure)


class ConfigError(LaminaError, ValueError):
    """An adapter's settings contradict each other or can't be read."""


class UnsupportedFieldError(ConfigError, TypeError):
    """A field of a config asks for something that Lamina does not do; it is never ignored."""


class TargetError(LaminaError, ValueError):
    """A pattern matches nothing, or the targets can't be adapted."""


class InitialisationError(TargetError, TypeError):
    """Adapters of these layers can't begin as asked."""


class UnsupportedMethodError(LaminaError, NotImplementedError):
    """A method of adapting models that is not LoRA was asked for."""


class UnsupportedTargetError(TargetError):
    """A pattern hits modules that have no weights to adapt, or weights of an unknown kind."""


class AlreadyAdaptedError(LaminaError, ValueError):
    """The model already has adapters; starting over would nest or wipe them."""


class NoModelError(LaminaError, TypeError):
    """Something else was given where a model is wanted."""


class AdapterNameError(LaminaError, ValueError, KeyError):
    """An adapter's name is unknown, taken or not usable as a name."""

    __str__ = LaminaError.__str__


class RoutingError(LaminaError, ValueError, TypeError):
    """The rows of a batch can't go to the adapters that were named for them."""


class FoldError(LaminaError, ValueError, RuntimeError):
    """An update can't be added to the base weights, or can't be taken out again."""


class NotFoldableError(FoldError, NotImplementedError):
    """A layer's base can't take the update in, whatever the values are."""


class CheckpointError(LaminaError, ValueError):
    """An adapter directory can't be read or written."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file that an adapter needs is not there."""

    __str__ = LaminaError.__str__


class DirectoryInUseError(CheckpointError):
    """Another process or thread is writing to the same directory right now."""


class KeyMismatchError(CheckpointError, RuntimeError):
    """The tensors in a file and the adapter weights in the model are not the same set."""


class RecordError(CheckpointError):
    """A stage record can't be understood, or contradicts the tensors beside it."""


class StageError(LaminaError, ValueError):
    """A stage can't be begun or saved as asked."""


class PlanError(LaminaError, ValueError):
    """A plan of stages can't be read, or asks for what can't be done."""


class DataError(LaminaError, ValueError):
    """Training data can't be read, or isn't what a method learns from."""


class RunError(LaminaError, RuntimeError):
    """A run of a plan can't begin, or can't go on."""


class DivergedError(RunError):
    """The training of a stage came to weights that are no numbers."""


class GateError(RunError):
    """A stage cost the evals more than its gate allows, and the run ends there."""


class ProbeError(LaminaError, RuntimeError):
    """A model that takes tokens can't be asked any, so that its answers can't be compared."""


class VerificationError(LaminaError, RuntimeError):
    """What was opened isn't, or doesn't answer, what was saved."""


class LaminaWarning(UserWarning):
    """The base of all warnings."""


class MismatchWarning(LaminaWarning):
    """The base or the tokenizer is not just as on record, in a way that may be meant."""


class ProbeWarning(LaminaWarning):
    """A stage was saved without what its model answers: nobody can replay that later."""


class PreflightError(LaminaError, RuntimeError):
    """Training would run, and train nothing or the wrong thing."""


class AllocationError(LaminaError, TypeError, ValueError):
    """Ranks can't be shared out among layers."""


class OptimizerError(LaminaError, ValueError, TypeError):
    """An optimizer can't be made, stepped or restored as asked."""


class ConversionError(LaminaError, TypeError, ValueError):
    """What was trained another way can't be turned into a LoRA adapter."""


class ExportError(LaminaError, ValueError):
    """An adapter can't be written for another program, or that program would refuse it."""


class MissingExtraError(LaminaError, ImportError):
    """A feature needs an optional package that is not installed."""


def nearest(name: str, candidates: Iterable[str], count: int = 1) -> list[str]:
    """The `count` candidates spelled most like `name`, best first; empty when none is close."""
    return difflib.get_close_matches(name, sorted(set(candidates)), n=count, cutoff=0.5)
