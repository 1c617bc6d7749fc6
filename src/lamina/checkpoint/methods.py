"""What an adapter is beside plain LoRA: its method, and tensors that are no factors; no torch."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

# Field of a config -> the method's name; see `lamina.config.LoraConfig`.
_METHODS = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
}
_SCALED = {"use_rslora": "rsLoRA"}
# A part of a tensor's name on disk -> what it holds.
_CONTENTS = {
    ".lora_magnitude_vector": "magnitudes",
    ".lora_diag": "diagonals",
    ".lora_E": "singular values",
    ".lora_monteclora_sampler.": "samplers",
    ".lora_B.bias": "biases of B",
    ".trainable_tokens_delta": "replaced rows",
}


@dataclass(frozen=True)
class Beside:
    """Tensors of one kind that are no factors.

    Attributes:
        what: what they are, such as "magnitudes".
        modules: how many modules have them.
        parameters: their entries.
    """

    what: str
    modules: int
    parameters: int


def method_of(config: Mapping[str, Any]) -> str:
    """The names of what a config asks for, such as "DoRA", "rsLoRA"; else "LoRA"."""
    names = ["AdaLoRA"] if config.get("peft_type") == "ADALORA" else []
    names += [name for field, name in {**_METHODS, **_SCALED}.items() if config.get(field)]
    if config.get("init_lora_weights") == "mica":
        names.append("MiCA")
    return ", ".join(names) or "LoRA"


def beside_factors(
    header: Mapping[str, Mapping[str, Any]], factors: Collection[str]
) -> tuple[Beside, ...]:
    """What a file holds of methods' own tensors, by kind, in the file's order.

    Args:
        header: name -> shape of the tensors in the file.
        factors: the names among them that are factors.
    """
    modules: dict[str, set[str]] = defaultdict(set)
    parameters: Counter[str] = Counter()
    for key, entry in header.items():
        part = next((part for part in _CONTENTS if part in key), None)
        if key in factors or part is None:
            continue
        modules[_CONTENTS[part]].add(key.partition(part)[0])
        parameters[_CONTENTS[part]] += math.prod(entry["shape"])
    return tuple(Beside(what, len(modules[what]), parameters[what]) for what in modules)
