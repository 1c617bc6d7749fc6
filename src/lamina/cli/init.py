"""`lamina init`: write a plan to begin with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.arguments import Json
from lamina.cli.terminal import console, print_json
from lamina.errors import PlanError


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The plan's file.")] = Path(
        "plan.yaml"
    ),
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base: a directory or hub id.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="Methods of the stages in their order, such as pt,sft,dpo."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="A stage's data; once for each stage, in their order."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="How stages begin on the one before: continue, stack or merge.")
    ] = "stack",
    output_dir: Annotated[
        str, typer.Option("--output-dir", "-o", help="Where the stages' directories will be.")
    ] = "runs",
    schema: Annotated[
        bool, typer.Option("--schema", help="Put plan.schema.json beside it, for editors.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a plan with every setting explained; asks for what the options don't say.

    Most settings are commented out with their defaults. Nothing is asked where no terminal is.
    """
    import json

    from lamina.training.plan import json_schema
    from lamina.training.plan.editors import SCHEMA_NAME
    from lamina.training.plan.writing import new_stages, plan_text, write_plan

    if file.exists() and not force:
        raise PlanError(f"'{file}' is there already.", cure="choose another name, or --force")
    base = model or _asked("--model", "Base model (a directory or hub id)")
    methods = _split(stages or _asked("--stages", "Stages, by their methods", "pt,sft"))
    paths = data or _asked_data(methods)
    made = new_stages(methods, paths, mode)
    text = plan_text(base, made, output_dir=output_dir, schema=schema)
    written = [write_plan(file, text, overwrite=force)]
    if schema:
        content = json.dumps(json_schema(), indent=2) + "\n"
        written.append(write_plan(file.parent / SCHEMA_NAME, content, overwrite=True))
    if as_json:
        print_json(
            {"files": [str(each) for each in written], "stages": [each.name for each in made]}
        )
        return
    out = console()
    for each in written:
        out.print(f"wrote {each}", soft_wrap=True)
    out.print(f"next: lamina validate {file}", soft_wrap=True)


def _split(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _asked(option: str, question: str, default: str | None = None) -> str:
    if not _at_terminal():
        raise PlanError(
            f"{option} is missing, and there is no terminal to ask at.",
            cure="lamina init --model BASE --stages pt,sft --data manual.txt --data chat.jsonl",
        )
    return str(typer.prompt(question, default=default))


def _asked_data(methods: list[str]) -> list[str]:
    """A path for each stage; none where nobody can be asked: names are put for them."""
    if not _at_terminal():
        return []
    return [typer.prompt(f"Data of stage {i} ({each})") for i, each in enumerate(methods, 1)]
