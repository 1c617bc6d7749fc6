"""Text as its tokens come, one by one: no character before it is whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# What a tokenizer puts for bytes that are no whole character.
_TORN = "\N{REPLACEMENT CHARACTER}"


class Written:
    """Turns tokens into text, and passes on what is certain of it.

    What is passed on is, put together, the text of all tokens. Tokens are decoded with the ones
    before them, since some are written otherwise at the beginning of a text.

    Args:
        tokenizer: special tokens of it are left out.
        heard: is told of every piece.
    """

    def __init__(self, tokenizer: Any, heard: Callable[[str], object]) -> None:
        self._tokenizer, self._heard = tokenizer, heard
        self._tokens: list[int] = []
        # Of tokens: those before `_told` are passed on, those from `_from` are decoded again.
        self._from = self._told = 0

    def put(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        text = self._decoded(self._from, None)
        if not text.endswith(_TORN):
            self._pass_on(text)

    def end(self) -> None:
        """There are no more: what is torn stays so."""
        self._pass_on(self._decoded(self._from, None))

    def _pass_on(self, text: str) -> None:
        before = self._decoded(self._from, self._told)
        if len(text) > len(before):
            self._heard(text[len(before) :])
            self._from, self._told = self._told, len(self._tokens)

    def _decoded(self, start: int, end: int | None) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
        return text
