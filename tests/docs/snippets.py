"""The Python of a document, run in order, and what the document says that it prints.

A block marked `text` right after a block marked `python` is what the latter prints.
`python -m tests.docs.snippets FILE...` runs documents and writes what they print into them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?P<gap>\n*)(?P<told>^```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_FRACTION = re.compile(r"\d+\.\d+")
# How far a figure with a point may lie from the one in the document: machines round differently.
_TOLERANCE = 0.3
_FLOOR = 0.2


@dataclass(frozen=True)
class Snippet:
    """One block: its first line in the document, its code, and what it is said to print."""

    line: int
    code: str
    output: str


def snippets(document: Path) -> list[Snippet]:
    """The blocks of a document in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Snippet(text.count("\n", 0, match.start("code")) + 1, match["code"], match["output"] or "")
        for match in _BLOCK.finditer(text)
    ]


def run(document: Path) -> list[str]:
    """Run all blocks in one namespace, in the working directory; returns what each printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for snippet in snippets(document):
        # Blank lines in front make the line numbers of a traceback those of the document.
        code = compile("\n" * (snippet.line - 1) + snippet.code, str(document), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
        printed.append(out.getvalue())
    return printed


def same_output(told: str, printed: str) -> bool:
    """Whether two texts are the same but for trailing blanks and small changes of fractions."""
    one, other = (
        "\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (told, printed)
    )
    if _FRACTION.sub("#", one) != _FRACTION.sub("#", other):
        return False
    pairs = zip(_numbers(one), _numbers(other), strict=True)
    return all(abs(a - b) <= max(_FLOOR, _TOLERANCE * max(a, b)) for a, b in pairs)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _FRACTION.findall(text)]


def skeleton(code: str) -> list[str]:
    """The tokens of a block without comments, blank lines and the text of strings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [
        "STRING" if token.type in _STRINGS else token.string
        for token in tokens
        if token.type not in skipped
    ]


# Python 3.12 and newer take f-strings apart; their literal parts count as strings too.
_STRINGS = {
    tokenize.STRING,
    *(getattr(tokenize, name) for name in ("FSTRING_MIDDLE",) if hasattr(tokenize, name)),
}


def write_outputs(document: Path) -> None:
    """Replace what a document says is printed by what is printed."""
    printed = iter(run(document))

    def renew(match: re.Match[str]) -> str:
        output = next(printed).rstrip()
        code = f"```python\n{match['code']}```\n"
        if not output:
            return code + (match["gap"] or "")
        return f"{code}\n```text\n{output}\n```\n" + ("" if match["told"] else match["gap"])

    text = document.read_text(encoding="utf-8")
    document.write_text(_BLOCK.sub(renew, text), encoding="utf-8")


def main() -> None:
    """Renew the documents named on the command line."""
    for name in sys.argv[1:]:
        document = Path(name).resolve()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write_outputs(document)


if __name__ == "__main__":
    main()
