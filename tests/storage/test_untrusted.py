"""Files that anyone may have written: no pipe is waited for, no JSON takes what it likes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from lamina.errors import CheckpointError, MissingFileError
from lamina.storage.untrusted import open_regular, parse_json, read_json


def test_what_json_is_read() -> None:
    value = {"a": [1, 2.5, None, True], "é": {"😀": "\\"}, "deep": [[[[[]]]]]}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ('{"x": {"a": 1, "a": 1}}', "'a' twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "too large a number"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 100 deep"),
        ('{"\\ud800": 1}', "surrogate"),
        ('["\\udc00\\ud800"]', "surrogate"),
        ("{} {}", "Extra data"),
        ("", "Expecting value"),
        ("{'a': 1}", "property name"),
        (b"\xff\xfe{\0}\0", "decode"),
        (b'{"\xe9": 1}', "decode"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("9" * 5_000, "limit"),
    ],
)
def test_what_readers_would_understand_differently_is_refused(text: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_json(text)


def test_pairs_of_surrogates_are_characters() -> None:
    assert parse_json('"\\ud83d\\ude00"') == "😀"


def test_many_small_parts_are_refused_before_they_take_memory() -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match="more than 2,000,000 parts"):
        parse_json("[" + "[]," * 1_000_000 + "1]")
    assert time.process_time() - began < 1


def test_a_missing_file_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MissingFileError):
        read_json(tmp_path / "x.json")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("target", ["/dev/zero", "/", "x"])
def test_links_to_what_is_no_file(tmp_path: Path, target: str) -> None:
    # The last one is a link to itself.
    (tmp_path / "x").symlink_to(target)
    with pytest.raises(CheckpointError, match="can't be read"):
        open_regular(tmp_path / "x")


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("[1]")
    (tmp_path / "x").symlink_to(tmp_path / "blob")
    assert read_json(tmp_path / "x") == [1]


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 5_000):
        with pytest.raises(CheckpointError):
            open_regular(tmp_path / name)
