"""`lamina demo`: a small model through three stages of real text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH", help="A causal language model in place of the small built-in."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps per stage; fewer is quicker.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapters' start and the order of texts.")] = 0,
) -> None:
    """Take a small model through three LoRA stages of real text and show what each one did."""
    from lamina.cli.inspect import inspect
    from lamina.demo.run import run_demo

    results = run_demo(output, model_name_or_path=model, steps=steps, seed=seed)
    inspect(list(results.stages.values())[-1])
