"""`python -m benchmarks`: the whole table, on the screen and as JSON."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table

import lamina
from benchmarks import cases
from benchmarks.measure import Result, measure
from benchmarks.models import FULL, TINY, Sizes
from benchmarks.training import training

GROUPS = (
    cases.importing,
    cases.injecting,
    cases.crowding,
    cases.files,
    cases.folding,
    cases.combining,
    training,
)


def run(sizes: Sizes, console: Console) -> list[Result]:
    """Measure everything; each result is told as it comes."""
    libraries = {"peft": peft, "lamina": lamina}
    results = []
    # What the imports made is left out of each collection between two measurements.
    gc.collect()
    gc.freeze()
    for group in GROUPS:
        for case in group(sizes):
            with console.status(case.name):
                results.append(measure(case, libraries))
            console.print(f"  {case.name}: {results[-1].ratio:.2f}", style="dim", highlight=False)
    gc.unfreeze()
    return results


def machine() -> dict[str, Any]:
    """Where it ran, and with what."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "lamina")},
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def as_json(results: list[Result], seconds: float) -> dict[str, Any]:
    """What is written to a file: medians, ratios, and all samples."""
    return {
        "machine": machine(),
        "seconds": round(seconds, 1),
        "rows": [
            {
                "name": result.name,
                "unit": result.unit,
                "peft": _digits(result.median("peft")),
                "lamina": _digits(result.median("lamina")),
                "ratio": _digits(result.ratio),
                "samples": {k: [_digits(x) for x in v] for k, v in result.samples.items()},
            }
            for result in results
        ],
    }


def figure(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def table(results: list[Result]) -> Table:
    """Both sides and the ratio; in bold where Lamina takes less, dim where it takes more."""
    made = Table(title="peft / Lamina: more than 1 means that Lamina takes less", box=None)
    made.add_column("median of")
    for column in ("peft", "Lamina", "ratio"):
        made.add_column(column, justify="right")
    for each in results:
        sides = [f"{figure(each.median(side))} {each.unit}" for side in ("peft", "lamina")]
        style = "bold" if each.ratio > 1.05 else "dim" if each.ratio < 0.95 else ""
        made.add_row(each.name, *sides, figure(each.ratio), style=style)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    parser.add_argument("--tiny", action="store_true", help="models too small for real figures")
    options = parser.parse_args(arguments)
    console = Console()
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = run(TINY if options.tiny else FULL, console)
    seconds = time.monotonic() - began
    console.print(table(results))
    told = as_json(results, seconds)
    console.print(", ".join(f"{key} {value}" for key, value in told["machine"].items()))
    console.print(f"Took {seconds:.0f} s.")
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
