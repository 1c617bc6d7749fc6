"""`lamina logs`: the lines that a run has logged, and those that it logs from now on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.cli.arguments import Json
from lamina.cli.progress import numbers
from lamina.cli.terminal import print_json

_PAUSE_S = 0.5


def logs(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="The output_dir of a plan.")],
    stage: Annotated[str | None, typer.Argument(help="One stage; all if not given.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on while the run does.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what a run has logged, a line per entry."""
    from lamina.errors import RunError, nearest
    from lamina.training.run.status import status_of

    found = [each.name for each in status_of(directory).stages]
    if stage is not None and stage not in found:
        close = nearest(stage, found)
        raise RunError(
            f"The run in {directory} has no stage {stage!r}.",
            faults=[f"its stages: {', '.join(found)}"],
            cure=f"lamina logs {directory} {close[0] if close else found[0]}",
        )
    names = found if stage is None else [stage]
    if as_json and not follow:
        print_json([line for name in names for line in _lines(directory, name)])
        return
    for line in _all(directory, names, follow=follow):
        _say(line, as_json=as_json)


def _lines(directory: Path, stage: str) -> list[dict[str, Any]]:
    from lamina.training.run.log import read_log
    from lamina.training.run.status import log_file

    return list(read_log(log_file(directory, stage)))


def _all(directory: Path, names: list[str], *, follow: bool) -> Iterator[dict[str, Any]]:
    from lamina.training.run.status import status_of

    seen = dict.fromkeys(names, 0)
    while True:
        # Asked before the lines are read, so that the last ones of a run that ends are read too.
        running = follow and status_of(directory).running
        for name in names:
            lines = _lines(directory, name)
            # A stage that goes on from a checkpoint has taken lines back.
            yield from lines[min(seen[name], len(lines)) :]
            seen[name] = len(lines)
        if not running:
            return
        time.sleep(_PAUSE_S)


def _say(line: dict[str, Any], *, as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(line))
        return
    told = numbers(line)
    if told:
        typer.echo(f"{line.get('stage')} {line.get('step')}/{line.get('steps')}  {told}")
