"""Functions of the user's, found as a new process would find them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamina.errors import PlanError
from lamina.training.trainers.functions import find_function, importable

NAME = "judged_by_tests:score"


def write(folder: Path, value: int, age: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / "judged_by_tests.py"
    file.write_text(f"def score():\n    return {value}  # {'x' * value}\n")
    os.utime(file, (1_000_000 + age, 1_000_000 + age))


def found(folder: Path) -> object:
    with importable(folder):
        return find_function(NAME)()


def test_an_edited_function_and_that_of_another_folder_are_taken(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, 1)
    write(two, 2)
    assert (found(one), found(two), found(one)) == (1, 2, 1)
    write(one, 3, age=5)
    assert found(one) == 3
    with importable(one):
        assert find_function(NAME) is find_function(NAME)


def test_what_is_not_there_is_told_with_what_is(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with importable(tmp_path), pytest.raises(PlanError, match="did you mean 'score'"):
        find_function("judged_by_tests:scor")
    with pytest.raises(PlanError, match="can't be imported"):
        find_function("no_such_module_of_tests:score")
