"""The table of fields in the docs is what the code says, field by field."""

from __future__ import annotations

import dataclasses

from lamina.config import LoraConfig
from lamina.config.support import NOT_SUPPORTED
from scripts.field_table import TABLE, described, table


def test_the_table_is_up_to_date() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), "run: python scripts/field_table.py"


def test_every_field_is_described_and_nothing_else() -> None:
    assert described().keys() == {field.name for field in dataclasses.fields(LoraConfig)}


def test_what_is_refused_says_so() -> None:
    texts = described()
    assert all("refused" in texts[name] for name in NOT_SUPPORTED)
    assert not any(
        text.startswith("refused") for n, text in texts.items() if n not in NOT_SUPPORTED
    )
