"""peft's names for layers and models, of the real peft and of the drop-in, to run one code over."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import torch
from peft.tuners.lora import layer as real_layers
from peft.tuners.lora import variants as real_variants

from lamina.interop.peft import kinds, layer_variants, variants
from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.model import PeftModel

REAL = SimpleNamespace(
    **{
        name: getattr(real_layers, name)
        for name in (
            "LoraLayer",
            "Linear",
            "Embedding",
            "Conv1d",
            "Conv2d",
            "Conv3d",
            "MultiheadAttention",
            "ParamWrapper",
            "LoraVariant",
            "dispatch_default",
        )
    },
    variants=real_variants,
    Config=peft.LoraConfig,
    adapt=peft.get_peft_model,
    Model=peft.PeftModel,
)
OURS = SimpleNamespace(
    **{name: getattr(kinds, name) for name in vars(REAL) if hasattr(kinds, name)}
    | {
        "LoraVariant": layer_variants.LoraVariant,
        "variants": variants,
        "Config": LoraConfig,
        "adapt": get_peft_model,
        "Model": PeftModel,
    }
)
BOTH = (REAL, OURS)


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs)
