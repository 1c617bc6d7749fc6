"""How warnings look on the terminal."""

from __future__ import annotations

import warnings

import pytest

from lamina.cli.terminal import shown_warnings
from lamina.errors import MismatchWarning


def test_warnings_of_the_library_look_like_its_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as theirs, shown_warnings():
        warnings.simplefilter("always")
        warnings.warn("runs/chat: another\x1b[2J base.", MismatchWarning, stacklevel=1)
        warnings.warn("of somebody else", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: runs/chat: another\\u001b[2J base.\n"
    assert [str(each.message) for each in theirs] == ["of somebody else"]
