"""Conversations: what the model is given, and what becomes of the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.errors import DataError, RunError, StageError
from lamina.stages.viewed import Opening, View, open_view
from lamina.training.conversing.conversation import Conversation
from lamina.training.conversing.subject import subject_of
from lamina.training.evaluate.generating import Sampling
from tests.training.conversing.talking import make_run, tokenizer, write_state
from tests.training.evaluate.test_generating import by_hand


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def view(out: Path) -> View:
    return open_view(out / "dpo")


def text_of(view: View, prompt: list[int], count: int) -> str:
    ends = {2, view.tokenizer.eos_token_id}
    tokens = by_hand(view.model, prompt, count, ends)
    return view.tokenizer.decode([token for token in tokens if token not in ends])


def test_messages_go_through_the_template_with_all_that_was_said(view: View) -> None:
    talk = Conversation(view, system="w20", max_new_tokens=4)
    heard: list[str] = []
    first = talk.say("w5 w6", lambda piece: not heard.append(piece))
    assert first.text == text_of(view, [10, 20, 11, 5, 6, 12], 4)
    assert "".join(heard) == first.text
    assert (first.stage, first.question, first.tokens) == ("dpo", "w5 w6", 4)
    said = view.tokenizer(first.text)["input_ids"]
    second = talk.say("w7")
    assert second.text == text_of(view, [10, 20, 11, 5, 6, 12, *said, 11, 7, 12], 4)
    talk.reset()
    assert talk.say("w5 w6").text == first.text
    assert len(talk.messages) == 2


def test_without_a_template_what_was_said_is_one_text(view: View, out: Path) -> None:
    plain = View(
        view.model, tokenizer(None), view.base, view.stages, view.shown, view.find, verify=False
    )
    talk = Conversation(plain, max_new_tokens=3)
    first = talk.say("w5 w6")
    assert first.text == text_of(plain, [5, 6], 3)
    said = plain.tokenizer(first.text)["input_ids"]
    assert talk.say("w7").text == text_of(plain, [5, 6, *said, 7], 3)
    with pytest.raises(DataError, match="no chat template"):
        Conversation(plain, system="w20")


def test_whoever_is_shown_answers_and_knows_what_was_said(view: View) -> None:
    talk = Conversation(view, max_new_tokens=4)
    said = view.tokenizer(talk.say("w5").text)["input_ids"]
    view.show(None)
    answer = talk.say("w7")
    with view.model.disable_adapter():
        expected = text_of(view, [11, 5, 12, *said, 11, 7, 12], 4)
    assert (answer.stage, answer.text) == (None, expected)
    view.show("dpo")


def test_an_answer_can_be_stopped_and_is_remembered_as_far_as_it_came(view: View) -> None:
    talk = Conversation(view, max_new_tokens=10)
    whole = talk.say("w5")
    talk.reset()
    asked = 0

    def until_third(piece: str) -> bool:
        nonlocal asked
        asked += not piece
        return asked < 3

    cut = talk.say("w5", until_third)
    assert cut.stopped
    assert not cut.ended
    assert cut.tokens == 3
    assert whole.text.startswith(cut.text)
    assert talk.messages[-1] == {"role": "assistant", "content": cut.text}
    assert not whole.stopped


def test_nothing_was_said_after_an_error(view: View) -> None:
    talk = Conversation(view, max_new_tokens=4)
    talk.say("w5")
    before = list(talk.messages)

    def broken(piece: str) -> bool:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        talk.say("w6", broken)
    assert talk.messages == before
    too_long = " ".join(["w5"] * 200)
    with pytest.raises(DataError, match="can't be gone on with"):
        talk.say(too_long)
    assert talk.messages == before


def test_the_oldest_messages_are_forgotten_where_the_context_ends(view: View) -> None:
    talk = Conversation(view, max_new_tokens=20)
    replies = [talk.say("w5 " * 10) for _ in range(6)]
    # Each exchange takes up 32 of 128 tokens.
    assert [reply.forgotten for reply in replies[:3]] == [0, 0, 0]
    assert sum(reply.forgotten for reply in replies) > 0
    assert all(reply.tokens > 0 for reply in replies)
    assert talk.messages[0]["role"] == "user"


def test_draws_are_by_their_seed(view: View) -> None:
    def drawn(seed: int) -> str:
        sampling = Sampling(temperature=3.0, seed=seed)
        return Conversation(view, max_new_tokens=12, sampling=sampling).say("w5").text

    state = torch.random.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_run_is_talked_to_by_its_last_stage_that_counts(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert not subject_of(folder / "chat").is_run
    write_state(folder, rolled_back=("dpo",))
    subject = subject_of(folder)
    assert subject.chain == ("domain", "chat")
    assert subject.rolled_back == ("dpo",)
    view = subject.view(None, Opening())
    assert view.shown == "chat"
    assert view.stages == ("domain", "chat", "dpo")
    view.show("dpo")
    assert subject.view("domain", Opening()).shown == "domain"
    with pytest.raises(StageError, match="choose 'chat'"):
        subject.view("chatt", Opening())
    write_state(folder, rolled_back=("domain", "chat", "dpo"))
    with pytest.raises(RunError, match="counts yet") as caught:
        subject_of(folder)
    assert list(caught.value.faults) == [f"{n}: rolled back" for n in ("domain", "chat", "dpo")]


def test_a_hub_id_is_left_to_be_found(tmp_path: Path) -> None:
    subject: Any = subject_of("someone/adapter")
    assert (subject.path, subject.is_run) == ("someone/adapter", False)
