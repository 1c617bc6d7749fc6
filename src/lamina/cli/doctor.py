"""`lamina doctor`: what is wrong with an adapter directory, and what mends it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lamina.amounts import count_of
from lamina.cli.arguments import Directory, Json, Revision, Subfolder
from lamina.cli.terminal import console, print_json, some

if TYPE_CHECKING:
    from rich.console import Console

    from lamina.checkpoint.doctor import Examination, Finding

# Bad usage, such as a directory that isn't there, ends with 2, as in every verb.
WARNINGS, ERRORS = 1, 3
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


class Target(str, enum.Enum):
    """Programs whose limits are known."""

    VLLM = "vllm"


def doctor(
    directory: Directory,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The base's directory or hub id, to check against."),
    ] = None,
    target: Annotated[
        Target | None,
        typer.Option("--for", help="Count what this program refuses as errors, not as notes."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read headers only, not the values of tensors.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the base's own Python code.")
    ] = False,
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Look for everything that can be wrong with an adapter; each finding comes with its cure.

    With --base it also checks whether names, shapes and weights belong to that base.

    Exit code: 0 if there are notes at most, 1 for warnings, 3 for errors; 2 is bad usage.
    """
    from lamina.checkpoint.doctor import examine

    found = examine(
        directory,
        base=base,
        target=target.value if target else None,
        read_values=not quick,
        trust_remote_code=trust_remote_code,
        subfolder=subfolder,
        revision=revision,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        _print(console(), found)
    if not found.healthy:
        raise typer.Exit(ERRORS if found.worst == "error" else WARNINGS)


def _print(out: Console, found: Examination) -> None:
    out.print(Text(found.path, style="bold"), soft_wrap=True)
    if found.base:
        out.print(f"against {found.base}", soft_wrap=True)
    for finding in found.findings:
        out.print()
        _print_finding(out, finding)
    out.print()
    for line in found.unchecked:
        out.print(Text(f"Not checked, since {line}.", style="dim"))
    out.print(_summary(found))


def _print_finding(out: Console, finding: Finding) -> None:
    style = _STYLES[finding.severity]
    out.print(Text.assemble((f"{finding.severity}: ", style), (finding.code, "bold")))
    lines = [Text(finding.what)]
    if finding.where:
        lines.append(Text(_where(finding.where), style="dim"))
    if finding.cure:
        lines.append(Text.assemble(("cure: ", "green"), finding.cure))
    for line in lines:
        for part in line.wrap(out, max(20, out.width - 2)):
            part.rstrip()
            out.print(Text.assemble("  ", part))


def _where(names: tuple[str, ...]) -> str:
    count = f"{len(names):,}: " if len(names) > 1 else ""
    return f"in {count}{some(names, 3)}"


def _summary(found: Examination) -> Text:
    told = ", ".join(count_of(number, name) for name, number in found.counts.items())
    if found.worst is None:
        return Text("Nothing found: it is healthy as far as can be told.", style="green")
    return Text(told, style="green" if found.healthy else "bold")
