"""The names of peft and where they live, as data: module -> name -> where.

"Where" is `module:attribute`; a module of peft stands for what is found at its name there. A name
whose object isn't there is a placeholder; see `placeholders`.
"""

from __future__ import annotations

from lamina.interop.peft.methods import METHODS

_OWN = "lamina.interop.peft"
_CONFIGS = "lamina.config"


def _at(home: str, names: str) -> dict[str, str]:
    """Each name at `home`; "name=other" where it is called differently there."""
    pairs = (name.partition("=") for name in names.split())
    return {name: f"{home}:{other or name}" for name, _, other in pairs}


_TASKS = [
    "CausalLM",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "FeatureExtraction",
]
_PEFT_MODELS = " ".join(["PeftModel", *(f"PeftModelFor{task}" for task in _TASKS)])
_AUTO_MODELS = " ".join(["AutoPeftModel", *(f"AutoPeftModelFor{task}" for task in _TASKS)])
_STATUS = "get_layer_status get_model_status"
_TABLES = (
    "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
    "PEFT_TYPE_TO_PREFIX_MAPPING"
)
_METHOD_CONFIGS = (
    "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig "
    "LoraRuntimeConfig MontecloraConfig VeloraConfig"
)
_SAVE_AND_LOAD = (
    "get_base_model_state_dict get_peft_model_state_dict load_peft_weights "
    "set_base_model_state_dict set_peft_model_state_dict"
)
_OTHER = (
    "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper "
    "_freeze_adapter=freeze_adapter _get_batch_size=get_batch_size "
    "_get_input_embeddings_name=get_input_embeddings_name "
    "_get_module_names_tied_with_embedding=names_tied_with_embedding "
    "_get_no_split_modules=get_no_split_modules _get_submodules=get_submodules "
    "_get_submodules_with_grandparent=get_submodules_with_grandparent "
    "_is_valid_match=is_valid_match _prepare_prompt_learning_config _set_adapter=set_adapter "
    "_set_layer_requires_grad=set_layer_requires_grad _set_trainable "
    "cast_mixed_precision_params check_file_exists_on_hf_hub create_attention_mask "
    "fsdp_auto_wrap_policy get_auto_gptq_quant_linear get_gptqmodel_quant_linear "
    "get_pattern_key get_quantization_config id_tensor_storage infer_device "
    "is_gptqmodel_awq_layer is_gptqmodel_quant_linear match_target_against_key "
    "prepare_model_for_kbit_training set_additional_trainable_modules shift_tokens_right "
    "str_to_bool transpose"
)
_CONSTANTS = (
    "ALLOWED_COMPUTE_DTYPES CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES "
    "EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION "
    "SAFETENSORS_WEIGHTS_NAME SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME "
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING UPCAST_DTYPES WEIGHTS_NAME "
    "bloom_model_postprocess_past_key_value starcoder_model_postprocess_past_key_value"
)
_WITH_TARGETS = (
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY "
    "LNTUNING LOHA LOKR MISS OFT OSF PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING "
    "TINYLORA UNILORA VBLORA VERA WAVEFT"
)
_TABLES_OF_TARGETS = " ".join(
    [
        *(
            f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING"
            for name in _WITH_TARGETS.split()
        ),
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    ]
)
_INTEGRATIONS = (
    "check_deepspeed_zero3_enabled dequantize_bnb_weight dequantize_module_weight "
    "gather_params_ctx get_bnb_param_type get_layer_device_map init_empty_weights "
    "map_cache_to_layer_device_map skip_init_on_device"
)
_QUANTIZATION = (
    "Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend HqqBackend QuantizationBackend "
    "TorchaoBackend get_quantization_kwargs quantization_extra_repr resolve_quantization_backend"
)
_IMPORT_CHECKS = (
    "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available "
    "is_eetq_available is_gptqmodel_available is_hqq_available is_inc_available "
    "is_optimum_available is_te_available is_te_pytorch_available is_torch_tpu_available "
    "is_torchao_available is_torchao_ge_v0_18_0 is_transformers_ge_v5 is_transformers_ge_v5_1_0 "
    "is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0 is_transformers_ge_v5_13_0 "
    "is_transformers_ge_v5_17_0 is_transformers_le_4_53 is_transformers_dtensor_tp is_xpu_available"
)
_TUNERS_UTILS = {
    "tuner": "BaseTuner BaseTunerLayer",
    "matching": (
        "_ExcludedModule=ExcludedModule _find_minimal_target_modules=find_minimal_target_modules "
        "_get_in_out_features=get_in_out_features check_target_module_exists "
        "_maybe_include_all_linear_layers=maybe_include_all_linear_layers inspect_matched_modules"
    ),
    "switching": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
    "walking": (
        "_filter_state_dict_by_key_prefixes=filter_state_dict_by_key_prefixes "
        "_get_tuner_state_dict_key_prefixes=get_tuner_state_dict_key_prefixes "
        "check_adapters_to_merge clone_module find_parameter_name_by_module get_device_map "
        "onload_layer replicate_layers"
    ),
}
_LORA_FUNCTIONS = {
    "arrow": (
        "ArrowLoraLinearLayer GKS_ADAPTER_PREFIX TASK_ADAPTER_PREFIX _resolve_adapter_source "
        "create_arrow_model"
    ),
    "conversion": "convert_to_lora save_as_lora",
    "corda": "preprocess_corda CordaEigens",
    "eva": (
        "forward_fn_dict get_eva_state_dict initialize_lora_eva_weights "
        "prepare_layer_inputs_fn_language_modeling=language_modeling_rows "
        "prepare_model_inputs_fn_language_modeling=language_modeling_mask"
    ),
    "intruders": "reduce_intruder_dimension",
    "loraga": "estimate_gradients preprocess_loraga",
    "monteclora": "MontecloraSampler",
    "velora": (
        "VeloraFunction _compress_activations=compress_activations "
        "_get_group_dim=get_group_dim _normalize_projection=normalize_projection "
        "_reconstruct_activations=reconstruct_activations "
        "_reshape_to_grouped_subtokens=reshape_to_grouped_subtokens"
    ),
}
# Where they are not in modules of the drop-in.
_LORA_HOMES = {
    "monteclora": "lamina.engine.variants.monteclora",
    "corda": "lamina.engine.preparing.corda",
    "eva": "lamina.engine.preparing.eva",
    "loraga": f"{_OWN}.lora_loraga",
    "conversion": "lamina.model.conversion",
    "intruders": "lamina.model.intruders",
}
_LORA_LAYERS = {
    "aqlm": "AqlmLoraLinear",
    "awq": "AwqLoraLinear",
    "bnb": "Linear4bit Linear8bitLt",
    "eetq": "EetqLoraLinear",
    "gptq": "GPTQLoraLinear",
    "hqq": "HqqLoraLinear",
    "inc": "IncLoraLinear",
    "te": "TeLinear",
    "torchao": "TorchaoLoraLinear",
    "tp_layer": "LoraParallelLinear",
}
_LORA_VARIANTS = (
    "ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant BlockDiagonalLinear "
    "DoraConv1dVariant DoraConv2dVariant DoraConv3dVariant DoraEmbeddingVariant DoraLinearVariant "
    "KasaLinearVariant MiCAEmbeddingVariant MiCALinearVariant MontecloraLinearVariant "
    "QALoraLinearVariant VeloraLinearVariant calculate_alora_offsets get_alora_offsets_for_forward "
    "get_alora_offsets_for_generate is_alora_relevant_in_batch"
)
_LORA = (
    f"{_METHOD_CONFIGS} LoraConfig LoraModel LoraLayer LoraVariant Linear Embedding Conv1d Conv2d "
    "Conv3d MultiheadAttention ParamWrapper Linear4bit Linear8bitLt GPTQLoraLinear "
    "convert_to_lora create_arrow_model get_eva_state_dict initialize_lora_eva_weights "
    "preprocess_loraga save_as_lora"
)

TREE: dict[str, dict[str, str]] = {
    "peft.auto": _at(
        f"{_OWN}.auto",
        f"{_AUTO_MODELS} MODEL_TYPE_TO_PEFT_MODEL_MAPPING check_import_allowlist "
        "get_default_import_allowlist",
    ),
    "peft.config": _at(
        f"{_OWN}.config",
        "CONFIG_NAME MIN_EXPECTED_CONFIG_KEYS PeftConfig PeftConfigMixin PromptLearningConfig "
        "__version__ _get_commit_hash _is_dev_version",
    ),
    "peft.functional": {
        **_at("peft.mapping", "inject_adapter_in_model"),
        **_at(
            "peft.tuners.tuners_utils",
            "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
        ),
        **_at("peft.utils", "get_peft_model_state_dict set_peft_model_state_dict"),
    },
    "peft.helpers": _at(
        f"{_OWN}.scripts",
        "DoraCaching KappaTuneSelector MontecloraTrainerMixin check_if_peft_model "
        "disable_input_dtype_casting find_kappa_target_modules rescale_adapter_scale "
        "update_forward_signature update_generate_signature update_signature",
    ),
    "peft.import_utils": _at(f"{_OWN}.available", _IMPORT_CHECKS),
    "peft.mapping": {
        **_at(f"{_OWN}.registry", f"{_TABLES} get_peft_config"),
        **_at(f"{_OWN}.injecting", "inject_adapter_in_model"),
    },
    "peft.mapping_func": _at(f"{_OWN}.adapting", "get_peft_model"),
    "peft.mixed_model": _at(f"{_OWN}.mixed", "PeftMixedModel"),
    "peft.optimizers": _at(
        "lamina.optim",
        "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    ),
    "peft.optimizers.lorafa": _at(
        "lamina.optim.lorafa", "LoraFAOptimizer create_lorafa_optimizer is_bf16_available"
    ),
    "peft.optimizers.loraplus": _at("lamina.optim.loraplus", "create_loraplus_optimizer"),
    "peft.optimizers.riemannian": _at(
        "lamina.optim.riemannian",
        "_RiemannianPreconditioner _collect_lora_pairs create_riemannian_optimizer",
    ),
    "peft.peft_model": {
        **_at(f"{_OWN}.model", _PEFT_MODELS),
        **_at(f"{_OWN}.status", f"{_STATUS} TunerLayerStatus TunerModelStatus"),
        **_at("peft.config", "PeftConfig PromptLearningConfig"),
        **_at(
            "peft.utils", f"{_SAVE_AND_LOAD} PeftType TaskType ModulesToSaveWrapper infer_device"
        ),
    },
    "peft.tuners": {},
    "peft.tuners._buffer_dict": _at("lamina.engine.buffers", "BufferDict"),
    "peft.tuners.lora": {},
    "peft.tuners.lora.config": {
        **_at(_CONFIGS, _METHOD_CONFIGS),
        **_at(f"{_OWN}.lora_config", "LoraConfig"),
    },
    "peft.tuners.lora.dora": _at(
        f"{_OWN}.dora",
        "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer "
        "ENABLE_DORA_CACHING",
    ),
    "peft.tuners.lora.layer": {
        **_at(
            f"{_OWN}.kinds",
            "LoraLayer Linear Embedding Conv1d Conv2d Conv3d _ConvNd MultiheadAttention "
            "ParamWrapper dispatch_default",
        ),
        **_at(f"{_OWN}.layer_variants", "LoraVariant"),
        **_at(f"{_OWN}.proxies", "_LoraFactorsProxy _LoraParameterProxy"),
        **_at("peft.tuners.tuners_utils", "BaseTunerLayer"),
    },
    "peft.tuners.lora.model": {
        **_at(f"{_OWN}.tuner", "LoraModel"),
        **_at("peft.utils.constants", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"),
    },
    "peft.tuners.lora.variants": _at(f"{_OWN}.variants", _LORA_VARIANTS),
    "peft.tuners.mixed": _at(f"{_OWN}.mixed", "COMPATIBLE_TUNER_TYPES MixedModel"),
    "peft.tuners.mixed.model": _at("peft.tuners.mixed", "COMPATIBLE_TUNER_TYPES MixedModel"),
    "peft.tuners.tuners_utils": {
        **{
            name: home
            for file, names in _TUNERS_UTILS.items()
            for name, home in _at(f"{_OWN}.{file}", names).items()
        },
        **_at("peft.utils", "ModulesToSaveWrapper _get_submodules AuxiliaryTrainingWrapper"),
    },
    "peft.utils": {},
    "peft.utils.constants": _at(f"{_OWN}.constants", f"{_CONSTANTS} {_TABLES_OF_TARGETS}"),
    "peft.utils.error": _at(f"{_OWN}.types", "NoMatchingPeftModuleError PeftError"),
    "peft.utils.hotswap": _at(
        "lamina.model.hotswap",
        "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
        "prepare_model_for_compiled_hotswap",
    ),
    "peft.utils.incremental_pca": _at("lamina.engine.preparing.pca", "IncrementalPCA"),
    "peft.utils.integrations": _at(f"{_OWN}.integrations", _INTEGRATIONS),
    "peft.utils.loftq_utils": _at(f"{_OWN}.loftq", "loftq_init replace_lora_weights_loftq"),
    "peft.utils.merge_utils": _at(
        f"{_OWN}.merging",
        "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning "
        "magnitude_prune prune random_pruning reshape_weight_task_tensors task_arithmetic ties",
    ),
    "peft.utils.other": {
        **_at(f"{_OWN}.parts", _OTHER),
        **_at("peft.utils.constants", _CONSTANTS),
    },
    "peft.utils.peft_types": {
        **_at(f"{_OWN}.types", "PeftType TaskType"),
        **_at(f"{_OWN}.registry", "register_peft_method"),
    },
    "peft.utils.quantization_utils": _at(f"{_OWN}.quantization", _QUANTIZATION),
    "peft.utils.save_and_load": _at(f"{_OWN}.tensors", _SAVE_AND_LOAD),
    "peft.utils.transformers_weight_conversion": {
        **_at(f"{_OWN}.conversion", "build_peft_weight_mapping"),
        **_at(
            f"{_OWN}.experts",
            "convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers",
        ),
    },
    "peft.utils.warning": _at(f"{_OWN}.types", "PeftWarning"),
}

for _module, _names in _LORA_FUNCTIONS.items():
    _home = _LORA_HOMES.get(_module, f"{_OWN}.lora_{_module}")
    TREE[f"peft.tuners.lora.{_module}"] = _at(_home, _names)
for _module, _names in _LORA_LAYERS.items():
    TREE[f"peft.tuners.lora.{_module}"] = _at(f"{_OWN}.layers", _names)


def _reexport(package: str, *modules: str, only: str | None = None) -> None:
    """Let `package` show what these modules of it have."""
    wanted = None if only is None else set(only.split())
    for module in modules:
        names = TREE[module]
        shown = names if wanted is None else names.keys() & wanted
        TREE[package].update({name: f"{module}:{name}" for name in shown})


_reexport(
    "peft.tuners.lora",
    *(f"peft.tuners.lora.{name}" for name in ("config", "layer", "model", *_LORA_FUNCTIONS)),
    *(f"peft.tuners.lora.{name}" for name in _LORA_LAYERS),
    only=_LORA,
)
_reexport("peft.tuners", "peft.tuners.lora", "peft.tuners.mixed", only=f"{_LORA} MixedModel")
for _module in ("constants", "error", "integrations", "loftq_utils", "other", "peft_types"):
    _reexport("peft.utils", f"peft.utils.{_module}")
for _module in ("quantization_utils", "save_and_load", "warning"):
    _reexport("peft.utils", f"peft.utils.{_module}")

for _folder, _method in METHODS.items():
    _package = f"peft.tuners.{_folder}"
    _home = f"{_OWN}.{_folder}"
    _own_names = _at(_home, _method.names)
    TREE[_package] = dict(_own_names)
    for _module in _method.modules.split():
        _more = " ".join(names for where, names in _method.more if where == _module)
        TREE[f"{_package}.{_module}"] = {
            **{name: f"{_package}:{name}" for name in _own_names},
            **_at(f"{_home}_{_module}", _more),
        }
    # The layers' plain names, such as Linear, are left to the folder.
    _seen = [n for n in _own_names if not n.startswith(("Linear", "Conv", "Embedding"))]
    TREE["peft.tuners"].update({name: f"{_package}:{name}" for name in _seen})

TREE["peft"] = {
    **_at("peft.auto", f"{_AUTO_MODELS} MODEL_TYPE_TO_PEFT_MODEL_MAPPING"),
    **_at("peft.config", "PeftConfig PromptLearningConfig"),
    **_at("peft.helpers", "find_kappa_target_modules"),
    **_at("peft.mapping", f"{_TABLES} get_peft_config inject_adapter_in_model"),
    **_at("peft.mapping_func", "get_peft_model"),
    **_at("peft.mixed_model", "PeftMixedModel"),
    **_at("peft.peft_model", f"{_PEFT_MODELS} {_STATUS}"),
    **{name: f"peft.tuners:{name}" for name in TREE["peft.tuners"] if not name.startswith("_")},
    **_at("peft.tuners.cartridge.utils", dict(METHODS["cartridge"].more)["utils"]),
    **_at(
        "peft.utils",
        f"{_SAVE_AND_LOAD} NoMatchingPeftModuleError PeftError PeftType PeftWarning TaskType "
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING cast_mixed_precision_params "
        "bloom_model_postprocess_past_key_value prepare_model_for_kbit_training "
        "replace_lora_weights_loftq shift_tokens_right",
    ),
    **_at(f"{_OWN}.types", "__version__=VERSION"),
}
