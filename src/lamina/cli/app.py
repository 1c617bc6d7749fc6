"""The application: its verbs, its version, and how errors end it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lamina._version import __version__
from lamina.cli.as_peft import PASS_ON, as_peft
from lamina.cli.chat import chat
from lamina.cli.compare import compare
from lamina.cli.convert import convert
from lamina.cli.demo import demo
from lamina.cli.diff import diff
from lamina.cli.doctor import doctor
from lamina.cli.edit import edit
from lamina.cli.env import env
from lamina.cli.export import export
from lamina.cli.flatten import flatten
from lamina.cli.import_ import import_
from lamina.cli.init import init
from lamina.cli.inspect import inspect
from lamina.cli.lineage import lineage
from lamina.cli.logs import logs
from lamina.cli.merge import merge
from lamina.cli.preview import preview
from lamina.cli.report import report
from lamina.cli.run import run
from lamina.cli.split import split
from lamina.cli.status import status
from lamina.cli.targets import targets
from lamina.cli.terminal import hush_imports, print_error, shown_warnings
from lamina.cli.validate import validate
from lamina.cli.verify import verify
from lamina.errors import LaminaError

EXIT_CODE = 2


class _Verbs(TyperGroup):
    """Ends on an error of the library with its message; any other error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LaminaError as error:
            print_error(error)
            raise typer.Exit(EXIT_CODE) from error


app = typer.Typer(
    name="lamina",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a model in several LoRA stages; every stage is one plain PEFT adapter.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lamina {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    # A script that is run keeps all that its libraries say.
    if ctx.invoked_subcommand != "as-peft":
        hush_imports()
        ctx.with_resource(shown_warnings())


for _verb in (
    demo,
    init,
    validate,
    preview,
    run,
    status,
    logs,
    report,
    chat,
    compare,
    inspect,
    doctor,
    verify,
    lineage,
    targets,
    merge,
    diff,
    flatten,
    split,
    edit,
    export,
    convert,
    env,
):
    app.command()(_verb)
app.command("import")(import_)
app.command("as-peft", context_settings=PASS_ON)(as_peft)


def main() -> None:
    """The entry of the console script `lamina`."""
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal or pipe that can't show an arrow or a line gets a question mark instead.
        sys.stdout.reconfigure(errors="replace")
        sys.stderr.reconfigure(errors="replace")  # type: ignore[union-attr]
    app(prog_name="lamina")
