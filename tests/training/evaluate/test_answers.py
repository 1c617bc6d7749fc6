"""Answers to the prompts of a plan."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.errors import DataError
from lamina.training.evaluate.answers import answers, answers_hash, as_text, prompts_as_tokens
from lamina.training.evaluate.generating import generate
from lamina.training.plan.schema import Prompt
from tests import models
from tests.stages.verifying import words

TEMPLATE = (
    "{% for m in messages %}w10 {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w11{% endif %}"
)


def tokenizer(template: str | None = None) -> Any:
    made = words()
    from tokenizers.pre_tokenizers import WhitespaceSplit

    made.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    made.eos_token = "w2"
    made.chat_template = template
    return made


def test_answers_are_in_the_order_of_the_prompts_and_say_whether_they_ended() -> None:
    model, tok = models.tiny_llama(), tokenizer()
    prompts = [
        Prompt(text="w5 w6", max_new_tokens=3),
        Prompt(text="w7", max_new_tokens=8),
        Prompt(text="w9 w8 w7", max_new_tokens=3),
    ]
    ids = [[5, 6], [7], [9, 8, 7]]
    free = [
        generate(model, tok, [row], max_new_tokens=n, batch_size=1)[0]
        for row, n in zip(ids, (3, 8, 3), strict=True)
    ]
    end = free[1][4]
    assert end not in free[1][:4]
    assert end not in free[0] + free[2]
    model.generation_config.eos_token_id = end
    found = answers(prompts, model, tok, batch_size=4)
    assert [each.prompt for each in found] == ["w5 w6", "w7", "w9 w8 w7"]
    assert [each.ended for each in found] == [False, True, False]
    assert [each.tokens for each in found] == [3, 4, 3]
    assert found[1].text == tok.decode(free[1][:4])
    assert found[0].text == tok.decode(free[0])


def test_a_prompt_is_a_users_message_where_there_is_a_template_unless_told_otherwise() -> None:
    prompts = [Prompt(text="w5"), Prompt(text="w5", chat=True), Prompt(text="w5", chat=False)]
    assert prompts_as_tokens(prompts, tokenizer(TEMPLATE)) == [[10, 5, 11], [10, 5, 11], [5]]
    assert prompts_as_tokens(prompts[:1], tokenizer()) == [[5]]


def test_all_prompts_that_can_not_be_put_are_named() -> None:
    prompts = [Prompt(text="w5", chat=True), Prompt(text="w6"), Prompt(text=" ")]
    with pytest.raises(DataError) as caught:
        prompts_as_tokens(prompts, tokenizer())
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["prompt 1", "prompt 3"]
    assert "chat_template" in (caught.value.cure or "")
    refusing = tokenizer("{{ raise_exception('only systems') }}")
    with pytest.raises(DataError) as caught:
        answers(prompts[1:2], models.tiny_llama(), refusing, batch_size=1)
    assert "only systems" in caught.value.faults[0]


def test_an_end_that_the_tokenizer_puts_behind_every_text_is_taken_off() -> None:
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)]
    )
    assert tok("w5")["input_ids"] == [1, 5, 2]
    assert as_text("w5", tok) == [1, 5]


def test_the_hash_tells_what_would_change_the_answers() -> None:
    prompt = Prompt(text="w5 w6")
    same = answers_hash([prompt], tokenizer())
    assert same == answers_hash([Prompt(text="w5 w6", chat=False)], tokenizer())
    others = [
        answers_hash([Prompt(text="w5 w7")], tokenizer()),
        answers_hash([Prompt(text="w5 w6", max_new_tokens=9)], tokenizer()),
        answers_hash([prompt], tokenizer(TEMPLATE)),
        answers_hash([prompt, prompt], tokenizer()),
        answers_hash([], tokenizer()),
    ]
    assert len({same, *others}) == 6
