"""Greedy generation: the same whatever is in the batch, and the model left as it was."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lamina.errors import DataError
from lamina.training.evaluate.generating import Sampling, end_tokens, generate, go_on
from tests import models
from tests.stages.chains import fill_trainable, llama_lora
from tests.stages.verifying import words

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [20, 30], [40, 41, 42, 43]]


def tokenizer(end: int | None = 2) -> Any:
    made = words()
    made.eos_token = None if end is None else f"w{end}"
    return made


def by_hand(model: Any, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """The likeliest token, one after another, without padding and without a cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def adapted() -> Any:
    from lamina import get_peft_model

    model = get_peft_model(models.tiny_llama(), llama_lora()).eval()
    fill_trainable(model, size=0.5)
    return model


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_gpt2, adapted])
def test_the_same_as_token_by_token_whatever_the_batch_size(build: Any) -> None:
    model = build()
    free = generate(model, tokenizer(), PROMPTS, max_new_tokens=12, batch_size=1)
    # Tokens that really come up end the answers at different places.
    ends = {free[0][3], free[2][6]}
    model.generation_config.eos_token_id = sorted(ends)
    expected = [by_hand(model, prompt, 12, {*ends, 2}) for prompt in PROMPTS]
    assert len({len(each) for each in expected}) > 1
    for size in (1, 2, 3, 8):
        found = generate(model, tokenizer(), PROMPTS, max_new_tokens=12, batch_size=size)
        assert found == expected


def test_no_warnings_and_nothing_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = models.tiny_llama(pad_token_id=None)
    # As Qwen and Llama are shipped: what would sample, with settings of its own.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, repetition_penalty=5.0, eos_token_id=[2, 3]
    )
    plain = [by_hand(models.tiny_llama(), prompt, 6, {2, 3}) for prompt in PROMPTS]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            found = generate(model, tokenizer(), PROMPTS, max_new_tokens=6, batch_size=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    # Nothing of the model's own settings has a part in it but the end tokens.
    assert found == plain


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=7)])
def test_the_model_and_the_random_state_are_left_as_they_were(sampling: Any) -> None:
    model = adapted().train()
    root = model.get_base_model()
    root.model.layers[0].eval()
    root.config.use_cache = False
    model.gradient_checkpointing_enable()
    config, before = root.generation_config, root.generation_config.to_dict()
    modes = [module.training for module in model.modules()]
    expected = by_hand(adapted(), PROMPTS[0], 5, {2})
    state = torch.random.get_rng_state()
    if sampling is None:
        assert generate(model, tokenizer(), PROMPTS[:1], max_new_tokens=5, batch_size=1) == [
            expected
        ]
    else:
        go_on(model, tokenizer(), PROMPTS[0], max_new_tokens=5, sampling=sampling)
    assert root.generation_config is config
    assert config.to_dict() == before
    assert root.config.use_cache is False
    assert all(layer.gradient_checkpointing for layer in root.model.layers)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_is_left_as_it_was_after_an_error_too() -> None:
    model = models.tiny_llama().train()
    config = model.generation_config

    def refuse(token: int) -> bool:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        go_on(model, tokenizer(), [5], max_new_tokens=5, heard=refuse)
    assert model.generation_config is config
    assert model.training


def test_going_on_tells_every_token_and_ends_when_asked() -> None:
    model = adapted()
    expected = by_hand(model, PROMPTS[0], 10, {2})
    heard: list[int] = []
    told = go_on(
        model, tokenizer(), PROMPTS[0], max_new_tokens=10, heard=lambda t: not heard.append(t)
    )
    assert told == heard == expected
    heard.clear()
    told = go_on(
        model,
        tokenizer(),
        PROMPTS[0],
        max_new_tokens=10,
        heard=lambda t: bool(heard.append(t) or len(heard) < 3),
    )
    assert told == heard == expected[:3]


def test_the_end_token_is_returned_but_not_heard() -> None:
    model = adapted()
    free = by_hand(model, PROMPTS[0], 10, set())
    end = tokenizer(free[4])
    first = free.index(free[4])
    heard: list[int] = []
    told = go_on(model, end, PROMPTS[0], max_new_tokens=10, heard=lambda t: not heard.append(t))
    assert told == free[: first + 1]
    assert heard == free[:first]


def test_sampling_is_by_its_seed() -> None:
    model = models.tiny_llama()

    def drawn(seed: int, **more: Any) -> list[int]:
        sampling = Sampling(temperature=5.0, seed=seed, **more)
        return go_on(model, tokenizer(None), [5], max_new_tokens=20, sampling=sampling)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    # A nucleus of next to nothing is the likeliest token.
    assert drawn(1, top_p=1e-6) == by_hand(model, [5], 20, {2})


def test_answers_end_at_the_end_of_the_context() -> None:
    model = models.tiny_gpt2(n_positions=16)
    long, short = list(range(3, 16)), [5, 6]
    for size in (1, 2):
        found = generate(model, tokenizer(None), [long, short], max_new_tokens=10, batch_size=size)
        assert found == [by_hand(model, long, 3, {2}), by_hand(model, short, 10, {2})]
        assert [len(each) for each in found] == [3, 10]


def test_prompts_that_are_empty_or_too_long_are_all_named() -> None:
    model = models.tiny_llama(max_position_embeddings=8)
    with pytest.raises(DataError) as caught:
        generate(model, tokenizer(), [[], [5], [5] * 8], max_new_tokens=4, batch_size=2)
    assert len(caught.value.faults) == 2
    assert "prompt 1 has no tokens" in caught.value.faults[0]
    assert "prompt 3 has 8 tokens, and the model's context is 8" in caught.value.faults[1]


def test_no_prompts_have_no_answers() -> None:
    assert generate(models.tiny_llama(), tokenizer(), [], max_new_tokens=4, batch_size=2) == []


def test_end_tokens_are_of_tokenizer_and_configs() -> None:
    model = models.tiny_llama(eos_token_id=[2, 7])
    model.generation_config.eos_token_id = [9]
    assert end_tokens(model, tokenizer(4)) == {2, 7, 9, 4}
    assert end_tokens(model, tokenizer(None)) == {2, 7, 9}
