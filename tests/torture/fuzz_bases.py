"""Mutants of a base model's directory, and what reads it: streaming, sketches, loading."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lamina
from lamina.checkpoint.doctor import examine
from lamina.checkpoint.sketch import sketch_files
from lamina.checkpoint.stream.files import model_files
from lamina.checkpoint.weights import WeightsOnDisk
from lamina.stages.export import check_export
from lamina.stages.merged import save_merged
from lamina.stages.verify import verify
from tests import models
from tests.torture import fuzz_bytes, fuzz_headers, fuzz_records
from tests.torture.fuzz_bytes import Mutator
from tests.torture.fuzz_consumers import Subject, WrongError
from tests.torture.fuzz_json import dumps, rewritten, strange

CONFIG, ADAPTER = "config.json", "chain"
NAME = ".base"


def make_base(folder: Path) -> None:
    """A base in shards, as transformers saves it."""
    models.tiny_llama().save_pretrained(folder / NAME, max_shard_size="40KB")


def _edit(path: Path, changes: dict[str, Any]) -> None:
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_bytes(dumps({**values, **changes}))


def base_field(rng: random.Random, path: Path) -> str:
    name = rng.choice(sorted(json.loads((path / CONFIG).read_text())))
    value = strange(rng)
    _edit(path, {name: value})
    return f"{name} = {str(value)[:60]!r}"


def base_sizes(rng: random.Random, path: Path) -> str:
    names = ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "head_dim"]
    name = rng.choice([*names, "num_attention_heads", "num_key_value_heads"])
    value = rng.choice([0, -1, 1, 3, 31, 64, 10**5, 10**12, 2**63, 0.5, "32"])
    _edit(path, {name: value})
    return f"{name} = {value!r}"


def base_kind(rng: random.Random, path: Path) -> str:
    changes: list[dict[str, Any]] = [
        {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}},
        {"auto_map": {"AutoModelForCausalLM": "../evil--evil.Evil"}, "model_type": "evil"},
        {"model_type": "../evil"},
        {"model_type": "bert"},
        {"model_type": ["llama"]},
        {"architectures": ["Evil"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [None]},
        {"dtype": "os.system"},
        {"dtype": "float99"},
        {"torch_dtype": ["float32"]},
        {"quantization_config": {"quant_method": "evil"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": "x"},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "evil"}},
        {"trust_remote_code": True},
        {"attn_implementation": "evil/evil"},
        {"_attn_implementation": "kernels-community/evil"},
        {"transformers_weights": "../evil.safetensors"},
    ]
    change = rng.choice(changes)
    (path / "evil.py").write_text("raise SystemExit('code of a file was run')\n")
    _edit(path, change)
    return str(change)[:100]


def base_text(rng: random.Random, path: Path) -> str:
    told, text = rewritten(rng, (path / CONFIG).read_text())
    (path / CONFIG).write_bytes(text)
    return f"config: {told}"


MUTATORS: list[Mutator] = [
    *fuzz_bytes.MUTATORS,
    *fuzz_headers.MUTATORS,
    *fuzz_records.WITH_INDEX,
    base_field,
    base_field,
    base_sizes,
    base_kind,
    base_kind,
    base_text,
]


def _files(subject: Subject) -> None:
    model_files(subject.path)


def _sketch(subject: Subject) -> None:
    sketch_files(subject.path).model_dump_json()


def _weights(subject: Subject) -> None:
    held = WeightsOnDisk(subject.path)
    expected: dict[str, torch.Tensor] = {}
    for file in {*held._files.values()}:
        expected.update(load_file(file))
    for name in sorted(held)[:200]:
        if not torch.equal(held[name].nan_to_num(), expected[name].nan_to_num()):
            raise WrongError(f"{name} has other values than its file")


def _load(subject: Subject) -> None:
    lamina.load(subject.corpus / ADAPTER, str(subject.path))


def _merge(subject: Subject, *, streaming: bool | None) -> None:
    out = subject.path.parent / "merged"
    path = subject.corpus / ADAPTER
    save_merged(path, out, base=str(subject.path), streaming=streaming, verify="samples")


def _verify(subject: Subject) -> None:
    json.dumps(verify(subject.corpus / ADAPTER, str(subject.path)).to_dict())


def _doctor(subject: Subject) -> None:
    json.dumps(examine(subject.corpus / ADAPTER, base=str(subject.path)).to_dict())


def _export(subject: Subject) -> None:
    check_export(subject.corpus / ADAPTER, target="gguf", base=str(subject.path))


def consumers(number: int) -> Iterator[tuple[str, Callable[[Subject], None]]]:
    """What reads the base of that case, by name."""
    yield "files of the base", _files
    yield "sketch of the base", _sketch
    yield "weights of the base", _weights
    yield "merge, streaming", lambda subject: _merge(subject, streaming=True)
    others: list[tuple[str, Callable[[Subject], None]]] = [
        ("load on the base", _load),
        ("merge", lambda subject: _merge(subject, streaming=None)),
        ("verify on the base", _verify),
        ("doctor with the base", _doctor),
        ("export with the base", _export),
    ]
    yield others[number % len(others)]
