"""What an installation runs on: versions, platform, processor, devices. No torch unless asked."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lamina._version import __version__

# What Lamina needs, then what it works with where it is there.
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "torchao",
    "hqq",
    "triton",
    "deepspeed",
    "matplotlib",
)
_CPUINFO = Path("/proc/cpuinfo")
# Instructions that matrix products gain from, as Linux names them on x86 and ARM.
_FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
)


@dataclass(frozen=True)
class Device:
    """An accelerator that torch sees."""

    name: str
    details: str


@dataclass(frozen=True)
class Environment:
    """Where Lamina runs.

    Attributes:
        packages: name -> version; None where it isn't installed.
        system: the operating system and architecture.
        python: its version and implementation.
        cpu_model: as the system calls it; None if it doesn't say.
        cpu_features: instructions that speed up matrix products.
        cores: processors of the machine.
        cores_usable: those that this process may run on.
        memory_bytes: of the machine; None if unknown.
        devices: accelerators; None if torch was not asked.
    """

    packages: dict[str, str | None]
    system: str
    python: str
    cpu_model: str | None
    cpu_features: tuple[str, ...]
    cores: int
    cores_usable: int
    memory_bytes: int | None
    devices: tuple[Device, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def describe_environment(*, with_torch: bool = False) -> Environment:
    """Describe this installation.

    Args:
        with_torch: import torch and list its devices.
    """
    model, flags = _processor()
    cores = os.cpu_count() or 1
    return Environment(
        packages={"lamina": __version__, **{name: _version(name) for name in PACKAGES}},
        system=platform.platform(),
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        cpu_model=model or platform.processor() or None,
        cpu_features=tuple(name for name in _FEATURES if name in flags),
        cores=cores,
        cores_usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        memory_bytes=_memory(),
        devices=_devices() if with_torch else None,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> tuple[str | None, set[str]]:
    """The processor's name and its flags, where Linux tells them."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, set()
    first = text.split("\n\n", maxsplit=1)[0]
    fields = dict(line.split(":", maxsplit=1) for line in first.splitlines() if ":" in line)
    told = {name.strip(): value.strip() for name, value in fields.items()}
    return told.get("model name"), set(told.get("flags", told.get("Features", "")).split())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _devices() -> tuple[Device, ...]:
    try:
        import torch
    except ImportError:
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        capability = f"capability {of.major}.{of.minor}"
        memory = f"{of.total_memory / 2**30:.1f} GiB"
        found.append(Device(f"cuda:{index}", f"{of.name}, {memory}, {capability}"))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU"))
    return tuple(found)
