"""A case is a number: it says which kind of directory is mutated, and how."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.torture import fuzz_bases, fuzz_bytes, fuzz_configs, fuzz_headers, fuzz_records
from tests.torture.fuzz_bytes import Mutator
from tests.torture.fuzz_corpus import KINDS

_ANY = [*fuzz_bytes.MUTATORS, *fuzz_headers.MUTATORS, *fuzz_configs.MUTATORS]
MUTATORS = [*_ANY, *fuzz_records.WITH_RECORD, *fuzz_records.WITH_INDEX]
# Cases from this number on are mutants of the base's directory.
FIRST_OF_BASE = 1_000_000
_WITH_RECORD = ("chain", "bias of B", "biases", "PiSSA")
_WITH_INDEX = ("sharded",)


@dataclass(frozen=True)
class Case:
    """One mutant.

    Attributes:
        number: that it was made by.
        kind: of `KINDS`, or the base.
        mutators: what was done to it, by names.
        told: in words.
    """

    number: int
    kind: str
    mutators: tuple[str, ...]
    told: str


@contextmanager
def mutant(number: int, corpus: Path, folder: Path) -> Iterator[tuple[Case, Path]]:
    """Make the directory of a case, and remove it."""
    rng = random.Random(number)
    of_base = number >= FIRST_OF_BASE
    mutators = fuzz_bases.MUTATORS if of_base else MUTATORS
    first = mutators[number % len(mutators)]
    kind = fuzz_bases.NAME if of_base else rng.choice(_kinds_for(first))
    place = folder / f"case-{number}"
    path = place / "mutant"
    shutil.copytree(corpus / kind, path)
    try:
        done = {}
        more = mutators if of_base else _ANY
        for mutate in [first, *([rng.choice(more)] if rng.random() < 0.1 else [])]:
            if not _only_files(path):
                # A second change would wait for what the first has put in a file's place.
                break
            told = _mutate(mutate, rng, path)
            if told is not None:
                done[mutate.__name__] = told
        yield Case(number, kind, tuple(done), "; ".join(done.values())), path
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _only_files(path: Path) -> bool:
    return all(each.is_file() or each.is_dir() for each in path.rglob("*"))


def _kinds_for(mutate: Mutator) -> list[str]:
    if mutate in fuzz_records.WITH_RECORD:
        return [*_WITH_RECORD]
    if mutate in fuzz_records.WITH_INDEX:
        return [*_WITH_INDEX]
    return [*KINDS]


def _mutate(mutate: Mutator, rng: random.Random, path: Path) -> str | None:
    try:
        return mutate(rng, path)
    except Exception:
        # The second of two finds no file that it understands, or one of 100 GB.
        return None
