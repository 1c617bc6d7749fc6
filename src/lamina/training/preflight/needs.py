"""What a run needs of memory and disk, estimated before it begins.

Memory, in bytes, of the stage that needs most:

- base: entries of the weights * bytes of the dtype; 4 bits are 0.5 bytes and 2/64 more for the
  scales of blocks of 64, 8 bits are 1 byte, in linear layers only.
- adapters: 4 bytes for each entry of older stages', and 4 + 4 + optimizer state for each that
  trains. The state is 8 bytes for Adam's two moments, 2 in 8 bits, 4 with one, 0 without.
- merge: the folded weights once more, of which the unfolded are kept.
- activations, estimated: per layer and token 17 * hidden entries (Korthikanti et al., 2022,
  arXiv:2205.05198, 34 bytes in 16 bits, attention without stored scores); with
  gradient_checkpointing 1 * hidden for each layer and 17 * hidden for one.
- logits, estimated: tokens * vocabulary * (bytes of the dtype + 8), as they are made, summed in
  fp32, and their gradient.

Tokens are batch * max_length, twice of it for pairs (dpo, orpo, reward), and of prompt and answer
for grpo. Disk: each stage's adapter holds all ranks up to it in fp32; of one stage at a time there
are save_total_limit checkpoints with what trains and its optimizer state.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lamina.training.plan import Plan
from lamina.training.plan.settings import Settings
from lamina.training.preflight.base import Base
from lamina.training.preflight.report import Need
from lamina.training.preflight.targets import Adapter

# Begin of names of optimizers -> bytes of state for each entry; Adam's two moments else.
_STATE = {"adafactor": 1, "sgd": 0, "rmsprop": 4, "adagrad": 4, "lion": 4}
_KEPT_PER_LAYER = 17
_PAIRS = ("dpo", "orpo", "reward")
_FP32 = 4


def memory_need(plan: Plan, base: Base, adapters: list[Adapter]) -> Need:
    """Memory of the stage that needs most of it."""
    stages = range(len(plan.stages))
    highest = max(
        (_memory_of(plan, base, adapters, place) for place in stages),
        key=lambda parts: sum(parts.values()),
    )
    where, free, total = _memory_here()
    return Need("memory", where, highest, free, total)


def disk_need(plan: Plan, adapters: list[Adapter]) -> Need:
    """Disk of all stages, and of the checkpoints of one, less what a run has there already."""
    saved, largest = 0, 0
    for place, stage in enumerate(plan.stages):
        settings = plan.settings_of(stage)
        trained = adapters[place].trainable or 0
        saved += _FP32 * _entries(adapters[: place + 1])
        each = trained * (_FP32 + state_bytes(settings.optim or ""))
        largest = max(largest, each * (settings.save_total_limit or 1))
    folder = Path(plan.output_dir).expanduser()
    while not folder.is_dir():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    there = sum(_bytes_in(Path(plan.output_dir).expanduser() / each.name) for each in plan.stages)
    parts = {"adapters": max(0, saved - there), "checkpoints": largest}
    return Need("disk", str(folder), parts, usage.free, usage.total)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def state_bytes(optimizer: str) -> int:
    """Bytes of an optimizer's state for each entry that trains."""
    if "8bit" in optimizer:
        return 1 if "lion" in optimizer else 2
    return next((size for name, size in _STATE.items() if name in optimizer), 8)


def base_bytes(plan: Plan, base: Base) -> int:
    """Bytes of the base's weights, as the plan has them loaded."""
    size = dtype_of(plan, base).itemsize
    if not plan.load_in_4bit and not plan.load_in_8bit:
        return base.parameters * size
    each = 0.5 + 2 / 64 if plan.load_in_4bit else 1.0
    return int(base.linear * each) + (base.parameters - base.linear) * size


def dtype_of(plan: Plan, base: Base) -> torch.dtype:
    """The dtype that dense weights are loaded in."""
    if plan.dtype != "auto":
        return getattr(torch, plan.dtype)  # type: ignore[no-any-return]
    named: Any = getattr(base.model.config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _memory_of(plan: Plan, base: Base, adapters: list[Adapter], place: int) -> dict[str, int]:
    settings = plan.settings_of(plan.stages[place])
    trained = adapters[place].trainable or 0
    older = _entries(adapters[: place + 1]) - trained
    weights = base_bytes(plan, base)
    parts = {
        "base": weights,
        "adapters": _FP32 * (older + 2 * trained) + trained * state_bytes(settings.optim or ""),
        "merge": 0,
        "activations": 0,
        "logits": 0,
    }
    if plan.stages[place].mode == "merge":
        parts["merge"] = base.linear * dtype_of(plan, base).itemsize
    config, size = base.config, dtype_of(plan, base).itemsize
    tokens = _tokens(settings)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kept = layers + _KEPT_PER_LAYER
    if not settings.gradient_checkpointing:
        kept = layers * _KEPT_PER_LAYER
    parts["activations"] = tokens * hidden * kept * size
    parts["logits"] = tokens * config.vocab_size * (size + 8)
    return parts


def _entries(adapters: list[Adapter]) -> int:
    """Entries of all adapters, each once, whatever stages continue them."""
    return sum({each.stage: each.trainable or 0 for each in adapters}.values())


def _tokens(settings: Settings) -> int:
    length = (settings.max_length or 0) + (
        (settings.max_completion_length or 256) if settings.method == "grpo" else 0
    )
    pairs = 2 if settings.method in _PAIRS else 1
    return (settings.per_device_train_batch_size or 1) * length * pairs


def _memory_here() -> tuple[str, int | None, int | None]:
    """(device, bytes free now, bytes in all)."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.get_device_name(), free, total
    found: dict[str, int] = {}
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0]) * 1024
    return "RAM", found.get("MemAvailable"), found.get("MemTotal")
