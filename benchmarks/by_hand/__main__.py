"""The same three stages by hand with peft and TRL, and as a plan: do the losses agree?

    python -m benchmarks.by_hand [--model DIR] [--steps N] [--json FILE]

Each side runs in a process of its own: what is done by hand knows nothing of Lamina, and the plan
is run by `lamina run`. Data, seeds and settings are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.by_hand.task import METHODS, STAGES, Task, paragraphs, prepare

ROOT = Path(__file__).resolve().parents[2]
Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """A figure of both sides.

    Attributes:
        task: how the second stage was put on the first, and with which dropout.
        stage: which one.
        what: the figure: of the last step, of the step at which they differ most, or held out.
        by_hand: with peft and TRL.
        lamina: from the run of the plan.
    """

    task: str
    stage: str
    what: str
    by_hand: float
    lamina: float

    @property
    def difference(self) -> float:
        """Relative to what came out by hand."""
        return abs(self.lamina - self.by_hand) / max(abs(self.by_hand), 1e-12)


def compared(folder: Path, task: Task, texts: Sequence[str]) -> list[Row]:
    """Run both sides in a folder."""
    folder.mkdir(parents=True)
    prepare(folder, task, texts)
    _run(folder, "-m", "benchmarks.by_hand.with_peft", str(folder))
    # Paths of a plan are relative to its file, results to where it is run.
    _run(folder, "-m", "lamina", "run", str(folder / "plan.yaml"), f"output_dir={folder}/lamina")
    by_hand = json.loads((folder / "by_hand.json").read_text(encoding="utf-8"))
    label = f"{task.mode}, dropout {task.dropout:g}" if task.dropout else task.mode
    found: list[Row] = []
    for stage in STAGES:
        log = (folder / "lamina" / "logs" / f"{stage}.jsonl").read_text(encoding="utf-8")
        lamina = [json.loads(line) for line in log.splitlines()]
        found += _rows(label, stage, by_hand[stage], lamina)
    return found


def _rows(label: str, stage: str, by_hand: Log, lamina: Log) -> Iterator[Row]:
    both = [[each["loss"] for each in log if "loss" in each] for log in (by_hand, lamina)]
    assert len(both[0]) == len(both[1]), f"{stage}: {len(both[0])} and {len(both[1])} steps"
    steps = [
        Row(label, stage, f"loss, step {n}", *pair)
        for n, pair in enumerate(zip(*both, strict=True), 1)
    ]
    furthest = max(steps, key=lambda row: row.difference)
    if furthest.difference > steps[-1].difference:
        yield furthest
    yield steps[-1]
    held_out = [
        [each["eval_loss"] for each in log if "eval_loss" in each][-1] for log in (by_hand, lamina)
    ]
    yield Row(label, stage, "held-out loss", *held_out)


def _run(folder: Path, *words: str) -> None:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **offline, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-4000:]}")


def table(rows: Sequence[Row]) -> Table:
    """Both sides and how far they are apart."""
    made = Table(box=None, pad_edge=False)
    for column in ("second stage", "stage", "figure"):
        made.add_column(column)
    for column in ("by hand", "Lamina", "apart"):
        made.add_column(column, justify="right")
    for row in rows:
        apart = f"{row.difference:.1e}" if row.difference else "none"
        figures = (f"{row.by_hand:.7f}", f"{row.lamina:.7f}", apart)
        made.add_row(row.task, f"{row.stage} ({METHODS[row.stage]})", row.what, *figures)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.by_hand", description=__doc__)
    parser.add_argument("--model", type=Path, help="a base with its tokenizer; the demo's if none")
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    parser.add_argument("--only", help="one of the cases, such as stack:0.0")
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    options = parser.parse_args(arguments)
    model = options.model or ROOT / "src" / "lamina" / "demo" / "base"
    cases = [options.only] if options.only else ["stack:0", "merge:0", "stack:0.1"]
    console = Console()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            mode, _, dropout = case.partition(":")
            task = Task(str(model.resolve()), mode, options.steps, float(dropout or 0))
            with console.status(case):
                rows += compared(Path(folder, str(number)), task, paragraphs())
    console.print(table(rows))
    worst = max(row.difference for row in rows)
    packages = ", ".join(f"{name} {version(name)}" for name in ("peft", "trl", "torch", "lamina"))
    console.print(f"largest difference: {worst:.1e} ({packages})", highlight=False)
    if options.json:
        told = {"largest difference": worst, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
