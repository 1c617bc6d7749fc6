"""Where something new is saved, and what comes along from where it was read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.errors import CheckpointError
from lamina.storage.companions import copy_tokenizer
from lamina.storage.destination import check_destination


def test_a_new_or_empty_place(tmp_path: Path) -> None:
    assert check_destination(tmp_path / "a" / "b", [tmp_path]) == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    assert check_destination(str(tmp_path / "empty"), ["owner/name"]) == tmp_path / "empty"
    assert not (tmp_path / "a").exists()


def test_files_that_are_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(CheckpointError) as caught:
        check_destination(tmp_path, [])
    assert caught.value.faults == ("it has 'x.txt'",)
    assert check_destination(tmp_path, [], force=True) == tmp_path


@pytest.mark.parametrize("spelt", ["one", "two/../one", "nowhere/../one", "link", "one/."])
def test_the_source_in_any_spelling(tmp_path: Path, spelt: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    with pytest.raises(CheckpointError, match="what is read from"):
        check_destination(tmp_path / spelt, [tmp_path / "one"], force=True)
    assert check_destination(tmp_path / "two", [tmp_path / "one"], force=True)


def test_a_tokenizer_and_nothing_else_comes_along(tmp_path: Path) -> None:
    for folder in ("from", "to"):
        (tmp_path / folder).mkdir()
    for name in ("tokenizer.json", "vocab.txt", "adapter_config.json", "notes.txt"):
        (tmp_path / "from" / name).write_text(name)
    assert copy_tokenizer(tmp_path / "from", tmp_path / "to") == ("tokenizer.json", "vocab.txt")
    assert {file.name for file in (tmp_path / "to").iterdir()} == {"tokenizer.json", "vocab.txt"}
    assert (tmp_path / "to" / "vocab.txt").read_text() == "vocab.txt"
    assert copy_tokenizer("owner/name", tmp_path / "to") == ()
