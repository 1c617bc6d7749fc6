"""How a model goes on with the prompts of a plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lamina.errors import DataError
from lamina.stages.tokenizers import tokenizer_digest
from lamina.training.data.chat import unrendered
from lamina.training.evaluate.generating import end_tokens, generate
from lamina.training.evaluate.scores import Answer
from lamina.training.plan.schema import Prompt

# Changes where the same prompts would be answered otherwise.
_VERSION = 1


def answers(
    prompts: Sequence[Prompt], model: Any, tokenizer: Any, *, batch_size: int
) -> tuple[Answer, ...]:
    """What a model answers, greedily; it is left as it is.

    Args:
        prompts: of a plan.
        model: a causal language model, adapted or not.
        tokenizer: of it, with the chat template.
        batch_size: prompts at a time.

    Raises:
        DataError: with every prompt that can't be put to the model.
    """
    ids = prompts_as_tokens(prompts, tokenizer)
    ends = end_tokens(model, tokenizer)
    found: dict[int, Answer] = {}
    for room in dict.fromkeys(each.max_new_tokens for each in prompts):
        places = [i for i, each in enumerate(prompts) if each.max_new_tokens == room]
        told = generate(
            model,
            tokenizer,
            [ids[place] for place in places],
            max_new_tokens=room,
            batch_size=batch_size,
        )
        for place, tokens in zip(places, told, strict=True):
            found[place] = answer_of(prompts[place].text, tokens, tokenizer, ends)
    return tuple(found[place] for place in range(len(prompts)))


def answer_of(prompt: str, tokens: Sequence[int], tokenizer: Any, ends: frozenset[int]) -> Answer:
    """An answer of tokens that `generate` gave, the end token among them."""
    ended = bool(tokens) and tokens[-1] in ends
    said = tokens[:-1] if ended else tokens
    text = tokenizer.decode(said, skip_special_tokens=True)
    return Answer(prompt=prompt, text=text, tokens=len(said), ended=ended)


def answers_hash(prompts: Sequence[Prompt], tokenizer: Any) -> str:
    """SHA-256 of what answers depend on beside the model: the prompts' tokens, and the tokenizer.

    Raises:
        DataError: with every prompt that can't be put to a model.
    """
    told = {
        "version": _VERSION,
        "prompts": [
            [prompt.text, ids, prompt.max_new_tokens]
            for prompt, ids in zip(prompts, prompts_as_tokens(prompts, tokenizer), strict=True)
        ],
        "tokenizer": tokenizer_digest(tokenizer),
        "end": tokenizer.eos_token_id,
    }
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def prompts_as_tokens(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """The tokens of prompts: of a user's message in the chat template, or of the text alone.

    Raises:
        DataError: with every prompt that has none.
    """
    found: list[list[int]] = []
    faults = []
    for number, prompt in enumerate(prompts, 1):
        template = bool(tokenizer.chat_template)
        if prompt.chat and not template:
            faults.append(f"prompt {number}: chat is true, and the tokenizer has no chat template")
            continue
        try:
            chat = template if prompt.chat is None else prompt.chat
            message = {"role": "user", "content": prompt.text}
            ids = as_asked([message], tokenizer) if chat else as_text(prompt.text, tokenizer)
        except DataError as error:
            faults.append(f"prompt {number}: {error.what}")
            continue
        if not ids:
            faults.append(f"prompt {number}: {prompt.text!r} has no tokens")
        found.append(ids)
    if faults:
        raise DataError(
            "These prompts can't be put to the model.",
            faults=faults,
            cure="chat_template: in the plan, a file or the text of a Jinja template; or leave "
            "`chat` out",
        )
    return found


def as_asked(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    """The tokens of a conversation in the chat template, up to where the assistant answers.

    Raises:
        DataError: the template can't render it.
    """
    try:
        told = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:
        # Templates raise whatever Jinja and their authors like.
        cure = "another chat template, or messages that it takes"
        raise unrendered(messages, error, cure) from error
    return list(told["input_ids"])


def as_text(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that is gone on with."""
    # verbose=False: whether it fits into the context is checked before it is read.
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token
    if ids and ids[-1] == tokenizer.eos_token_id and not (end and text.endswith(end)):
        # Some tokenizers end every text; here it isn't over.
        ids.pop()
    return ids
