"""What a message may hold when the names in it are from a file of somebody else."""

from __future__ import annotations

import pickle

from lamina.errors import CheckpointError, escaped


def test_control_characters_and_what_turns_lines_around_are_escapes() -> None:
    hostile = "a\x1b[2J\x07b\u202ec\u2066d\x9be\ud800f\rg\x00"
    error = CheckpointError(f"{hostile} is broken.", faults=[hostile], cure=hostile)
    shown = r"a\u001b[2J\u0007b\u202ec\u2066d\u009be\ud800f\u000dg\u0000"
    assert error.what == f"{shown} is broken."
    assert error.faults == (shown,)
    assert error.cure == shown
    str(error).encode()


def test_all_other_characters_stay() -> None:
    text = "zwei\tZeilen\nmit é, e\u0301, 模型 and 😀, \\u202e"
    assert escaped(text) == text
    assert CheckpointError(text).what == text


def test_no_message_is_as_long_as_a_file() -> None:
    error = CheckpointError("x" * 1_000_000, faults=["y" * 1_000_000] * 1_000)
    assert len(error.what) < 5_000
    assert error.what.endswith("x")
    assert len(error.faults) == 100
    assert error.faults[-1] == "and 901 more"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
