"""JSON that is larger, deeper or stranger than what is expected, as text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**12,
    10**30,
    0.5,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "8",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "\0",
    "\ud800",
    "a\u202eb",
    "\x1b[2J\x1b[31m",
    "[red]x[/red]",
    "e\u0301",
    "\u00e9",
    "(a+)+$",
    "(",
    "x" * 100_000,
    [],
    {},
    [None],
    [[]],
    [1, "a"],
    {"": 1},
    {"a": {"b": []}},
    ["q_proj", "q_proj"],
    [["q_proj"]],
    [-1],
    [2**70],
    list(range(1000)),
]


def strange(rng: random.Random) -> Any:
    """A value that may be of any type."""
    return rng.choice(STRANGE)


def dumps(value: Any) -> bytes:
    """As Python writes it, NaN and lone surrogates included."""
    return json.dumps(value).encode()


def _deep(text: str) -> bytes:
    return ("[" * 100_000 + "]" * 100_000).encode()


def _deep_inside(text: str) -> bytes:
    return text.replace("{", '{"x": ' + "[" * 100_000 + "]" * 100_000 + ",", 1).encode()


def _deep_objects(text: str) -> bytes:
    return text.replace("{", '{"x": ' + '{"a":' * 900 + "1" + "}" * 900 + ",", 1).encode()


WHOLE: dict[str, Callable[[str], bytes]] = {
    "deep": _deep,
    "deep inside": _deep_inside,
    "deep objects": _deep_objects,
    "50 MB of space": lambda text: b" " * 50_000_000 + text.encode(),
    "50 MB of space after": lambda text: text.encode() + b" " * 50_000_000,
    "a string of 50 MB": lambda text: text.replace(
        "{", '{"x": "' + "y" * 50_000_000 + '",', 1
    ).encode(),
    "many lists": lambda text: text.replace(
        "{", '{"x": [' + "[]," * 10_000_000 + "1],", 1
    ).encode(),
    "many keys": lambda text: text.replace(
        "{", "{" + "".join(f'"x{i}": null,' for i in range(300_000)), 1
    ).encode(),
    "huge number": lambda text: text.replace("{", '{"x": ' + "9" * 1_000_000 + ",", 1).encode(),
    "huge float": lambda text: text.replace("{", '{"x": 1e999,', 1).encode(),
    "NaN": lambda text: text.replace("{", '{"x": NaN,', 1).encode(),
    "infinity": lambda text: text.replace("{", '{"x": -Infinity,', 1).encode(),
    "duplicate": lambda text: _duplicated(text).encode(),
    "BOM": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-32": lambda text: text.encode("utf-32-le"),
    "latin-1": lambda text: text.replace("{", '{"\u00e9": null,', 1).encode("latin-1"),
    "comment": lambda text: b"// hello\n" + text.encode(),
    "trailing comma": lambda text: text.rstrip().rstrip("}").encode() + b",}",
    "twice": lambda text: (text + text).encode(),
    "lone surrogate": lambda text: text.replace("{", '{"\\ud800": null,', 1).encode(),
    "control": lambda text: text.replace("{", '{"\x01": null,', 1).encode(),
    "single quotes": lambda text: text.replace('"', "'").encode(),
    "spaced": lambda text: json.dumps(json.loads(text), indent=9).encode(),
    "a list": lambda text: b"[" + text.encode() + b"]",
    "a string": lambda text: json.dumps(text).encode(),
}
# Too slow to be drawn as often as the others.
LARGE = {"50 MB of space", "50 MB of space after", "a string of 50 MB", "many lists", "many keys"}


def _duplicated(text: str) -> str:
    values = json.loads(text)
    key = sorted(values)[0]
    return text.replace("{", "{" + json.dumps(key) + ": null,", 1)


def rewritten(rng: random.Random, text: str) -> tuple[str, bytes]:
    """(what was done, the new text)."""
    name = rng.choice(sorted(WHOLE))
    if name in LARGE and rng.random() < 0.85:
        name = "duplicate"
    return name, WHOLE[name](text)
