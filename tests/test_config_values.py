"""Any value in any field of any config is either taken or refused by name, never a traceback."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina.config
from lamina.config import (
    AdaLoraConfig,
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftConfig,
    VeloraConfig,
)
from lamina.config.methods import MethodConfig
from lamina.engine.init import initialisation
from lamina.errors import ConfigError, LaminaError

KINDS = [
    kind
    for kind in vars(lamina.config).values()
    if isinstance(kind, type) and issubclass(kind, (LoraConfig, MethodConfig))
]
NUMBERS: list[Any] = [-1, 0, 1, 2.5, float("nan"), float("inf"), 10**30, True, False]
WORDS: list[Any] = [None, "", "x", "(", b"x"]
SERIES: list[Any] = [[], [1], ["x"], ["("], [None], [[1, 2]], [(0, 1)], (1, 2), {3}]
TABLES: list[Any] = [{}, {"x": 1}, {"x": "y"}, {1: 2}, {"x": None}, {"x": [1]}, {"(": 1}]
OBJECTS: list[Any] = [object(), torch.zeros(2), len, int, [torch.zeros(2)], {"x": object()}]
VALUES = [*NUMBERS, *WORDS, *SERIES, *TABLES, *OBJECTS]
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind) if field.init]


def build(kind: Any, **values: Any) -> Any:
    least = {"total_step": 10} if kind is AdaLoraConfig else {}
    return kind(**least | values)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_a_value_is_taken_or_refused_by_the_name_of_its_field(kind: Any, name: str) -> None:
    refused = 0
    for value in VALUES:
        try:
            config = build(kind, **{name: value})
        except ConfigError as error:
            refused += 1
            assert error.faults
            assert all(
                name in fault or "target_modules is empty" in fault for fault in error.faults
            )
        else:
            if isinstance(config, PeftConfig):
                assert PeftConfig.from_dict(config.to_dict()).to_json() == config.to_json()
    # Whatever a field is for, no object without a form in JSON is right.
    assert refused >= len(OBJECTS) or name == "peft_type"


def test_faults_of_several_fields_are_told_together() -> None:
    with pytest.raises(ConfigError, match="5 setting") as caught:
        LoraConfig(
            r=torch.ones(1),  # type: ignore[arg-type]
            lora_alpha=0,
            use_qalora="yes",  # type: ignore[arg-type]
            layer_replication=[(0, 1, 2)],  # type: ignore[list-item]
            revision=3,  # type: ignore[arg-type]
        )
    told = sorted(fault.split("=")[0] for fault in caught.value.faults)
    assert told == ["layer_replication", "lora_alpha", "r", "revision", "use_qalora"]
    with pytest.raises(ConfigError) as caught:
        EvaConfig(rho=0.5, whiten="no")  # type: ignore[arg-type]
    assert len(caught.value.faults) == 2


def test_a_path_is_as_good_as_its_name(tmp_path: Path) -> None:
    config = LoraConfig(base_model_name_or_path=tmp_path)  # type: ignore[arg-type]
    assert config.to_dict()["base_model_name_or_path"] == str(tmp_path)


# --- what contradicts itself --------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "use_qalora": {"use_qalora": True},
    "velora_config": {"velora_config": VeloraConfig()},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "use_bdlora": {"use_bdlora": BdLoraConfig()},
    "kasa_config": {"kasa_config": KasaConfig()},
    "arrow_config": {"arrow_config": ArrowConfig()},
    "init_lora_weights='mica'": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(VARIANTS, 2)))
def test_an_adapter_is_one_variant(one: str, two: str) -> None:
    with pytest.raises(ConfigError, match="variant combination") as caught:
        LoraConfig(**VARIANTS[one], **VARIANTS[two])
    (fault,) = caught.value.faults
    assert one in fault
    assert two in fault
    assert LoraConfig(**VARIANTS[one])
    assert LoraConfig(**VARIANTS[two])


def test_dora_has_no_bias_of_b() -> None:
    with pytest.raises(LaminaError, match="lora_bias=True is not supported for DoRA"):
        LoraConfig(use_dora=True, lora_bias=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 10**12),
        ("rank_pattern", {"q_proj": 2**25}),
        ("lora_alpha", 10**400),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("qalora_group_size", 0),
        ("alora_invocation_tokens", [2**70]),
        ("trainable_token_indices", [2**40]),
        ("layers_to_transform", 2**40),
    ],
)
def test_numbers_that_no_model_has_room_for(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        LoraConfig(**{field: value})


@pytest.mark.parametrize("field", ["init_r", "target_r"])
def test_adalora_has_no_room_for_them_either(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}=\d+: no layer has room"):
        lamina.config.AdaLoraConfig(total_step=9, **{field: 10**30})


def test_a_file_asks_for_no_endless_initialisation() -> None:
    with pytest.raises(ConfigError, match="loftq_iter=1000000, more than 100"):
        LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 10**6})
    assert initialisation("pissa_niter_999") is initialisation("pissa")
    with pytest.raises(ConfigError, match="pissa_niter_1000"):
        initialisation("pissa_niter_1000")


@pytest.mark.parametrize("kind", [[], {}, ["LORA"], 7, "lora", "IA3"])
def test_a_kind_of_adapter_that_is_none_of_ours(kind: Any) -> None:
    with pytest.raises(ConfigError, match="Lamina adapts models by LoRA only"):
        LoraConfig.from_dict({"peft_type": kind})
