"""Log likelihoods in chunks are those of whole logits, whatever a model does with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

import lamina
from lamina.training.evaluate import likelihood
from lamina.training.evaluate.likelihood import Labelled, negative_log_likelihoods
from tests import models

_TINY = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": models.HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "Gemma2": {"final_logit_softcapping": 0.05},
    "Cohere": {"logit_scale": 9.0},
    "Granite": {"logits_scaling": 0.1},
    "Qwen3Moe": {**_MIXTURE, "output_router_logits": True},
    "Mistral": {"sliding_window": 5},
    # Its head reads a part of its body, which is passed over.
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "Mamba": {"state_size": 4},
}


def made(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**_TINY, **KINDS[kind])
    with models.seeded(0):
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def sequences(*sizes: int) -> list[Labelled]:
    """Some tokens of each count, drawn; one sequence has none that does."""
    generator = torch.Generator().manual_seed(3)
    drawn = []
    for number, size in enumerate(sizes):
        ids = torch.randint(3, models.VOCABULARY, (size,), generator=generator).int()
        labels = torch.rand(size, generator=generator) < 0.6
        labels[0] = False
        drawn.append(Labelled(ids, labels & (number != 1)))
    return drawn


def by_hand(each: Labelled, model: Any) -> float:
    """One sequence, all logits, one token after the other."""
    with torch.no_grad():
        logits = model(input_ids=each.ids[None].long()).logits[0].double()
    return math.fsum(
        -float(logits[place - 1].log_softmax(-1)[each.ids[place]])
        for place in range(1, len(each.ids))
        if each.labels[place]
    )


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_no_chunk_changes_what_is_summed(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(likelihood, "_LOGITS", chunk * models.VOCABULARY)
    model, drawn = models.tiny_llama(), sequences(9, 4, 12, 2, 7)
    found = negative_log_likelihoods(drawn, model, batch_size=2)
    expected = torch.tensor([by_hand(each, model) for each in drawn], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found[1] == 0


def test_no_more_logits_are_made_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_LOGITS", 5 * models.VOCABULARY)
    model, seen = models.tiny_llama(), []
    hook = lambda module, inputs, output: seen.append(output.shape[:-1].numel())  # noqa: E731
    model.lm_head.register_forward_hook(hook)
    drawn = sequences(12, 12, 12)
    negative_log_likelihoods(drawn, model, batch_size=3)
    # One of the first is of each sequence, for the shape of the output alone.
    assert seen[0] == 3
    assert max(seen) <= 5
    assert sum(seen[1:]) == sum(each.count for each in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_what_models_do_with_logits_is_done(kind: str) -> None:
    model, drawn = made(kind), sequences(9, 4, 12)
    found = negative_log_likelihoods(drawn, model, batch_size=3)
    expected = [by_hand(each, model) for each in drawn]
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-5, atol=1e-6)


def test_adapters_of_body_and_head_have_their_part() -> None:
    base = models.tiny_gpt2()
    config = lamina.LoraConfig(
        r=2, target_modules=["c_attn", "lm_head"], init_lora_weights=False, fan_in_fan_out=True
    )
    plain = negative_log_likelihoods(sequences(9, 4), base, batch_size=2)
    with models.seeded(1):
        model = lamina.get_peft_model(base, config).eval()
    drawn = sequences(9, 4)
    found = negative_log_likelihoods(drawn, model, batch_size=2)
    expected = [by_hand(each, model) for each in drawn]
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-6, atol=1e-6)
    assert abs(found[0] - plain[0]) > 1e-3


def test_half_precision_is_summed_in_single() -> None:
    model = models.tiny_llama().bfloat16()
    drawn = sequences(40, 30)
    found = negative_log_likelihoods(drawn, model, batch_size=1)
    expected = [by_hand(each, model) for each in drawn]
    torch.testing.assert_close(found.tolist(), expected, rtol=2e-3, atol=0.0)


def test_a_body_that_fails_leaves_its_forward() -> None:
    model = models.tiny_llama()
    forward = model.model.forward
    with pytest.raises(IndexError):
        negative_log_likelihoods(
            [Labelled(torch.tensor([1, 99]).int(), torch.tensor([False, True]))],
            model,
            batch_size=1,
        )
    assert model.model.forward == forward
    assert "forward" not in vars(model.model)
