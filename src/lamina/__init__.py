"""Fine-tune a model in several LoRA stages; every stage directory is one plain PEFT adapter.

The public names. What needs torch is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lamina._version import __version__
from lamina.errors import (
    AdapterNameError,
    AllocationError,
    AlreadyAdaptedError,
    CheckpointError,
    ConfigError,
    ConversionError,
    DirectoryInUseError,
    FoldError,
    InitialisationError,
    KeyMismatchError,
    LaminaError,
    MissingExtraError,
    MissingFileError,
    NoModelError,
    NotFoldableError,
    OptimizerError,
    PreflightError,
    RecordError,
    RoutingError,
    StageError,
    TargetError,
    UnsupportedFieldError,
    UnsupportedMethodError,
    UnsupportedTargetError,
)

if TYPE_CHECKING:
    from lamina.config import (
        AdaLoraConfig,
        ArrowConfig,
        BdLoraConfig,
        CordaConfig,
        EvaConfig,
        KasaConfig,
        LoftQConfig,
        LoraConfig,
        LoraGAConfig,
        LoraRuntimeConfig,
        MontecloraConfig,
        PeftConfig,
        PeftType,
        TaskType,
        VeloraConfig,
    )
    from lamina.engine.preparing import (
        get_eva_state_dict,
        initialize_lora_eva_weights,
        preprocess_corda,
        preprocess_loraga,
    )
    from lamina.engine.targets import (
        find_all_linear_names,
    )
    from lamina.model import (
        AdaLoraModel,
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        CombineReport,
        LoraModel,
        MergeComparison,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        check_gradients,
        compare_merges,
        convert_to_lora,
        create_arrow_model,
        extract_lora,
        get_layer_status,
        get_model_status,
        get_peft_model,
        get_peft_model_state_dict,
        hotswap_adapter,
        inject_adapter_in_model,
        preflight,
        prepare_model_for_compiled_hotswap,
        reduce_intruder_dimension,
        replace_lora_weights_loftq,
        save_as_lora,
        set_peft_model_state_dict,
    )
    from lamina.optim import (
        create_lorafa_optimizer,
        create_loraplus_optimizer,
        create_riemannian_optimizer,
    )
    from lamina.stages import (
        begin_stage,
        lineage,
        load,
        save_stage,
    )

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdapterNameError",
    "AllocationError",
    "AlreadyAdaptedError",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BdLoraConfig",
    "CheckpointError",
    "CombineReport",
    "ConfigError",
    "ConversionError",
    "CordaConfig",
    "DirectoryInUseError",
    "EvaConfig",
    "FoldError",
    "InitialisationError",
    "KasaConfig",
    "KeyMismatchError",
    "LaminaError",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MergeComparison",
    "MissingExtraError",
    "MissingFileError",
    "MontecloraConfig",
    "NoModelError",
    "NotFoldableError",
    "OptimizerError",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PreflightError",
    "RecordError",
    "RoutingError",
    "StageError",
    "TargetError",
    "TaskType",
    "UnsupportedFieldError",
    "UnsupportedMethodError",
    "UnsupportedTargetError",
    "VeloraConfig",
    "__version__",
    "begin_stage",
    "check_gradients",
    "compare_merges",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "extract_lora",
    "find_all_linear_names",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "lineage",
    "load",
    "preflight",
    "prepare_model_for_compiled_hotswap",
    "preprocess_corda",
    "preprocess_loraga",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "save_stage",
    "set_peft_model_state_dict",
]

# Where a name lives that is neither an error nor of the facade.
_ELSEWHERE = {
    "lamina.config": {
        "AdaLoraConfig",
        "ArrowConfig",
        "BdLoraConfig",
        "CordaConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraConfig",
        "LoraGAConfig",
        "LoraRuntimeConfig",
        "MontecloraConfig",
        "PeftConfig",
        "PeftType",
        "TaskType",
        "VeloraConfig",
    },
    "lamina.engine.preparing": {
        "get_eva_state_dict",
        "initialize_lora_eva_weights",
        "preprocess_corda",
        "preprocess_loraga",
    },
    "lamina.engine.targets": {"find_all_linear_names"},
    "lamina.optim": {
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "create_riemannian_optimizer",
    },
    "lamina.stages": {"begin_stage", "lineage", "load", "save_stage"},
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lamina' has no attribute {name!r}")
    home = next((m for m, names in _ELSEWHERE.items() if name in names), "lamina.model")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
