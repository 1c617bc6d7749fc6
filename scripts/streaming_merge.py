"""Measure a streamed merge of a large synthetic checkpoint: memory, speed, and its bits.

    python scripts/streaming_merge.py --gigabytes 4 --json docs/streaming_merge.json

Makes a sharded bf16 Llama with random weights, tensor by tensor, and an adapter for all of its
linear layers. Then copies its files, merges by streaming, and merges in memory, each in a process
of its own, and compares the results. Whatever it makes is removed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 16
SHARD = 10**9
SEED = 20261124
_ITEM = 2
_MERGE = """
import json, sys
from lamina.stages.merged import save_merged
report = save_merged(sys.argv[1], sys.argv[2], base=sys.argv[3], streaming=sys.argv[4] == "stream",
                     verify=sys.argv[5])
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps({"peak": peak * 1024, "seconds": report.seconds,
                  "verified": report.verified and report.verified.max_difference,
                  "entries": report.verified and report.verified.entries,
                  "dtype": report.dtype, "changed": report.changed}))
"""


def config_for(gigabytes: float) -> dict[str, Any]:
    """The config of a Llama whose weights in bf16 take about so much."""
    large = gigabytes >= 1
    hidden, inner, vocabulary = (2048, 8192, 128_256) if large else (512, 2048, 8_000)
    heads, shared = (32, 8) if large else (8, 2)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    one = sum(map(prod, shapes_of(config).values()))
    config["num_hidden_layers"] = 2
    layer = sum(map(prod, shapes_of(config).values())) - one
    wanted = gigabytes * 1e9 / _ITEM
    config["num_hidden_layers"] = max(1, round((wanted - one) / layer) + 1)
    return config


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all weights, in the order of the model."""
    h, f, v = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (h,)
        for name, shape in _linear(h, kv, f).items():
            shapes[f"{layer}.{name}.weight"] = shape
        shapes[f"{layer}.post_attention_layernorm.weight"] = (h,)
    shapes["model.norm.weight"] = (h,)
    shapes["lm_head.weight"] = (v, h)
    return shapes


def _linear(h: int, kv: int, f: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
    }


def make_base(directory: Path, config: dict[str, Any], shard: int) -> None:
    """Write the checkpoint, one block of rows in memory at a time; the same bytes each time."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shapes = shapes_of(config)
    parts = list(_parts(shapes, shard))
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        _write(directory / file, {name: shapes[name] for name in sorted(names)})
    total = sum(prod(shape) * _ITEM for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text)


def _parts(shapes: dict[str, tuple[int, ...]], shard: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        takes = prod(shape) * _ITEM
        if names and size + takes > shard:
            yield names
            names, size = [], 0
        names.append(name)
        size += takes
    yield names


def _write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = prod(shape) * _ITEM
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for block in _random(name, shape):
                file.write(memoryview(block.view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def _random(name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    generator = torch.Generator().manual_seed(SEED ^ drawn)
    left = prod(shape)
    while left:
        count = min(left, 2**22)
        yield (torch.randn(count, generator=generator) * 0.02).bfloat16()
        left -= count


def make_adapter(directory: Path, config: dict[str, Any], base: Path) -> None:
    """An adapter of random factors for all linear layers but the head, as PEFT writes one."""
    directory.mkdir(parents=True)
    h, f = config["hidden_size"], config["intermediate_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for index in range(config["num_hidden_layers"]):
        for name, (n_out, n_in) in _linear(h, kv, f).items():
            module = f"base_model.model.model.layers.{index}.{name}"
            a = torch.randn(RANK, n_in, generator=generator) / n_in**0.5
            b = torch.randn(n_out, RANK, generator=generator) * 0.01
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.rpartition(".")[2] for name in _linear(h, kv, f)}),
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def forget(directory: Path) -> None:
    """Ask the system to drop what it keeps of the files in memory, so that reading is from disk."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remember(directory: Path) -> None:
    """Read all, so that the system keeps it in memory."""
    for file in directory.iterdir():
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass


def copied(base: Path, target: Path) -> float:
    """Seconds that copying the files takes until they are on the disk, as a merge waits too."""
    began = time.monotonic()
    target.mkdir()
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    took = time.monotonic() - began
    shutil.rmtree(target)
    return took


def merged(adapter: Path, out: Path, base: Path, way: str, verify: str) -> dict[str, Any]:
    """Merge in a process of its own: its peak of resident memory, and its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _MERGE, str(adapter), str(out), str(base), way, verify],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["with_start"] = time.monotonic() - began
    return found


def same_files(one: Path, other: Path) -> tuple[int, int]:
    """(tensors that are the same bit for bit in both directories, all tensors)."""
    from safetensors import safe_open

    def where(directory: Path) -> dict[str, Path]:
        found = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        return found

    ours, theirs = where(one), where(other)
    same = 0
    for name in ours.keys() & theirs.keys():
        with (
            safe_open(ours[name], framework="pt") as a,
            safe_open(theirs[name], framework="pt") as b,
        ):
            first, second = a.get_tensor(name), b.get_tensor(name)
        alike = first.dtype == second.dtype and first.shape == second.shape
        same += int(alike and torch.equal(first.view(torch.uint8), second.view(torch.uint8)))
    return same, len(ours.keys() | theirs.keys())


def _keep_faster(rows: dict[str, dict[str, Any]], name: str, found: dict[str, Any]) -> None:
    """The faster of several, with the largest peak of all: others use the machine as well."""
    before = rows.setdefault(name, found)
    peak = max(before.get("peak", 0), found.get("peak", 0))
    rows[name] = min(before, found, key=lambda row: row["seconds"])
    if peak:
        rows[name]["peak"] = peak


def measure(gigabytes: float, directory: Path, repeat: int) -> dict[str, Any]:
    """Make, copy, merge and compare; see the module."""
    base, adapter = directory / "base", directory / "adapter"
    config = config_for(gigabytes)
    make_base(base, config, SHARD if gigabytes >= 1 else int(gigabytes * 2.5e8))
    make_adapter(adapter, config, base)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    before = {file.name: file.stat().st_mtime_ns for file in base.iterdir()}
    rows: dict[str, dict[str, Any]] = {}
    for state, prepare in (("cold", forget), ("warm", remember)):
        for _ in range(repeat):
            prepare(base)
            _keep_faster(rows, f"copy, {state}", {"seconds": copied(base, directory / "copy")})
            prepare(base)
            shutil.rmtree(directory / "streamed", ignore_errors=True)
            found = merged(adapter, directory / "streamed", base, "stream", "samples")
            _keep_faster(rows, f"stream, {state}", found)
    rows["in memory, warm"] = merged(adapter, directory / "whole", base, "whole", "none")
    same, tensors = same_files(directory / "streamed", directory / "whole")
    for row in rows.values():
        row["megabytes_per_second"] = size / 1e6 / row["seconds"]
    return {
        "checkpoint_bytes": size,
        "shards": len(list(base.glob("*.safetensors"))),
        "parameters": size // _ITEM,
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "rank": RANK,
        "same_tensors": same,
        "tensors": tensors,
        "base_untouched": before == {f.name: f.stat().st_mtime_ns for f in base.iterdir()},
        "rows": rows,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }


def show(found: dict[str, Any]) -> None:
    """A table for people."""
    size = found["checkpoint_bytes"] / 1e9
    print(
        f"{size:.2f} GB in {found['shards']} shards, {found['parameters']:,} parameters in bf16, "
        f"adapter of rank {found['rank']} ({found['adapter_bytes'] / 1e6:.0f} MB)"
    )
    print(f"{'':18}{'seconds':>9}{'MB/s':>8}{'peak resident MB':>18}")
    for name, row in found["rows"].items():
        peak = f"{row['peak'] / 1e6:.0f}" if "peak" in row else "-"
        print(f"{name:18}{row['seconds']:9.1f}{row['megabytes_per_second']:8.0f}{peak:>18}")
    print(
        f"{found['same_tensors']} of {found['tensors']} tensors are the same bit for bit in both "
        f"ways; base untouched: {found['base_untouched']}"
    )


def main() -> int:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeat", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--directory", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as place:
        found = measure(asked.gigabytes, Path(place), asked.repeat)
    show(found)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")
    fine = found["same_tensors"] == found["tensors"] and found["base_untouched"]
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
