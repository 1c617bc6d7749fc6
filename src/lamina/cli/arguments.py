"""Arguments that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

Directory = Annotated[str, typer.Argument(metavar="DIR", help="An adapter's directory or hub id.")]
Subfolder = Annotated[str | None, typer.Option(help="A folder in it that holds the adapter.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of a hub repository.")]
Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="The base's directory or hub id, if not as on record."),
]
AllowBaseMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Take a base unlike the one on record.")
]
ReplaceAdapter = Annotated[
    bool, typer.Option("--force", help="Replace the adapter in the output directory.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
