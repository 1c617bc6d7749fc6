"""Pieces of text, put together, are the text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lamina.demo.run import SHIPPED_BASE
from lamina.training.conversing.streaming import Written


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(SHIPPED_BASE))


def pieces_of(tokenizer: Any, tokens: list[int]) -> list[str]:
    pieces: list[str] = []
    written = Written(tokenizer, pieces.append)
    for token in tokens:
        written.put(token)
    written.end()
    return pieces


@settings(max_examples=60)
@given(tokens=st.lists(st.integers(0, 4095), max_size=40))
def test_all_pieces_are_the_whole_whatever_the_tokens(tokenizer: Any, tokens: list[int]) -> None:
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_no_character_comes_before_it_is_whole(tokenizer: Any) -> None:
    text = "Grüße an 北京 \N{SNAKE}!"
    pieces = pieces_of(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_words_keep_their_blanks_where_a_beginning_loses_its_own() -> None:
    """As sentencepiece does: a text's first token is written without its blank."""

    class Pieces:
        words = ("", "▁the", "▁cat", "s", "▁sat")

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join(self.words[token] for token in tokens).replace("▁", " ").lstrip(" ")

    assert pieces_of(Pieces(), [1, 2, 3, 4, 0, 1]) == ["the", " cat", "s", " sat", " the"]
