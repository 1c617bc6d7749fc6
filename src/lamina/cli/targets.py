"""`lamina targets`: a dry run of target_modules on a model's config alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lamina.amounts import count_of, short
from lamina.cli.arguments import Json, Revision
from lamina.cli.terminal import console, facts, print_json, some, table
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from lamina.model.dry_run import DryRun


def targets(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's directory or hub id.")],
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", "-p", help="A name for target_modules; may be given repeatedly."),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="One regular expression for whole names, as target_modules.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", "-x", help="A name never to adapt; may be given repeatedly."),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            help="The end of a parameter's name, such as experts.down_proj; likewise.",
        ),
    ] = None,
    r: Annotated[int, typer.Option("--r", help="The rank.")] = 8,
    revision: Revision = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what target_modules would hit in a model. No weights are loaded or downloaded.

    Without --pattern, --regex and --parameter it shows what "all-linear" means.
    """
    if pattern and regex:
        raise ConfigError(
            "target_modules is a list of names or one regular expression, not both.",
            cure="give --pattern or --regex",
        )
    # The second imports torch, so only now that the arguments make sense.
    from lamina.config import ALL_LINEAR, LoraConfig
    from lamina.model.dry_run import dry_run

    config = LoraConfig(
        r=r,
        target_modules=pattern or regex or (None if parameter else ALL_LINEAR),
        exclude_modules=exclude or None,
        target_parameters=parameter or None,
    )
    found = dry_run(model, config, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)


def _print(found: DryRun) -> None:
    out = console()
    out.print(
        Text.assemble(
            (found.model, "bold"),
            f"  {found.model_class}, {short(found.base_parameters)} parameters",
        )
    )
    out.print()
    counts = [[name, str(count)] for name, count in found.counts.items()]
    out.print(table(["pattern", "layers"], counts, right=["layers"], folded=["pattern"]))
    out.print()
    rows = [
        [
            kind.name,
            str(kind.count),
            kind.layer,
            kind.shape,
            f"{kind.parameters:,}",
        ]
        for kind in found.kinds
    ]
    columns = ["module", "count", "layer", "in → out", "parameters"]
    out.print(table(columns, rows, right=["count", "parameters"], folded=["module"]))
    out.print()
    layers = count_of(sum(kind.count for kind in found.kinds), "layer")
    share = 100 * found.parameters / found.base_parameters
    adapter = f"{found.parameters:,} parameters, {share:.3g} % of the base"
    out.print(
        facts(
            [
                ("adapter", f"rank {found.kinds[0].rank} in {layers}: {adapter}"),
                ("linear layers", ", ".join(found.linear_names)),
                ("output head", ", ".join(found.head_names)),
                ("experts left out", some(_endings(found.skipped))),
            ]
        )
    )


def _endings(skipped: Sequence[str]) -> list[str]:
    """What to give as --parameter for parameters that were left out, such as those of experts."""
    return sorted({".".join(name.split(".")[-2:]) for name in skipped})
