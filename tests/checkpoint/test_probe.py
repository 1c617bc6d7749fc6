"""Asking a model a few tokens, without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from lamina.checkpoint.probe import (
    ask,
    compare_answers,
    make_probe,
    probe_tokens,
)
from lamina.config import LoraConfig
from lamina.errors import ProbeError
from lamina.model import get_peft_model
from tests import adapters, models, quantised
from tests.checkpoint.probing import TOKENS, asked

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_the_answers_are_the_models_logits() -> None:
    model = models.tiny_llama()
    found = asked(model)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0]
    assert found.tokens == TOKENS
    assert torch.equal(found.values, expected)
    assert (found.kind, found.dtype, found.quantization, found.depth) == (
        "logits",
        "float32",
        None,
        2,
    )


def encoder_decoder() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


def bart_classifier() -> nn.Module:
    # It reads its answer at the end of the text, and fails where there is none.
    return BartForSequenceClassification(
        BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
        )
    )


def vision_and_language() -> nn.Module:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**SMALL),
            vision_config=CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
            ),
            image_token_index=11,
        )
    )


@pytest.mark.parametrize(
    ("build", "shape", "kind"),
    [
        (models.tiny_gpt2, (16, 64), "logits"),
        (models.tiny_bert_classifier, (1, 3), "logits"),
        (encoder_decoder, (16, 64), "logits"),
        (bart_classifier, (1, 3), "logits"),
        (vision_and_language, (16, 64), "logits"),
        (lambda: BertForQuestionAnswering(BertConfig(**SMALL)), (16, 2), "logits"),
        (lambda: BertModel(BertConfig(**SMALL)), (16, 32), "hidden states"),
    ],
)
def test_every_kind_of_model_that_takes_tokens_is_asked(
    build: Callable[[], nn.Module], shape: tuple[int, int], kind: str
) -> None:
    with models.seeded(0):
        model = build().eval()
    found = asked(model)
    assert (tuple(found.values.shape), found.kind) == (shape, kind)
    assert found.is_finite
    assert torch.equal(found.values, asked(model).values)


def test_models_that_take_no_tokens_have_no_answers() -> None:
    sees = ViTModel(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
        )
    )
    for model in (sees, models.perceptron(), models.convolution_net(2), models.embedding_net()):
        assert ask(model) is None
        assert make_probe(model) is None


def test_no_special_token_is_asked() -> None:
    model = vision_and_language()
    assert 11 in TOKENS
    assert 11 not in probe_tokens(model)
    llama = models.tiny_llama(pad_token_id=58, eos_token_id=[41, 24])
    assert not {58, 41, 24} & set(probe_tokens(llama))
    assert len(probe_tokens(llama)) == 16


def test_a_vocabulary_smaller_than_the_probe_is_asked_again_and_again() -> None:
    model = models.tiny_llama(vocab_size=8)
    assert len(probe_tokens(model)) == 16
    assert set(probe_tokens(model)) <= set(range(3, 8))
    assert asked(model).is_finite


def test_alora_is_invoked_or_it_would_answer_as_the_base() -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]
    )
    model = get_peft_model(models.tiny_llama(), config)
    adapters.fill(model)
    tokens = probe_tokens(model)
    assert tokens[8:10] == (5, 9)
    probe = make_probe(model)
    assert probe is not None
    assert probe.base is not None
    assert not compare_answers(probe.base, asked(model)).passed


def test_asking_changes_nothing() -> None:
    model = adapters.llama_adapter(lora_dropout=0.5)
    expected = asked(model)
    model.train()
    model.base_model.model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = True
    seen: list[str] = []
    handle = model.base_model.model.lm_head.register_forward_hook(lambda *_: seen.append("hook"))
    modes = [module.training for module in model.modules()]
    before, flags = adapters.weights(model), adapters.flags(model)
    state = torch.get_rng_state()
    first, second = asked(model), asked(model)
    assert torch.equal(first.values, expected.values), "no dropout"
    assert torch.equal(second.values, expected.values)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert adapters.same(adapters.weights(model), before)
    assert adapters.flags(model) == flags
    assert model.config.use_cache
    assert model.is_gradient_checkpointing
    assert seen == ["hook", "hook"]
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_modes_come_back_where_a_model_fails() -> None:
    model = models.tiny_llama()
    model.train()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ProbeError, match="can't be asked 16 tokens: ZeroDivisionError: division"):
        ask(model)
    assert all(module.training for module in model.modules())


def test_autocast_outside_does_not_count() -> None:
    model = models.tiny_llama()
    expected = asked(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(asked(model).values, expected.values)
        assert torch.is_autocast_enabled("cpu")


def test_products_are_not_rounded_to_tf32() -> None:
    model = models.tiny_llama()
    seen: list[str] = []
    model.lm_head.register_forward_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    torch.set_float32_matmul_precision("high")
    try:
        ask(model)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


def test_random_states_stay_where_a_model_draws_in_eval_mode() -> None:
    model = models.tiny_llama()
    model.lm_head.register_forward_hook(lambda m, a, out: out + torch.rand_like(out))
    state = torch.get_rng_state()
    ask(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_model_is_asked_without_compiling() -> None:
    model = models.tiny_llama()
    expected = asked(model)

    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    model.model.layers[0].compile(backend=refuse)
    assert torch.equal(asked(model).values, expected.values)


def test_codes_are_not_packed_for_inference() -> None:
    # bitsandbytes rearranges the codes for good when a layer answers in eval mode on such a CPU.
    model = models.tiny_llama(hidden_size=64, intermediate_size=64)
    layer: Any = quantised.bnb4(nn.Linear(64, 64, bias=False).requires_grad_(False))
    layer.support_avx512bf16_for_cpu = True
    layer.train()
    model.model.layers[0].mlp.up_proj = layer
    codes = layer.weight.data.clone()
    found = asked(model)
    assert found.quantization == "bitsandbytes nf4"
    assert torch.equal(layer.weight.data, codes)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert layer.training
    assert not model.lm_head.training


class FullyShardedDataParallel(nn.Module):
    """A stand-in: what counts is the name."""


def test_sharded_models_are_not_asked_since_the_others_would_be_waited_for() -> None:
    model = models.tiny_llama()
    model.add_module("part", FullyShardedDataParallel())
    with pytest.raises(ProbeError, match="sharded among processes"):
        ask(model)
    model = models.tiny_llama()
    model.lm_head.weight.ds_id = 3  # type: ignore[assignment]
    with pytest.raises(ProbeError, match="sharded among processes"):
        ask(model)


def test_models_without_weights_are_not_asked() -> None:
    with torch.device("meta"):
        model = models.tiny_llama()
    with pytest.raises(ProbeError, match="meta device"):
        ask(model)


def test_tokens_that_a_vocabulary_lacks() -> None:
    with pytest.raises(ProbeError, match="vocabulary of 64 has no token 640"):
        ask(models.tiny_llama(), [3, 640])
    with pytest.raises(ProbeError, match="no tokens"):
        ask(models.tiny_llama(), [])


def test_a_model_that_takes_other_inputs_too_says_so() -> None:
    with models.seeded(0):
        model = BertForMultipleChoice(BertConfig(**SMALL)).eval()
    with pytest.raises(ProbeError, match="can't be asked"):
        ask(model)


def test_masked_logits_count_for_nothing() -> None:
    model = models.tiny_llama()
    expected = asked(model).values
    for masked in (-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min):

        def mask(_: Any, __: Any, out: Tensor, masked: float = masked) -> Tensor:
            return out.index_fill(-1, torch.tensor([5]), masked)

        handle = model.lm_head.register_forward_hook(mask)
        found = asked(model)
        handle.remove()
        assert torch.equal(found.values, expected.index_fill(-1, torch.tensor([5]), 0.0))
