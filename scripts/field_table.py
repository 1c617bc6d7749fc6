"""Write docs/fields.md: every field of `LoraConfig`, honoured or refused, from the code."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from lamina.config import LoraConfig
from lamina.config.support import NOT_SUPPORTED

TABLE = Path(__file__).resolve().parent.parent / "docs" / "fields.md"
_HEAD = """# The fields of LoraConfig

Names and defaults are those of peft 0.21.2. A field is honoured, or refused by name: none is
ignored. Written by `python scripts/field_table.py` from the class and its docstring.

| field | default | | what it is |
|---|---|---|---|
"""


def described() -> dict[str, str]:
    """field -> what the docstring says of it."""
    text = inspect.cleandoc(LoraConfig.__doc__ or "")
    body = text.partition("Args:\n")[2].partition("\nRaises:")[0]
    found: dict[str, str] = {}
    name = ""
    for line in body.splitlines():
        begins = re.match(r" {4}(\w+): (.*)", line)
        if begins:
            name, found[begins[1]] = begins[1], begins[2]
        elif line.strip():
            found[name] += " " + line.strip()
    return found


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as code; of settings, their class."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    made = field.default_factory() if callable(field.default_factory) else None
    return f"{type(made).__name__}()" if dataclasses.is_dataclass(made) else repr(made)


def table() -> str:
    """The page."""
    texts = described()
    rows = [
        f"| `{field.name}` | `{default_of(field)}` "
        f"| {'refused' if field.name in NOT_SUPPORTED else 'honoured'} "
        f"| {texts[field.name].replace('|', chr(92) + '|')} |"
        for field in dataclasses.fields(LoraConfig)
    ]
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(TABLE)
