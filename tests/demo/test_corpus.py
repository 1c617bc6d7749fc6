from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.demo import corpus, sources
from lamina.demo.corpus import STAGE_PACKAGES, Text, base_text, stage_texts
from lamina.errors import LaminaError

PRINT_DIGEST = """
import hashlib
from lamina.demo.corpus import stage_texts
print(hashlib.sha256(repr(stage_texts()).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def texts() -> tuple[Text, Text, Text]:
    return stage_texts()


@pytest.fixture(scope="module")
def base() -> Text:
    return base_text()


def _paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def _lines(text: str) -> set[str]:
    """Lines long enough that two documents don't share them by chance."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 50}


def test_there_are_three_kinds_of_text_within_their_limits(texts: tuple[Text, Text, Text]) -> None:
    assert [text.name for text in texts] == ["prose", "code", "docstrings"]
    for text in texts:
        assert 200_000 < len(text.train) <= corpus.TRAIN_CHARS
        assert 20_000 < len(text.held_out) <= corpus.HELD_OUT_CHARS


def test_two_processes_with_different_hash_seeds_read_the_same_text() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(corpus.__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_no_paragraph_is_both_read_and_held_out(texts: tuple[Text, Text, Text], base: Text) -> None:
    for text in (*texts, base):
        assert not _paragraphs(text.train) & _paragraphs(text.held_out), text.name


def test_the_base_has_read_next_to_nothing_of_the_stages(
    texts: tuple[Text, Text, Text], base: Text
) -> None:
    read = _lines(base.train) | _lines(base.held_out)
    for text in texts:
        known = _lines(text.held_out) & read
        # What is left are boilerplate lines that modules copy from each other.
        assert len(known) < 0.02 * len(_lines(text.held_out)), (text.name, sorted(known)[:5])


def test_stage_packages_are_in_every_python_and_none_is_the_bases() -> None:
    packages = {module.package for module in sources.library_modules()}
    assert packages >= STAGE_PACKAGES
    assert not STAGE_PACKAGES & corpus.NEVER_READ
    assert corpus.CODE_PACKAGES <= STAGE_PACKAGES


def test_code_is_code_without_strings_that_say_what_it_does() -> None:
    tree = ast.parse(
        '"""Module."""\n# comment\nclass A:\n    """Class."""\n'
        'def f(x):\n    """Say f."""\n    return "kept"  # comment\n'
        'async def g():\n    await f(1)\n    "a string as a comment"\n'
        'if f:\n    "only a string"\n'
    )
    code = sources.bare_code(tree)
    assert code.split("\n\n") == [
        "class A:\n    pass",
        "def f(x):\n    return 'kept'",
        "async def g():\n    await f(1)\nif f:\n    pass",
    ]
    ast.parse(code)


def test_docstrings_stand_in_source_order_under_what_they_describe() -> None:
    tree = ast.parse(
        '"""Module."""\n'
        "def plain(): pass\n"
        'class A(B):\n    """Class.\n\n    More.\n    """\n'
        '    def f(self, x: int = 1, *, y):\n        """Do f."""\n'
        'async def g(*a):\n    """Do g."""\n'
        'def blank():\n    """   """\n'
    )
    assert sources.bare_docstrings(tree) == (
        "Module.\n\nclass A\nClass.\n\nMore.\n\nA.f(self, x: int=1, *, y)\nDo f.\n\ng(*a)\nDo g."
    )


def test_a_paragraph_that_is_held_out_leaves_the_training_text_however_indented() -> None:
    held_out = "Kept\napart.\n\nAlso apart."
    train = "First.\n\n   Kept\n   apart.\n\nLast."
    assert corpus._without(held_out, train) == "First.\n\nLast."


def test_a_python_without_its_source_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(LaminaError, match="no source files of its standard library"):
        stage_texts()


def test_a_python_without_help_topics_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(LaminaError, match=r"no pydoc_data\.topics"):
        stage_texts()
