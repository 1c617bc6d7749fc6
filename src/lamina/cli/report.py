"""`lamina report`: what a run gained and what it cost, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lamina.cli.arguments import Json
from lamina.cli.terminal import console, facts, print_json


def report(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="The output_dir of a plan.")],
    open_it: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write what a run gained and cost as a page, pictures and a model card."""
    from lamina.training.report import write_report

    written = write_report(directory)
    if as_json:
        print_json(
            {
                "verdict": written.verdict,
                "html": str(written.html),
                "pngs": [str(file) for file in written.pngs],
                "card": str(written.card),
                "stage_card": None if written.stage_card is None else str(written.stage_card),
            }
        )
    else:
        out = console()
        out.print(Text(written.verdict), soft_wrap=True)
        out.print()
        folder = written.html.parent
        out.print(
            facts(
                [
                    ("page", str(written.html)),
                    ("pictures", f"{', '.join(f.name for f in written.pngs)} in {folder}"),
                    ("model card", str(written.card)),
                    ("in the stage", str(written.stage_card or "")),
                    ("note", _kept(written.card_was_kept)),
                ]
            )
        )
    if open_it:
        import webbrowser

        webbrowser.open(written.html.as_uri())


def _kept(file: Path | None) -> str:
    return "" if file is None else f"{file} is somebody's own text, and was left as it is"
