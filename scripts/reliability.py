"""Write docs/reliability.md from what `make torture` found (docs/reliability.json)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"

Row = Mapping[str, Any]

_HEAD = """# What was broken on purpose

What is promised: a save, a merge, a flatten or an edit leaves the old directory or the new one,
complete, whatever happens on the way; a file that is broken is refused with an error that says
what is wrong with it; nothing in a file runs. This page says how that was tried, and what came
out. It is written by a program from the figures of `make torture`, each section from the last run
that passed it (dates at the end), and by nobody else;
`make test` does a small part of the same at every change.
"""


class Section(NamedTuple):
    """What is above a table: its title, what was done and what is promised."""

    title: str
    told: str


_SECTIONS = {
    "kills": Section(
        "kill -9 at random instants",
        "Each time a process writes a new version over an old one and is killed, at instants "
        "spread evenly over the whole of its work. Then the directory is read: all files have to "
        "be of one version, down to every number in them, and files that belong to others "
        "(a tokenizer, checkpoints, links) have to be there. Inputs must be what they were, and "
        "the next save must succeed and sweep away what the dead ones left. A merge goes on "
        "where the last one was killed; its result has to be the same, byte for byte.",
    ),
    "steps": Section(
        "kill -9 before every change to the disk",
        "The same, but the process dies right before its n-th call that changes the disk (making, "
        "renaming, linking, opening to write, writing by position, syncing, deleting), for every "
        "n. Between two of these calls nothing changes, so these are all instants there are, but "
        "for those within one write; once the new version is there it must stay.",
    ),
    "pages": Section(
        "kill -9 within a file",
        "The kernel kills the process as a file grows beyond a limit (RLIMIT_FSIZE), for limits "
        "spread over the whole file, at most 200. Nothing of the new version may show.",
    ),
    "full disk": Section(
        "A full disk",
        "The directory lies on a small real filesystem (a tmpfs) of which more and more is free, "
        "from nothing up to enough; then likewise with room for so many more files. Each time but "
        "the last: one CheckpointError that names the disk, the old version intact, no leftovers. "
        "Then there is room again, and the same call succeeds.",
    ),
    "errors": Section(
        "An error of the disk at every change",
        "The n-th call that changes the disk fails, for every n: injected into the process, since "
        "no real disk fails on demand. *Refused* is an error with the old version intact; "
        "*harmless* means that only tidying up was hit, and the new version is there.",
    ),
    "file size limits": Section(
        "A limit on the size of files",
        "The kernel refuses to let a file grow beyond a limit (RLIMIT_FSIZE): one error, the old "
        "version intact.",
    ),
    "two writers": Section(
        "Two writers",
        "One process is stopped before its n-th change to the disk, for every n, while a second "
        "writes to the same directory; then the first goes on. Where they overlap, the second is "
        "told who is writing since when, and the first gets through. *One after the other* are "
        "the instants at which the first hasn't begun or has published already.",
    ),
    "races": Section(
        "Two writers at the same moment",
        "Two processes start at once. At least one gets through, one that doesn't is told, and "
        "what is there is whole and of one that got through.",
    ),
    "read-only": Section(
        "A target that can't be written",
        "As another user without permission, and on a filesystem mounted read-only: refused "
        "before anything is done, with not one change to the disk.",
    ),
    "runs": Section(
        "Runs that are killed or stopped",
        "A plan of three stages (plain text, instructions stacked on it, preferences continued) is "
        "killed with SIGKILL at instants drawn from a seed over the whole of it, or stopped with "
        "SIGTERM or two Ctrl-C, and the same command is given again. *Same*: everything in "
        "`output_dir` is what an undisturbed run leaves: every bit of every tensor, configs, "
        "records, `run.json`, `evaluation.json` and logs, up to times and memory. *During* says "
        "what a run was at.",
    ),
    "full disk in a run": Section(
        "A disk that fills up during a run",
        "While a run goes on, a real small disk is filled up to a few pages, or a change to the "
        "disk is made to fail. *Refused*: one error that says so and what to do; then, with room "
        "again, the same command comes to the undisturbed end. *Harmless*: only tidying up was "
        "hit; *in time*: the run needed no more room.",
    ),
    "mutants": Section(
        "Broken files",
        "Adapter directories with something broken in them: bytes, headers, records, configs, "
        "indices. Each is given to every reader. *Right* means that what was read is what the "
        "file says; everything else has to be an error of Lamina's, of the kinds named.",
    ),
    "mutants in all": Section("Broken files, in all", "Counted over all of them and all readers."),
}


def page(figures: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [_HEAD, *_summary(figures)]
    for name in [*_SECTIONS, *sorted(figures.keys() - _SECTIONS.keys())]:
        if name not in figures:
            continue
        title, told = _SECTIONS.get(name, Section(name.capitalize(), ""))
        parts += [f"## {title}\n", f"{told}\n" if told else "", table(figures[name]["rows"])]
        parts.append("")
    parts += ["## How to repeat it\n", *_how(figures)]
    return "\n".join(part for part in parts if part is not None).rstrip() + "\n"


def table(rows: Sequence[Row]) -> str:
    """A column for each figure, numbers to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "seconds"))
    # What it is about comes first.
    columns.sort(key=lambda column: column not in ("what", "mutator"))
    columns += ["seconds"] if any("seconds" in row for row in rows) else []
    numeric = {c for c in columns if all(isinstance(row.get(c, 0), int | float) for row in rows)}
    lines = [columns, ["---:" if column in numeric else "---" for column in columns]]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {count:,}" for key, count in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _summary(figures: Mapping[str, Any]) -> list[str]:
    def total(column: str, *names: str) -> int:
        return sum(row.get(column, 0) for name in names for row in _rows(figures, name))

    told: list[tuple[str, Callable[[], str]]] = [
        (
            "kills",
            lambda: (
                f"{total('kills', 'kills', 'steps', 'pages'):,} kills, "
                f"{total('mixtures', 'kills', 'steps', 'pages'):,} mixtures"
            ),
        ),
        (
            "runs",
            lambda: (
                f"{total('kills', 'runs') + total('stopped', 'runs'):,} times a run of three "
                "stages was killed or stopped, and then came to the undisturbed end, bit for bit"
            ),
        ),
        (
            "full disk",
            lambda: (
                f"{total('sizes', 'full disk') + total('counts of files', 'full disk'):,} times a "
                f"disk was really full, {total('refused', 'errors'):,} times an error was "
                "injected: each time one clear error, the old version intact"
            ),
        ),
        (
            "two writers",
            lambda: (
                f"{total('pairs', 'two writers') + total('rounds', 'races'):,} pairs of writers, "
                "none of which mixed or lost anything without a word"
            ),
        ),
        (
            "mutants in all",
            lambda: (
                f"{total('mutants', 'mutants in all'):,} broken directories, read "
                f"{total('readings', 'mutants in all'):,} times: an error of Lamina's, or what "
                "the file says"
            ),
        ),
    ]
    lines = [f"- {say()}." for name, say in told if name in figures]
    return ["In short:\n", *lines, ""]


def _rows(figures: Mapping[str, Any], name: str) -> Sequence[Row]:
    rows: Sequence[Row] = figures.get(name, {}).get("rows", ())
    return rows


def _how(figures: Mapping[str, Any]) -> list[str]:
    first = "`make torture` on Linux; as root, so that small disks can be mounted.\n"
    lines = [first]
    runs: dict[str, list[str]] = {}
    for name, run in figures.items():
        machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
        title = _SECTIONS.get(name, Section(name.capitalize(), "")).title
        runs.setdefault(f"{run['date']}; {machine}", []).append(title)
    for told, titles in runs.items():
        lines.append(f"- {'all' if len(runs) == 1 else '; '.join(titles)}: {told}.")
    return lines


def main() -> None:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    PAGE.write_text(page(figures), encoding="utf-8")
    print(f"{PAGE}: {', '.join(figures)}")


if __name__ == "__main__":
    main()
