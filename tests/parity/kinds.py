"""One tiny model of each kind that people fine-tune, with a batch and the config for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests import models

TEXT: dict[str, Any] = {"vocab_size": models.VOCABULARY, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LABELS = {"num_labels": 3}


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        model: the name of its class in transformers.
        config: the name of its config's class there.
        settings: that make it tiny.
        adapter: what is adapted, and the head that is trained.
        batch: makes inputs with labels.
        outputs: the names of the outputs that are compared.
        heads: the parts of names of what is trained whole.
    """

    model: str
    config: str
    settings: dict[str, Any]
    adapter: dict[str, Any]
    batch: Callable[[], dict[str, Tensor]]
    outputs: tuple[str, ...] = ("logits",)
    heads: tuple[str, ...] = ()

    def make(self, head: int = 0) -> nn.Module:
        """The model; its heads are drawn from the seed `head`, the rest is always the same."""
        config = getattr(transformers, self.config)(**self.settings)
        with models.seeded(0):
            made: nn.Module = getattr(transformers, self.model)(config)
        with models.seeded(head), torch.no_grad():
            for name, parameter in made.named_parameters():
                if any(part in name for part in self.heads):
                    parameter.normal_(std=0.3)
        return made.eval()


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return models.token_ids(batch, length)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def text(**labels: Any) -> Callable[[], dict[str, Tensor]]:
    """Ids, and labels: given ones, or the ids themselves."""
    return lambda: {"input_ids": ids(), **({k: torch.tensor(v) for k, v in labels.items()})}


def language() -> dict[str, Tensor]:
    return {"input_ids": ids(), "labels": ids()}


def image() -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 16, 16), "labels": torch.tensor([0, 2])}


_BERT = {**TEXT, **SMALL, "max_position_embeddings": 32, **LABELS}
_BART = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_EXPERTS = {
    **TEXT,
    **SMALL,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "output_router_logits": False,
}

KINDS: dict[str, Kind] = {
    "ViT": Kind(
        "ViTForImageClassification",
        "ViTConfig",
        {**SMALL, "image_size": 16, "patch_size": 4, **LABELS},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
        image,
        heads=("classifier",),
    ),
    "ConvNext": Kind(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4, **LABELS},
        {"target_modules": ["dwconv", "pwconv1"], "modules_to_save": ["classifier"], "r": 16},
        image,
        heads=("classifier",),
    ),
    "ResNet": Kind(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], **LABELS},
        {"target_modules": ["convolution"], "modules_to_save": ["classifier"]},
        image,
        heads=("classifier",),
    ),
    "Whisper": Kind(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_BART,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {"target_modules": ["q_proj", "v_proj"]},
        lambda: {"input_features": noise(2, 8, 32), "labels": ids(length=6)},
    ),
    "Wav2Vec2": Kind(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **SMALL,
            "vocab_size": 12,
            "conv_dim": (8, 8),
            "conv_stride": (5, 2),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
            "layerdrop": 0.0,
        },
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        lambda: {"input_values": noise(2, 400), "labels": torch.tensor([[3, 4], [5, 6]])},
        heads=("lm_head",),
    ),
    "T5": Kind(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **TEXT,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"},
        language,
    ),
    "BART": Kind(
        "BartForConditionalGeneration",
        "BartConfig",
        {**_BART, "max_position_embeddings": 32},
        {"target_modules": ["q_proj", "fc1"], "task_type": "SEQ_2_SEQ_LM"},
        language,
    ),
    "sequences": Kind(
        "BertForSequenceClassification",
        "BertConfig",
        _BERT,
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        text(labels=[0, 2]),
        heads=("classifier",),
    ),
    "decoder for sequences": Kind(
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**TEXT, **SMALL, **LABELS},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        text(labels=[0, 2]),
        heads=("score",),
    ),
    "tokens": Kind(
        "BertForTokenClassification",
        "BertConfig",
        _BERT,
        {"target_modules": ["query", "dense"], "task_type": "TOKEN_CLS"},
        text(labels=[[0, 1, 2] * 4] * 2),
        heads=("classifier",),
    ),
    "questions": Kind(
        "BertForQuestionAnswering",
        "BertConfig",
        {**_BERT, "num_labels": 2},
        {"target_modules": ["query", "value"], "task_type": "QUESTION_ANS"},
        text(start_positions=[1, 2], end_positions=[3, 5]),
        outputs=("start_logits", "end_logits"),
        heads=("qa_outputs",),
    ),
    "Mamba": Kind(
        "MambaForCausalLM",
        "MambaConfig",
        {**TEXT, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        {"target_modules": ["in_proj", "x_proj", "embeddings"], "task_type": "CAUSAL_LM"},
        language,
    ),
    "Jamba": Kind(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **TEXT,
            **SMALL,
            "num_key_value_heads": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        {"target_modules": ["q_proj", "in_proj", "x_proj"], "task_type": "CAUSAL_LM"},
        language,
    ),
    "Mixtral": Kind(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**TEXT, **SMALL, "num_key_value_heads": 2, "num_local_experts": 3},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "task_type": "CAUSAL_LM",
        },
        language,
    ),
    "Qwen2 MoE": Kind(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_EXPERTS, "num_experts": 3},
        {
            "target_modules": ["v_proj", "shared_expert.up_proj"],
            "target_parameters": ["experts.down_proj"],
            "task_type": "CAUSAL_LM",
        },
        language,
    ),
}
