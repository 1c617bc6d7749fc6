"""Write measured figures into README.md and docs/trust.md, between their markers.

They are read from runs/demo/results.json, runs/demo/demo.txt, docs/benchmark.json,
docs/streaming_merge.json, and of the example with a support bot from its plan and what
runs/support-bot says; what isn't there leaves its part as it is.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lamina.training.evaluate.matrix import Row, matrix_of
from lamina.training.evaluate.scores import Evaluation, Score
from lamina.training.run.state import RunState

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/images/support-bot-page.png"


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


def example_section(run: Path, plan: str) -> str:
    """The stages of a plan, what each gained and cost, and what they answer."""
    evaluation, state = Evaluation.read(run), RunState.read(run)
    matrix = matrix_of(evaluation, state.chain)
    columns = ["held out", *matrix.columns, "learnt in"]
    rows = [columns, ["---", *("---:" for _ in matrix.columns), "---"], *map(_scores, matrix.rows)]
    judged = [evaluation.base, *(evaluation.stages[name] for name in state.chain)]
    asked = [each.prompt for each in evaluation.base.answers]
    answers = [["asked", *matrix.columns[1:]], ["---"] * len(matrix.columns)]
    for place, prompt in enumerate(asked):
        told = [_quoted(each.answers[place].text) for each in judged[1:]]
        answers.append([prompt, *told])
    # A stage's seconds have those in them that it was measured in.
    seconds = evaluation.base.seconds + sum(state.stages[name].seconds for name in state.chain)
    stages = plan[plan.index("stages:") : plan.index("evals:")].strip()
    return "\n".join(
        [
            f"```yaml\n{stages}\n```",
            "",
            *map(_row, rows),
            "",
            *map(_row, answers),
            "",
            f"All of it took {seconds:.0f} s.",
        ]
    )


def _scores(row: Row) -> list[str]:
    scores = [_score(cell.score) for cell in row.cells]
    return [f"{row.name} ({row.metric.replace('_', ' ')})", *scores, row.learnt_in or ""]


def _score(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.2f}" if score.metric == "loss" else f"{score.value:.0%}"


def _quoted(text: str, longest: int = 40) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return f"`{line[:longest]}{'...' if len(line) > longest else ''}`" if line else ""


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
    run = root / "runs" / "support-bot"
    if (run / "evaluation.json").is_file():
        plan = (root / "examples" / "support-bot" / "plan.yaml").read_text(encoding="utf-8")
        text = put_between(text, "example", example_section(run, plan))
        _copy_pictures(run / "report", root / "docs" / "images", text)
        done.append("example")
    readme.write_text(text, encoding="utf-8")
    streaming, trust = root / "docs" / "streaming_merge.json", root / "docs" / "trust.md"
    if streaming.is_file():
        section = streaming_section(json.loads(streaming.read_text(encoding="utf-8")))
        text = put_between(trust.read_text(encoding="utf-8"), "streaming", section)
        trust.write_text(text, encoding="utf-8")
        done.append("streaming")
    return done


def _copy_pictures(report: Path, images: Path, readme: str) -> None:
    """The pictures of a report that the README shows, and the top of its page."""
    if f"({PAGE})" in readme:
        _picture_page(report / "index.html", images / Path(PAGE).name)
    for name in re.findall(r"\(docs/images/support-bot-([\w-]+\.png)\)", readme):
        images.mkdir(parents=True, exist_ok=True)
        if f"docs/images/support-bot-{name}" != PAGE:
            shutil.copyfile(report / name, images / f"support-bot-{name}")


def _picture_page(page: Path, image: Path) -> None:
    """What a browser shows of a page first; without Chromium the picture stays as it is."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"no chromium: {image} is left as it is")
        return
    image.parent.mkdir(parents=True, exist_ok=True)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    shown = [f"--screenshot={image}", "--window-size=1280,1130", page.resolve().as_uri()]
    subprocess.run([browser, *flags, *shown], check=True, capture_output=True)


if __name__ == "__main__":
    renewed = update(ROOT)
    print(f"README.md, docs/trust.md: {', '.join(renewed) or 'nothing measured yet'}")
    sys.exit(not renewed)
