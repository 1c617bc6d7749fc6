"""The methods of peft that are not LoRA: where their names are found, as data.

Their names exist so that imports and `isinstance` checks work; see `placeholders`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A method's folder below `peft.tuners`.

    Attributes:
        names: what the folder exports; each is found in every module of the folder too.
        modules: its modules.
        more: names of single modules, as (module, names).
    """

    names: str
    modules: str
    more: tuple[tuple[str, str], ...] = ()


METHODS: dict[str, Method] = {
    "adalora": Method(
        names=(
            "AdaLoraConfig AdaLoraLayer AdaLoraModel RankAllocator SVDConv2d SVDLinear "
            "SVDQuantLinear"
        ),
        modules="bnb config gptq layer model",
        more=(("bnb", "SVDLinear4bit SVDLinear8bitLt"),),
    ),
    "adamss": Method(
        names="AdamssConfig AdamssLayer AdamssModel Linear",
        modules="asa_callback config layer model utils",
    ),
    "adaption_prompt": Method(
        names="AdaptedAttention AdaptionPromptConfig AdaptionPromptModel",
        modules="config layer model utils",
    ),
    "beft": Method(
        names="BeftConfig BeftLayer BeftModel Linear",
        modules="config layer model",
    ),
    "boft": Method(
        names="BOFTConfig BOFTLayer BOFTModel",
        modules="config layer model",
    ),
    "c3a": Method(
        names="C3AConfig C3ALayer C3ALinear C3AModel",
        modules="config layer model utils",
    ),
    "cartridge": Method(
        names="CartridgeConfig CartridgeEncoder",
        modules="config model utils",
        more=(
            (
                "utils",
                (
                    "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
                    "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values"
                ),
            ),
        ),
    ),
    "cpt": Method(
        names="CPTConfig CPTEmbedding",
        modules="config model",
    ),
    "deft": Method(
        names="DeftConfig DeftLayer DeftLinear DeftModel",
        modules="config layer model",
    ),
    "delora": Method(
        names="DeloraConfig DeloraLayer DeloraLinear DeloraModel",
        modules="config layer model",
        more=(("model", "TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING"),),
    ),
    "fourierft": Method(
        names="FourierFTConfig FourierFTLayer FourierFTLinear FourierFTModel",
        modules="config layer model",
    ),
    "frod": Method(
        names="FrodConfig FrodLayer FrodModel Linear",
        modules="config layer model",
    ),
    "glora": Method(
        names="GloraConfig GloraLayer GloraLinear GloraModel",
        modules="config layer model",
    ),
    "gralora": Method(
        names="GraloraConfig GraloraLayer GraloraModel",
        modules="config layer model",
    ),
    "hira": Method(
        names="Conv2d Conv3d Embedding HiraConfig HiraLayer HiraModel Linear",
        modules="bnb config layer model",
    ),
    "hra": Method(
        names="HRAConfig HRAConv2d HRALayer HRALinear HRAModel",
        modules="config layer model",
    ),
    "ia3": Method(
        names="Conv2d Conv3d IA3Config IA3Layer IA3Model Linear",
        modules="bnb config layer model",
    ),
    "lily": Method(
        names="LilyConfig LilyLayer LilyModel Linear",
        modules="config layer model",
    ),
    "ln_tuning": Method(
        names="LNTuningConfig LNTuningModel",
        modules="config layer model",
    ),
    "loha": Method(
        names="Conv2d Linear LoHaConfig LoHaLayer LoHaModel",
        modules="config layer model",
    ),
    "lokr": Method(
        names="Conv2d Linear LoKrConfig LoKrLayer LoKrModel",
        modules="config layer model",
        more=(("layer", "factorization"),),
    ),
    "miss": Method(
        names="MissConfig MissLayer MissLinear MissModel",
        modules="config layer model",
    ),
    "multitask_prompt_tuning": Method(
        names="MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit",
        modules="config model",
    ),
    "oft": Method(
        names="Conv2d Embedding Linear OFTConfig OFTLayer OFTModel",
        modules="config layer model",
    ),
    "osf": Method(
        names="Linear OSFConfig OSFLayer OSFModel",
        modules="config layer model utils",
        more=(("utils", "decompose_weight_matrix"),),
    ),
    "p_tuning": Method(
        names="PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
        modules="config model",
    ),
    "peanut": Method(
        names="Linear PeanutConfig PeanutLayer PeanutModel",
        modules="config layer model",
    ),
    "poly": Method(
        names="Linear PolyConfig PolyLayer PolyModel",
        modules="config layer model router",
    ),
    "prefix_tuning": Method(
        names="PrefixEncoder PrefixTuningConfig",
        modules="config model",
    ),
    "prompt_tuning": Method(
        names="PromptEmbedding PromptTuningConfig PromptTuningInit",
        modules="config model",
    ),
    "psoft": Method(
        names="Linear PsoftConfig PsoftLayer PsoftModel",
        modules="config layer model",
    ),
    "pvera": Method(
        names="Linear PveraConfig PveraLayer PveraModel",
        modules="bnb config layer model",
    ),
    "randlora": Method(
        names="Linear RandLoraConfig RandLoraLayer RandLoraModel",
        modules="bnb config layer model",
    ),
    "road": Method(
        names="Linear RoadConfig RoadLayer RoadModel",
        modules="bnb config layer model",
    ),
    "shadow": Method(
        names="DetachedShadowModel ShadowCache ShadowCarrier ShadowConfig ShadowLayer ShadowModel",
        modules="config diffusion_models layers model",
        more=(("diffusion_models", "DetachedFluxShadowModel"),),
    ),
    "shira": Method(
        names="Linear ShiraConfig ShiraLayer ShiraModel",
        modules="config layer mask_functions model",
        more=(("layer", "_warn_once_about_module_hooks"),),
    ),
    "supertuning": Method(
        names="Linear SupertuningConfig SupertuningLayer SupertuningModel",
        modules="config layer model",
    ),
    "tinylora": Method(
        names="Embedding Linear TinyLoraConfig TinyLoraLayer TinyLoraModel",
        modules="config layer model",
    ),
    "trainable_tokens": Method(
        names="TrainableTokensConfig TrainableTokensLayer TrainableTokensModel",
        modules="config layer model",
    ),
    "unilora": Method(
        names="Linear UniLoraConfig UniLoraLayer UniLoraModel",
        modules="config layer model",
    ),
    "vblora": Method(
        names="Linear VBLoRAConfig VBLoRALayer VBLoRAModel",
        modules="config layer model",
    ),
    "vera": Method(
        names="Linear VeraConfig VeraLayer VeraModel",
        modules="config layer model",
    ),
    "waveft": Method(
        names="WaveFTConfig WaveFTLayer WaveFTLinear WaveFTModel",
        modules="config constants layer model wavelet waverec2d",
    ),
    "xlora": Method(
        names="XLoraConfig XLoraModel",
        modules="classifier config layer model",
        more=(("layer", "XLoraLayer"),),
    ),
}
