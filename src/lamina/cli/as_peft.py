"""`lamina as-peft`: run a script, or a module, for which `import peft` is Lamina."""

from __future__ import annotations

import os
import runpy
import sys
import traceback

import typer

from lamina.errors import LaminaError, MissingFileError

# All that follows the script is the script's, `--help` included.
PASS_ON = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
}


def as_peft(context: typer.Context) -> None:
    """Run a Python script with Lamina in the place of peft.

    lamina as-peft SCRIPT.py [ARGS], or lamina as-peft -m MODULE [ARGS]. The script sees its own
    arguments, and its exit code is the command's.
    """
    arguments = list(context.args)
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[1:] if as_module else arguments
    if not arguments or arguments[0].startswith("-"):
        raise typer.BadParameter("give a script, or -m and a module")
    if not as_module and not os.path.exists(arguments[0]):
        raise MissingFileError(f"There is no {arguments[0]}, seen from {os.getcwd()!r}.")
    from lamina.interop.peft import install

    install()
    sys.argv = arguments
    sys.path.insert(0, os.getcwd() if as_module else os.path.dirname(os.path.abspath(arguments[0])))
    try:
        _run(arguments[0], as_module)
    except LaminaError as error:
        # As Python ends a script on an error, not as our own verbs do.
        traceback.print_exc()
        raise typer.Exit(1) from error


def _run(what: str, as_module: bool) -> None:
    if as_module:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")
