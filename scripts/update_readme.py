"""Write measured figures into README.md and docs/trust.md, between their markers.

They are read from runs/demo/results.json, runs/demo/demo.txt, docs/benchmark.json and
docs/streaming_merge.json; what isn't there leaves its part as it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def demo_section(results: dict[str, Any], printed: str) -> str:
    """The matrix of perplexities, what re-opening gave, and what was printed."""
    columns = results["columns"]
    rows = [["after", *columns], ["---", *("---:" for _ in columns)]]
    for name, row in results["matrix"].items():
        rows.append([name, *(f"{row[column]:.2f}" for column in columns)])
    reload = results["reload"]
    told = (
        f"A fresh process that opens the last directory finds the trained model's logits within "
        f"{reload['lamina']:.1e} with Lamina and within {reload['peft']:.1e} with peft. "
        f"All of it took {results['seconds']:.0f} s."
    )
    details = f"<details><summary>What it prints</summary>\n\n```text\n{printed.strip()}\n```\n\n"
    return "\n".join([*map(_row, rows), "", told, "", f"{details}</details>"])


def bench_section(benchmark: dict[str, Any]) -> str:
    """A row for each measurement, and the machine."""
    rows = [["", "peft", "Lamina", "ratio"], ["---", "---:", "---:", "---:"]]
    for each in benchmark["rows"]:
        figures = [f"{_figure(each[side])} {each['unit']}" for side in ("peft", "lamina")]
        rows.append([each["name"], *figures, _figure(each["ratio"])])
    machine = benchmark["machine"]
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    return "\n".join([*map(_row, rows), "", f"Medians; {told}."])


def streaming_section(measured: dict[str, Any]) -> str:
    """Copying, streaming and merging in memory, of one checkpoint."""
    rows = [["", "seconds", "MB/s", "peak resident MB"], ["---", "---:", "---:", "---:"]]
    for name, row in measured["rows"].items():
        peak = f"{row['peak'] / 1e6:,.0f}" if "peak" in row else ""
        speed = f"{row['megabytes_per_second']:,.0f}"
        rows.append([name, f"{row['seconds']:.1f}", speed, peak])
    told = (
        f"A checkpoint of {measured['checkpoint_bytes'] / 1e9:.2f} GB in {measured['shards']} "
        f"shards, rank {measured['rank']} on all linear layers: {measured['same_tensors']} of "
        f"{measured['tensors']} tensors have the same bits both ways. cpus {measured['cpus']}, "
        f"torch {measured['torch']}."
    )
    return "\n".join([*map(_row, rows), "", told])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def put_between(text: str, name: str, section: str) -> str:
    """`text` with `section` between `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the text needs exactly one {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{section}\n\n{end}", text)


def update(root: Path) -> list[str]:
    """Renew `root`/README.md from what has been measured; returns the names of the sections."""
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    done = []
    demo = root / "runs" / "demo"
    if (demo / "results.json").is_file():
        results = json.loads((demo / "results.json").read_text(encoding="utf-8"))
        printed = (demo / "demo.txt").read_text(encoding="utf-8")
        text = put_between(text, "demo", demo_section(results, printed))
        done.append("demo")
    benchmark = root / "docs" / "benchmark.json"
    if benchmark.is_file():
        section = bench_section(json.loads(benchmark.read_text(encoding="utf-8")))
        text = put_between(text, "bench", section)
        done.append("bench")
    readme.write_text(text, encoding="utf-8")
    streaming, trust = root / "docs" / "streaming_merge.json", root / "docs" / "trust.md"
    if streaming.is_file():
        section = streaming_section(json.loads(streaming.read_text(encoding="utf-8")))
        text = put_between(trust.read_text(encoding="utf-8"), "streaming", section)
        trust.write_text(text, encoding="utf-8")
        done.append("streaming")
    return done


if __name__ == "__main__":
    renewed = update(ROOT)
    print(f"README.md, docs/trust.md: {', '.join(renewed) or 'nothing measured yet'}")
    sys.exit(not renewed)
