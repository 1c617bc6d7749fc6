"""peft's constants: file names, the targets that are usual for an architecture."""

from __future__ import annotations

from typing import Any

import torch

from lamina.checkpoint.adapter import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from lamina.config import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from lamina.config import CONFIG_NAME

__all__ = ["CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME"]

WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = (
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}

# What is adapted -> the model types in which it is usual.
_USUAL = {
    "q v": "t5 mt5",
    "q_proj v_proj": (
        "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text "
        "qwen2 qwen3"
    ),
    "q v q_proj v_proj": "blip-2",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    "c_attn": "gpt2 gpt_bigcode",
    "c_proj c_attn": "btlm",
    "qkv_proj": "codegen",
    "Wqkv": "mpt",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    kind: targets.split() for targets, kinds in _USUAL.items() for kind in kinds.split()
}
# Its vision tower has projections of the same names.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["gemma4"] = (
    r".*language_model\..*\.(q_proj|v_proj)"
)
# Where AdaLoRA, whose ranks are shared out, adapts more layers than LoRA.
_USUAL_OF_ADALORA = {
    "q k v o wi wo": "t5",
    "q k v o wi_0 wi_1 wo": "mt5",
    "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
    "q_proj v_proj": "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "query value": "bert",
    "query key value dense": "roberta",
    "query_proj key_proj value_proj dense": "deberta-v2",
    "in_proj": "deberta",
    "query_key_value": "bloom gpt_neox",
    "c_attn": "gpt2 gpt_bigcode",
}
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    "gemma4": TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["gemma4"],
    **{
        kind: targets.split()
        for targets, kinds in _USUAL_OF_ADALORA.items()
        for kind in kinds.split()
    },
}


def bloom_model_postprocess_past_key_value(past_key_values: Any) -> Any:
    """Nothing: it belongs to prefix tuning."""
    return past_key_values


starcoder_model_postprocess_past_key_value = bloom_model_postprocess_past_key_value
