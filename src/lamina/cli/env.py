"""`lamina env`: what this installation runs on, for bug reports."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from lamina.amounts import size
from lamina.cli.arguments import Json
from lamina.cli.terminal import console, facts, print_json


def env(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Import torch and list its devices (takes seconds).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, the platform, the processor and, with --gpu, the devices that torch sees."""
    from lamina.environment import describe_environment

    found = describe_environment(with_torch=gpu)
    if as_json:
        print_json(found.to_dict())
        return
    out = console()
    groups = {
        "packages": [
            *((name, number or "") for name, number in found.packages.items()),
            ("not installed", ", ".join(n for n, number in found.packages.items() if not number)),
        ],
        "platform": [("system", found.system), ("python", found.python)],
        "processor": [
            ("model", found.cpu_model or "unknown"),
            ("cores", f"{found.cores_usable} usable of {found.cores}"),
            ("features", ", ".join(found.cpu_features)),
            ("memory", size(found.memory_bytes) if found.memory_bytes else ""),
        ],
    }
    if found.devices is not None:
        groups["devices"] = [(d.name, d.details) for d in found.devices] or [("", "none")]
    for title, pairs in groups.items():
        out.print(Text(title, style="bold"))
        out.print(facts(pairs))
        out.print()
