"""A conversation with what a view shows: its history, and answers as they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lamina.errors import DataError
from lamina.stages.viewed import View
from lamina.training.conversing.streaming import Written
from lamina.training.evaluate.answers import as_asked, as_text
from lamina.training.evaluate.generating import GREEDY, Sampling, context_of, end_tokens, go_on

Message = dict[str, str]

# The share of the context that is kept free for an answer, however long the conversation.
_FREE = 4


@dataclass(frozen=True)
class Reply:
    """What was answered.

    Attributes:
        stage: that answered; None is the base.
        question: what was said.
        text: the answer, without special tokens.
        tokens: how many.
        ended: whether it came to an end by itself.
        stopped: whether it was ended from outside.
        forgotten: messages that no longer fit into the model's context, and are forgotten.
        seconds: that it took.
    """

    stage: str | None
    question: str
    text: str
    tokens: int
    ended: bool
    stopped: bool
    forgotten: int
    seconds: float


class Conversation:
    """What was said so far, and how to go on.

    With a chat template, messages are rendered by it. Without one, what was said is one text, a
    line break between two messages, and an answer is how the model goes on with it.

    Args:
        view: whoever it shows answers; that may change between two answers.
        system: a message that stands before all others.
        max_new_tokens: of an answer.
        sampling: how tokens are chosen.

    Raises:
        DataError: there is a system message and no chat template.
    """

    def __init__(
        self,
        view: View,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
    ) -> None:
        self.view, self.system = view, system
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.messages: list[Message] = []
        if system and not self.has_template:
            raise DataError(
                "There is no chat template to put a system message into.",
                cure="leave it out, or give a tokenizer that has a template: --tokenizer DIR",
            )

    @property
    def has_template(self) -> bool:
        """Whether messages are rendered by a chat template."""
        return bool(self.view.tokenizer.chat_template)

    def reset(self) -> None:
        """Forget all that was said."""
        self.messages.clear()

    def say(self, text: str, heard: Callable[[str], bool] = lambda piece: True) -> Reply:
        """Say something, and hear the answer as it is written.

        Args:
            text: what is said.
            heard: is told of every piece of text, and asked with an empty one at every token;
                False ends the answer.

        Raises:
            DataError: the template refuses it, or it alone fills the model's context. Nothing was
                said then.
        """
        began = time.monotonic()
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            prompt, forgotten = self._prompt()
            reply = self._answered(prompt, text, forgotten, heard, began)
        except BaseException:
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": reply.text})
        return reply

    def _answered(
        self,
        prompt: list[int],
        text: str,
        forgotten: int,
        heard: Callable[[str], bool],
        began: float,
    ) -> Reply:
        view, stopped = self.view, False
        written = Written(view.tokenizer, heard)

        def on_token(token: int) -> bool:
            nonlocal stopped
            written.put(token)
            stopped = not heard("")
            return not stopped

        tokens = go_on(
            view.model,
            view.tokenizer,
            prompt,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            heard=on_token,
        )
        written.end()
        ended = bool(tokens) and tokens[-1] in end_tokens(view.model, view.tokenizer)
        said = tokens[:-1] if ended else tokens
        return Reply(
            stage=view.shown,
            question=text,
            text=view.tokenizer.decode(said, skip_special_tokens=True),
            tokens=len(said),
            ended=ended,
            stopped=stopped,
            forgotten=forgotten,
            seconds=round(time.monotonic() - began, 3),
        )

    def _prompt(self) -> tuple[list[int], int]:
        """The tokens of the conversation; of the oldest messages, how many had to be forgotten."""
        context = context_of(self.view.model)
        forgotten = 0
        while True:
            tokens = self._rendered()
            free = 0 if context is None else min(self.max_new_tokens, context // _FREE)
            if context is None or len(tokens) + free <= context or len(self.messages) == 1:
                return tokens, forgotten
            # A question goes with its answer.
            del self.messages[:2]
            forgotten += 2

    def _rendered(self) -> list[int]:
        tokenizer = self.view.tokenizer
        if self.has_template:
            first = [{"role": "system", "content": self.system}] if self.system else []
            return as_asked([*first, *self.messages], tokenizer)
        return as_text("\n".join(each["content"] for each in self.messages), tokenizer)
