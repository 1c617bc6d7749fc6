"""Match regular expressions in time that is linear in the name, by an automaton instead of trials.

For expressions that a matcher which backtracks could take forever to give up on, `(a+)+$` say. What
an automaton can't do (groups that are referred to, looking around) has to be refused by the caller.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

# What `re` itself reads expressions by; it has no public name.
_INSIDE_RE = sys.version_info >= (3, 11)
sre: Any = importlib.import_module("re._constants" if _INSIDE_RE else "sre_constants")
parser: Any = importlib.import_module("re._parser" if _INSIDE_RE else "sre_parse")

Test = Callable[[str], bool]

_MOST_STATES = 2_000
_UNICODE = 32
_ALWAYS, _AT_BEGINNING, _AT_END = range(3)
_PLACES = {
    sre.AT_BEGINNING: _AT_BEGINNING,
    sre.AT_BEGINNING_STRING: _AT_BEGINNING,
    sre.AT_END: _AT_END,
    sre.AT_END_STRING: _AT_END,
}
_CATEGORIES: dict[Any, Test] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    sre.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Automaton:
    """Says whether a whole name is as an expression wants it.

    Args:
        pattern: the expression.

    Raises:
        ValueError: it has something that an automaton can't do, or is too large.
        re.error: it is no regular expression.
    """

    def __init__(self, pattern: str) -> None:
        # state -> those that it is left for without a character, and where in the name that goes.
        self._free: list[list[tuple[int, int]]] = [[]]
        # state -> the character that it wants, and what comes after it.
        self._steps: dict[int, tuple[Test, int]] = {}
        parsed = parser.parse(pattern)
        if parsed.state.flags & ~_UNICODE:
            raise ValueError("flags")
        self._end = self._sequence(parsed, 0)
        # Sets of states are found when a name leads to them.
        self._sets: list[frozenset[int]] = [self._closed([0], _AT_BEGINNING)]
        self._numbers = {self._sets[0]: 0}
        self._next: dict[tuple[int, str], int] = {}
        self._accepts: dict[int, bool] = {}

    def matches(self, name: str) -> bool:
        """Whether all of the name fits."""
        here = 0
        for char in name:
            there = self._next.get((here, char))
            if there is None:
                there = self._next[here, char] = self._step(here, char)
            here = there
        if here == 0 and not name:
            return self._end in self._closed([0], _AT_BEGINNING, _AT_END)
        if here not in self._accepts:
            self._accepts[here] = self._end in self._closed(self._sets[here], _AT_END)
        return self._accepts[here]

    def _step(self, here: int, char: str) -> int:
        steps = (self._steps[state] for state in self._sets[here] if state in self._steps)
        states = self._closed([after for wants, after in steps if wants(char)])
        if states not in self._numbers:
            self._numbers[states] = len(self._sets)
            self._sets.append(states)
        return self._numbers[states]

    def _closed(self, states: Iterable[int], *places: int) -> frozenset[int]:
        found = set(states)
        left = list(found)
        while left:
            for state, place in self._free[left.pop()]:
                if state not in found and (place == _ALWAYS or place in places):
                    found.add(state)
                    left.append(state)
        return frozenset(found)

    def _new(self) -> int:
        if len(self._free) > _MOST_STATES:
            raise ValueError("too large")
        self._free.append([])
        return len(self._free) - 1

    def _link(self, one: int, other: int, place: int = _ALWAYS) -> int:
        self._free[one].append((other, place))
        return other

    def _sequence(self, items: Any, here: int) -> int:
        for operation, argument in items:
            here = self._item(operation, argument, here)
        return here

    def _item(self, operation: Any, argument: Any, here: int) -> int:
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, items = argument
            return self._repeat(least, most, items, here)
        if operation is sre.BRANCH:
            end = self._new()
            for items in argument[1]:
                self._link(self._sequence(items, self._link(here, self._new())), end)
            return end
        if operation is sre.SUBPATTERN and not (argument[1] or argument[2]):
            return self._sequence(argument[3], here)
        if operation is sre.AT and argument in _PLACES:
            return self._link(here, self._new(), _PLACES[argument])
        end = self._new()
        self._steps[self._link(here, self._new())] = (_test(operation, argument), end)
        return end

    def _repeat(self, least: int, most: Any, items: Any, here: int) -> int:
        for _ in range(least):
            here = self._sequence(items, self._link(here, self._new()))
        end = self._new()
        self._link(here, end)
        if most is sre.MAXREPEAT:
            again = self._link(here, self._new())
            self._link(self._sequence(items, again), again)
            self._link(again, end)
            return end
        for _ in range(most - least):
            here = self._sequence(items, self._link(here, self._new()))
            self._link(here, end)
        return end


def _test(operation: Any, argument: Any) -> Test:
    """Whether a character is one that a part of an expression means."""
    if operation is sre.LITERAL:
        wanted = chr(argument)
        return lambda char: char == wanted
    if operation is sre.NOT_LITERAL:
        unwanted = chr(argument)
        return lambda char: char != unwanted
    if operation is sre.ANY:
        return lambda char: char != "\n"
    if operation is sre.RANGE:
        low, high = argument
        return lambda char: low <= ord(char) <= high
    if operation is sre.CATEGORY:
        return _CATEGORIES[argument]
    if operation is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        tests = [_test(*each) for each in argument[negated:]]
        return lambda char: any(test(char) for test in tests) != negated
    raise ValueError(str(operation).lower())
