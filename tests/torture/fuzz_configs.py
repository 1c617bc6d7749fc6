"""Mutators of `adapter_config.json`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.torture.fuzz_bytes import Mutator
from tests.torture.fuzz_corpus import CONFIG
from tests.torture.fuzz_json import dumps, rewritten, strange

# Each takes exponential or long polynomial time to fail in a matcher that backtracks.
SLOW_PATTERNS = [
    "(a+)+$",
    r"(.*)*\.x",
    r"(\w+\.?)*x",
    r"(([a-z_.0-9])+.)+X",
    r"(.|\w)*Q",
    r"(a|a|[a-z]|.)*Z",
    r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)Q",
    r".*.*.*.*.*.*.*.*.*.*.*.*.*.*.*Q",
    r"(?:.{0,50}){0,50}Q",
    r"((.?){30}){30}Q",
    r"(x?){25}(.*)+Q",
    r"(?=(.*)+Q).*",
    r"(.*)\1+\1+\1+\1+Q",
    r"(?:(?:.+)?)+?Q",
    r"(?i:(.+)+q)Q",
    "a{99999999999999999999}",
    "a{4294967294}",
    "((a{1000}){1000}){1000}",
    "(" * 5_000 + ")" * 5_000,
    "|".join(f"x{i}" for i in range(50_000)),
    "[" * 10_000,
    "(?P<a>x)(?P<a>y)",
    "(?<=a+)b",
    "\\",
    ".*" * 3_000 + "Q",
    "(?#" + "x" * 300_000 + ")",
]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    3,
    10**6,
    2**31,
    10**12,
    2**63,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    -0.0,
    "4",
    True,
    None,
    [4],
]


def _values(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / CONFIG).read_text())
    return values


def _put(path: Path, values: object) -> None:
    (path / CONFIG).write_bytes(dumps(values))


def any_field(rng: random.Random, path: Path) -> str:
    values = _values(path)
    name = rng.choice(sorted(values))
    values[name] = strange(rng)
    _put(path, values)
    return f"{name} = {str(values[name])[:60]!r}"


def several_fields(rng: random.Random, path: Path) -> str:
    values = _values(path)
    chosen = rng.sample(sorted(values), 4)
    values.update({name: strange(rng) for name in chosen})
    _put(path, values)
    return f"{', '.join(chosen)} are strange"


def all_fields(rng: random.Random, path: Path) -> str:
    values = _values(path)
    kept = {"peft_type": values["peft_type"]}
    _put(path, {**{name: strange(rng) for name in values}, **kept})
    return "all fields are strange"


def numbers(rng: random.Random, path: Path) -> str:
    values = _values(path)
    found = ["r", "lora_alpha", "lora_dropout", "init_r", "target_r", "total_step", "tinit"]
    name = rng.choice([n for n in found if n in values])
    values[name] = rng.choice(NUMBERS)
    _put(path, values)
    return f"{name} = {values[name]!r}"


def tables(rng: random.Random, path: Path) -> str:
    values = _values(path)
    name = rng.choice(["rank_pattern", "alpha_pattern"])
    key = rng.choice(["q_proj", ".*", "", "nothing", "é", "\0", rng.choice(SLOW_PATTERNS)])
    values[name] = {key: rng.choice(NUMBERS)}
    _put(path, values)
    return f"{name} = {str(values[name])[:60]}"


def slow_pattern(rng: random.Random, path: Path) -> str:
    values = _values(path)
    pattern = rng.choice(SLOW_PATTERNS)
    name = rng.choice(
        ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
    )
    if name.endswith("_pattern") and name != "layers_pattern":
        values[name] = {pattern: 4}
    else:
        values[name] = pattern
    if name == "layers_pattern":
        values["layers_to_transform"] = [0, 1]
        values["target_modules"] = ["q_proj", "v_proj"]
    if name == "exclude_modules" and rng.random() < 0.5:
        values["target_modules"] = "all-linear"
    _put(path, values)
    return f"{name} = {pattern[:60]!r}"


def many_entries(rng: random.Random, path: Path) -> str:
    values = _values(path)
    kind = rng.choice(["targets", "saved", "ranks", "patterns", "rows", "layers", "excluded"])
    count = rng.choice([*[1_000] * 6, *[20_000] * 2, 200_000])
    names = [f"x{i}_proj" for i in range(count)]
    match kind:
        case "targets":
            values["target_modules"] = [*(values.get("target_modules") or []), *names]
        case "excluded":
            values["exclude_modules"] = names
        case "saved":
            values["modules_to_save"] = names
        case "ranks":
            values["rank_pattern"] = dict.fromkeys(names, 4)
        case "patterns":
            values["alpha_pattern"] = {f".*{name}$": 4 for name in names}
        case "rows":
            values["trainable_token_indices"] = list(range(count))
        case "layers":
            values["layers_to_transform"] = list(range(count))
    _put(path, values)
    return f"{count} {kind}"


def kinds(rng: random.Random, path: Path) -> str:
    values = _values(path)
    known = ["LORA", "ADALORA", "lora", "IA3", "PREFIX_TUNING", "", "XLORA", "../LORA", None, 3]
    values["peft_type"] = rng.choice([*known, [], {}, ["LORA"]])
    _put(path, values)
    return f"peft_type = {values['peft_type']!r}"


def switches(rng: random.Random, path: Path) -> str:
    """Another method, or another way to begin, than the tensors are of."""
    values = _values(path)
    changes: list[dict[str, Any]] = [
        {"use_dora": not values.get("use_dora")},
        {"use_rslora": not values.get("use_rslora")},
        {"lora_bias": not values.get("lora_bias")},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_999999999"},
        {"init_lora_weights": "pissa_niter_" + "9" * 5000},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}},
        {"init_lora_weights": "x" * 1000},
        {"init_lora_weights": "gaussian"},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"layer_replication": [[0, 10**9]]},
        {"layer_replication": [[0, 2]] * 20_000},
        {"layer_replication": [[1, 0], [-1, 2], [True, 2]]},
        {"target_parameters": ["x.weight"]},
        {"target_parameters": ["self_attn.q_proj.weight"]},
        {"trainable_token_indices": [10**18]},
        {"trainable_token_indices": {"embed_tokens": [10**9, 3]}},
        {"trainable_token_indices": {"q_proj": [1]}},
        {"modules_to_save": ["q_proj"]},
        {"modules_to_save": ["lm_head", "norm", ""]},
        {"alora_invocation_tokens": [2**70]},
        {"use_qalora": True, "qalora_group_size": 0},
        {"use_qalora": True, "qalora_group_size": 10**12},
        {"velora_config": {"num_groups": 10**9}},
        {"use_bdlora": {"nblocks": 10**9, "target_modules_bd_a": ["q_proj"]}},
        {"kasa_config": {}},
        {"monteclora_config": {"monteclora_n": 10**9}},
        {"arrow_config": {"router_temperature": 0}},
        {"corda_config": {"cache_file": "/etc/passwd", "covariance_file": "/etc/shadow"}},
        {"runtime_config": {"ephemeral_gpu_offload": "x"}},
        {"auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}},
        {"auto_mapping": {"base_model_class": ["x"], "parent_library": "transformers.x"}},
        {"auto_mapping": "x"},
        {"base_model_name_or_path": "../../../etc"},
        {"base_model_name_or_path": "x\0y"},
        {"base_model_name_or_path": ["x"]},
        {"revision": {"a": 1}},
        {"task_type": "SEQ_CLS"},
        {"task_type": "PROMPT"},
        {"task_type": ["CAUSAL_LM"]},
        {"target_modules": []},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model"]},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"]},
        {"exclude_modules": ["q_proj"]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 10**12},
        {"ensure_weight_tying": True},
        {"megatron_config": {"a": 1}},
        {"megatron_core": "os"},
        {"trust_remote_code": True},
        {"peft_version": "99.0.0"},
        {"new_field": None},
        {"new_field": "on"},
        {"inference_mode": False},
    ]
    change = rng.choice(changes)
    _put(path, {**values, **change})
    return str(change)[:100]


def missing_fields(rng: random.Random, path: Path) -> str:
    values = _values(path)
    gone = rng.sample(sorted(values), rng.choice([1, 3, len(values)]))
    _put(path, {name: value for name, value in values.items() if name not in gone})
    return f"without {', '.join(gone)[:80]}"


def no_object(rng: random.Random, path: Path) -> str:
    value = strange(rng)
    _put(path, value)
    return f"the config is {str(value)[:60]!r}"


def config_text(rng: random.Random, path: Path) -> str:
    told, text = rewritten(rng, (path / CONFIG).read_text())
    (path / CONFIG).write_bytes(text)
    return f"config: {told}"


MUTATORS: list[Mutator] = [
    any_field,
    any_field,
    several_fields,
    all_fields,
    numbers,
    tables,
    slow_pattern,
    many_entries,
    kinds,
    switches,
    switches,
    missing_fields,
    no_object,
    config_text,
]
