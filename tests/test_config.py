from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest

from lamina.config import FORMAT_VERSION, LoraConfig, PeftConfig, PeftType, TaskType
from lamina.config.support import NOT_SUPPORTED
from lamina.errors import ConfigError, MissingFileError, UnsupportedFieldError

# Of the real config only this is not here: it is about one process, and never saved.
NAMES = ("target_modules", "exclude_modules")
SIMPLE: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "lora_dropout": 0.25,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["up_proj"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 3.5},
    "bias": "lora_only",
    "use_rslora": True,
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "gaussian",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "base_model_name_or_path": "some/base",
    "revision": "abc",
}


def directory(path: Path, values: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(values))
    return path


# --- the same as the real one -----------------------------------------------------------------


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def test_fields_and_defaults_are_those_of_peft() -> None:
    theirs = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    ours = {field.name: field for field in dataclasses.fields(LoraConfig)}
    assert theirs.keys() == ours.keys()
    for name, field in ours.items():
        mine, other = default_of(field), default_of(theirs[name])
        if dataclasses.is_dataclass(mine):
            mine, other = vars(mine), vars(other)
        assert mine == other, name


def test_positional_arguments_are_in_the_same_order() -> None:
    theirs = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    assert [field.name for field in dataclasses.fields(LoraConfig)] == theirs


@pytest.mark.parametrize(
    "values", [{}, {"lora_bias": True}, SIMPLE], ids=["defaults", "lora_bias", "all set"]
)
def test_what_is_written_is_what_peft_writes(values: dict[str, Any], tmp_path: Path) -> None:
    LoraConfig(**values).save_pretrained(tmp_path / "ours")
    peft.LoraConfig(**values).save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (
        json.loads((tmp_path / which / "adapter_config.json").read_text())
        for which in ("ours", "theirs")
    )
    for config in (ours, theirs):
        for name in NAMES:
            config[name] = sorted(config[name]) if config[name] else config[name]
    assert theirs.pop("peft_version").startswith(FORMAT_VERSION)
    assert ours.pop("peft_version") == FORMAT_VERSION
    # Saved for inference, whatever it was in memory.
    assert theirs.pop("inference_mode") in (True, False)
    assert ours.pop("inference_mode") is values.get("inference_mode", False)
    assert ours == theirs


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    LoraConfig(**SIMPLE).save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(theirs, peft.LoraConfig)
    for name, value in SIMPLE.items():
        read = getattr(theirs, name)
        assert (set(read) == set(value)) if name in NAMES else (read == value), name


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    peft.LoraConfig(**SIMPLE).save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(tmp_path) == LoraConfig(
        **SIMPLE, peft_version=peft.__version__
    )


# --- what isn't supported ---------------------------------------------------------------------

ON: dict[str, Any] = {
    "megatron_config": {"tensor_model_parallel_size": 2},
    "trainable_token_indices": [1, 2],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"scale": "stable"},
    "use_dora": True,
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [(0, 2)],
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_a_field_that_is_not_supported_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        LoraConfig(**{name: ON[name]})
    assert caught.value.faults == (f"{name}={ON[name]!r}",)
    with pytest.raises(UnsupportedFieldError, match=name):
        PeftConfig.from_pretrained(directory(tmp_path, {"peft_type": "LORA", name: ON[name]}))


@pytest.mark.parametrize("name", ON)
def test_its_off_values_are_fine(name: str) -> None:
    default = next(default_of(f) for f in dataclasses.fields(LoraConfig) if f.name == name)
    for off in (None, default):
        assert getattr(LoraConfig(**{name: off}), name) in (None, default)


def test_every_field_is_either_in_use_or_refused() -> None:
    """A field that peft gains has to be thought about, not taken over as ornament."""
    harmless = {"auto_mapping", "peft_version", "peft_type", "megatron_core", "qalora_group_size"}
    harmless |= {"runtime_config"}
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names == SIMPLE.keys() | {"lora_bias"} | ON.keys() | harmless


def test_all_that_is_not_supported_is_named_at_once() -> None:
    asked = {name: ON[name] for name in NOT_SUPPORTED}
    with pytest.raises(UnsupportedFieldError, match=f"{len(asked)} field") as caught:
        LoraConfig(**asked)
    assert caught.value.faults == tuple(f"{name}={value!r}" for name, value in asked.items())


def test_unknown_fields_of_a_file_are_refused_unless_they_are_off(tmp_path: Path) -> None:
    off = {"brand_new": None, "use_new": False, "new_list": [], "new_dict": {}}
    path = directory(tmp_path / "off", {"peft_type": "LORA", "r": 3, **off})
    assert PeftConfig.from_pretrained(path).r == 3
    on = {"qqq": True, "lora_alhpa": 4, "zero": 0, "empty": ""}
    path = directory(tmp_path / "on", {"peft_type": "LORA", **on})
    with pytest.raises(UnsupportedFieldError, match="4 field") as caught:
        PeftConfig.from_pretrained(path)
    assert str(path) in caught.value.what
    assert caught.value.faults == (
        "empty=''",
        "lora_alhpa=4; did you mean 'lora_alpha'?",
        "qqq=True",
        "zero=0",
    )


def test_other_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="'IA3'"):
        PeftConfig.from_dict({"peft_type": "IA3"})


# --- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"r": 0}, "r=0: "),
        ({"r": 8.0}, "r=8.0: "),
        ({"r": True}, "r=True: "),
        ({"rank_pattern": {"q": -1}}, "rank_pattern['q']=-1: "),
        ({"rank_pattern": ["q"]}, "rank_pattern=['q']: "),
        ({"rank_pattern": {3: 4}}, "rank_pattern[3]: "),
        ({"rank_pattern": {"(": 4}}, "rank_pattern['(']: "),
        ({"alpha_pattern": {"q": "4"}}, "alpha_pattern['q']='4': "),
        ({"lora_alpha": 0}, "lora_alpha=0: "),
        ({"lora_alpha": "16"}, "lora_alpha='16': "),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: "),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf: "),
        ({"lora_dropout": 1}, "lora_dropout=1: "),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1: "),
        ({"lora_dropout": None}, "lora_dropout=None: "),
        ({"bias": "some"}, "bias='some': "),
        ({"use_rslora": "yes"}, "use_rslora='yes': "),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True goes with"),
        ({"init_lora_weights": 1}, "init_lora_weights=1: "),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [1]}, "target_modules=[1]: "),
        ({"target_modules": "("}, "target_modules: "),
        ({"exclude_modules": "*"}, "exclude_modules: "),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': "),
        ({"layers_to_transform": "3"}, "layers_to_transform='3': "),
        ({"layers_to_transform": [0, -1]}, "layers_to_transform=[0, -1]: "),
        ({"layers_pattern": "h"}, "layers_pattern says where layers are"),
        ({"target_modules": ".*q", "layers_to_transform": 0}, "layers_to_transform can't be"),
        ({"task_type": "CAUSAL"}, "task_type='CAUSAL' "),
    ],
)
def test_what_is_wrong_is_said(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**values)
    (only,) = caught.value.faults
    assert only.startswith(fault)


def test_all_that_is_wrong_is_listed_at_once() -> None:
    with pytest.raises(ConfigError, match="6 setting") as caught:
        LoraConfig(
            r=0, lora_alpha=0, lora_dropout=2, bias="x", target_modules="(", task_type="NOTHING"
        )
    assert len(caught.value.faults) == 6
    assert isinstance(caught.value, ValueError)


def test_right_values_are_taken_as_they_are() -> None:
    config = LoraConfig(**SIMPLE)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.task_type is TaskType.CAUSAL_LM
    assert config.peft_type is PeftType.LORA
    assert LoraConfig(target_modules="all-linear").target_modules == "all-linear"
    assert LoraConfig(rank_pattern=None, alpha_pattern=None).rank_pattern == {}


# --- files ------------------------------------------------------------------------------------


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = LoraConfig(**SIMPLE)
    config.save_pretrained(tmp_path / "new" / "dir")
    read = PeftConfig.from_pretrained(tmp_path / "new" / "dir")
    assert isinstance(read, LoraConfig)
    assert dataclasses.replace(read, peft_version=None) == config
    assert [path.name for path in (tmp_path / "new" / "dir").iterdir()] == ["adapter_config.json"]


def test_the_text_is_the_same_for_the_same_config() -> None:
    one = LoraConfig(target_modules=["a", "b", "c"])
    two = LoraConfig(target_modules={"c", "b", "a"})
    assert one.to_json() == two.to_json()
    assert json.loads(one.to_json())["target_modules"] == ["a", "b", "c"]


def test_arguments_override_what_the_file_says(tmp_path: Path) -> None:
    LoraConfig(**SIMPLE).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path, inference_mode=False, r=16, revision="x")
    assert isinstance(config, LoraConfig)
    assert (config.inference_mode, config.r, config.lora_alpha) == (False, 16, 12)
    with pytest.raises(ConfigError, match="r=0"):
        LoraConfig.from_pretrained(tmp_path, r=0)
    with pytest.raises(UnsupportedFieldError, match="did you mean 'lora_dropout'"):
        LoraConfig.from_pretrained(tmp_path, lora_droput=0.1)


def test_a_subfolder_is_found(tmp_path: Path) -> None:
    LoraConfig(r=5).save_pretrained(tmp_path / "inner")
    config = PeftConfig.from_pretrained(tmp_path, subfolder="inner")
    assert isinstance(config, LoraConfig)
    assert config.r == 5


@pytest.mark.parametrize("text", ["", "{", "[1]", '"r"', "\xff", "[" * 100_000])
def test_what_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_missing_config_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        LoraConfig().save_pretrained(tmp_path / "file")


def test_reading_a_config_needs_no_torch(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    code = (
        "import sys; from lamina.config import PeftConfig; "
        "print(PeftConfig.from_pretrained(sys.argv[1]).r, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3", "False"]
