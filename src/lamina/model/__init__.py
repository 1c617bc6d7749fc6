"""The facade: PEFT's names over the engine and the checkpoint."""

from lamina.model.adalora import AdaLoraModel
from lamina.model.arrow import create_arrow_model
from lamina.model.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from lamina.model.combining import CombineReport
from lamina.model.conversion import convert_to_lora, save_as_lora
from lamina.model.extracting import extract_lora
from lamina.model.facade import PeftModel
from lamina.model.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from lamina.model.intruders import reduce_intruder_dimension
from lamina.model.loftq import replace_lora_weights_loftq
from lamina.model.merges import MergeComparison, compare_merges
from lamina.model.preflight import check_gradients, preflight
from lamina.model.state_dict import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from lamina.model.status import get_layer_status, get_model_status
from lamina.model.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from lamina.model.tuner import LoraModel

__all__ = [
    "AdaLoraModel",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CombineReport",
    "LoraModel",
    "MergeComparison",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "check_gradients",
    "compare_merges",
    "convert_to_lora",
    "create_arrow_model",
    "extract_lora",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "preflight",
    "prepare_model_for_compiled_hotswap",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_peft_model_state_dict",
]
