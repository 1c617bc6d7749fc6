"""Mutants of adapter directories: an error of ours, or what the file says; nothing else ever."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lamina
from tests.torture.amounts import FULL
from tests.torture.figures import Figures
from tests.torture.fuzz_cases import FIRST_OF_BASE, MUTATORS
from tests.torture.fuzz_run import run

SOURCE = Path(lamina.__file__).parent
SHORT = 120
_ALLOWED_SECONDS = 5.0
_ALLOWED_MEMORY = 600 << 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_refused_or_read_right(figures: Figures, tmp_path: Path) -> None:
    count = 5_000 if FULL else SHORT
    of_base = range(FIRST_OF_BASE, FIRST_OF_BASE + (500 if FULL else 15))
    result = run([*range(count), *of_base], tmp_path, workers=2 if FULL else 1)
    repeat = f"{len(result.failures)}; `python -m tests.torture.fuzz_run NUMBER` repeats a case"
    assert not result.failures, "\n".join([repeat, *result.failures[:20]])
    assert result.mutants == count + len(of_base)
    # Mutants that are right, and mutants that are refused: neither is all of them.
    assert 0.2 < result.outcomes["right"] / result.outcomes.total() < 0.8
    assert result.seconds < _ALLOWED_SECONDS
    assert result.risen < _ALLOWED_MEMORY
    for name, counts in sorted(result.by_mutator.items()):
        right = counts.pop("right", 0)
        figures.note("mutants", mutator=name, right=right, refused=dict(counts))
    figures.note(
        "mutants in all",
        mutants=result.mutants,
        readings=result.outcomes.total(),
        outcomes=dict(result.outcomes.most_common()),
        most_seconds=round(result.seconds, 2),
        most_memory_mb=result.risen >> 20,
        peak_mb=result.peak >> 20,
    )


def test_short_runs_use_every_mutator() -> None:
    # Cases take them in turn.
    assert {n % len(MUTATORS) for n in range(SHORT)} == {*range(len(MUTATORS))}


def test_no_code_of_ours_trusts_that_of_files() -> None:
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            where = f"{file.relative_to(SOURCE)}:{node.lineno}"
            words = {each.arg: each.value for each in node.keywords}
            trusted = words.get("trust_remote_code")
            if isinstance(trusted, ast.Constant) and trusted.value:
                found.append(f"{where} trusts remote code")
            name = ast.unparse(node.func)
            safe = words.get("weights_only")
            if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value):
                found.append(f"{where} unpickles whatever there is")
            if name in {"pickle.load", "pickle.loads", "eval", "exec", "os.system"}:
                found.append(f"{where} calls {name}")
    assert not found
