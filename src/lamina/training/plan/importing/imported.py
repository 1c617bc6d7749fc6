"""Read files of other tools, whichever they are of, into the text of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lamina.errors import PlanError
from lamina.training.plan.document import Document, parse_document, read_document
from lamina.training.plan.importing.assembling import assemble
from lamina.training.plan.importing.axolotl import is_axolotl, read_axolotl
from lamina.training.plan.importing.draft import Draft, Note
from lamina.training.plan.importing.llamafactory import is_llamafactory, read_llamafactory
from lamina.training.plan.importing.script import read_script
from lamina.training.plan.reading import check_document


@dataclass(frozen=True)
class Imported:
    """A plan made of other tools' files.

    Attributes:
        tools: which they are of, in the order of the files.
        text: the plan's file, with the notes as comments.
        values: what it says.
        notes: what could not be carried over, or means something else.
        missing: what keeps it from being a plan: values that the files don't say.
    """

    tools: tuple[str, ...]
    text: str
    values: dict[str, Any]
    notes: tuple[Note, ...]
    missing: tuple[str, ...]


def import_plan(files: Sequence[str | Path]) -> Imported:
    """Make a plan of files, a stage of each, or several of a script. Nothing of them is run.

    Args:
        files: LLaMA-Factory's or Axolotl's YAML, or Python scripts that use peft and TRL.

    Raises:
        PlanError: a file can't be read, or is of no tool that is known.
    """
    drafts: list[Draft] = []
    tools: list[str] = []
    for file in files:
        tool, found = _read(Path(file).expanduser())
        tools.append(tool)
        drafts += found
    values = assemble(drafts)
    notes = tuple(note for draft in drafts for note in draft.notes)
    text = _written(values, notes, [str(each) for each in files])
    return Imported(tuple(tools), text, values, notes, _missing(text))


def _read(file: Path) -> tuple[str, list[Draft]]:
    if file.suffix == ".py":
        return "a script with peft and TRL", read_script(file)
    document: Document = read_document(file)
    values = document.values
    if isinstance(values, dict) and is_axolotl(values):
        return "Axolotl", read_axolotl(document)
    if isinstance(values, dict) and is_llamafactory(values):
        return "LLaMA-Factory", read_llamafactory(document)
    raise PlanError(
        f"'{file}' is of no tool that is known here.",
        faults=[
            "a file of LLaMA-Factory has model_name_or_path and stage or finetuning_type",
            "a file of Axolotl has base_model",
            "a script ends in .py",
        ],
        cure="lamina init writes a plan to begin with",
    )


def _written(values: dict[str, Any], notes: Sequence[Note], files: Sequence[str]) -> str:
    lines = [f"# Made of {', '.join(files)}."]
    if notes:
        lines.append("# Not carried over as it was:")
        lines += [f"# - {' '.join(str(note).split())}" for note in notes]
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(lines) + "\n\n" + body


def _missing(text: str) -> tuple[str, ...]:
    try:
        check_document(parse_document(text, "the plan"))
    except PlanError as error:
        return error.faults
    return ()
