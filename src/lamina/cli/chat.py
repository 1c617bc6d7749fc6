"""`lamina chat`: a conversation with a stage, at the terminal or line by line in a pipe."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lamina.amounts import count_of
from lamina.cli.arguments import Base
from lamina.cli.terminal import console, facts, hush_loading, print_error
from lamina.cli.verify import LoadDtype
from lamina.errors import DataError, LaminaError, VerificationError, escaped

if TYPE_CHECKING:
    from lamina.stages.viewed import View
    from lamina.training.conversing.conversation import Conversation, Reply

Tokenizer = Annotated[
    str | None,
    typer.Option(help="The tokenizer's directory or hub id; else that by the stage or base."),
]
Dtype = Annotated[
    LoadDtype | None, typer.Option(help="To load the base in; as on record if not given.")
]
LoadIn4bit = Annotated[
    bool | None,
    typer.Option(
        "--load-in-4bit/--dense",
        help="Load the base through bitsandbytes or not; as on record if not given.",
        show_default=False,
    ),
]
Device = Annotated[str | None, typer.Option(help="Where the base goes; the GPU if there is one.")]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Don't check first that it answers as when it was saved."),
]

_HELP = (
    ("/stage NAME", "go on with another stage of the chain, or `base`; /stage alone lists them"),
    ("/reset", "forget what was said"),
    ("/quit", "end, as Ctrl-D does"),
    ("Ctrl-C", "stop an answer"),
)


def chat(  # noqa: PLR0913, PLR0917
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A stage's directory or hub id, or a run's.")
    ],
    stage: Annotated[
        str | None, typer.Option("--stage", help="An earlier stage of the chain, or `base`.")
    ] = None,
    base: Base = None,
    tokenizer: Tokenizer = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A message that stands before all others.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token, always.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens up to this.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws of every answer.")] = None,
    dtype: Dtype = None,
    load_in_4bit: LoadIn4bit = None,
    device: Device = None,
    no_verify: NoVerify = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every answer as a line of JSON.")
    ] = False,
) -> None:
    """Talk to a stage; switch to others of its chain without loading the base again.

    In a pipe, every line of the input is a message (or a command) of one conversation, and the
    answers go to the standard output.
    """
    from lamina.stages.viewed import BASE, Opening
    from lamina.training.conversing.conversation import Conversation
    from lamina.training.conversing.subject import subject_of
    from lamina.training.evaluate.generating import Sampling

    if not temperature and (top_p < 1 or seed is not None):
        raise DataError(
            "--top-p and --seed are of draws, and at temperature 0 nothing is drawn.",
            cure="give a --temperature, such as 0.7, or leave them out",
        )
    hush_loading()
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    # In a pipe, the answers have the standard output to themselves.
    told = console(stderr=not at_terminal)
    subject = subject_of(directory)
    how = Opening(
        base=base,
        tokenizer=tokenizer,
        dtype=dtype.value if dtype else None,
        load_in_4bit=load_in_4bit,
        device=device,
        verify=not no_verify,
    )
    with or_unverified(), _opening(told, directory):
        view = subject.view(None if stage == BASE else stage, how)
    if stage == BASE:
        view.show(None)
    talk = Conversation(
        view,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, seed),
    )
    _introduce(told, view, at_terminal)
    if at_terminal:
        _converse(told, talk)
    else:
        _read_lines(told, talk, as_json)


@contextmanager
def or_unverified() -> Iterator[None]:
    """A failed verification says how to go on without one."""
    try:
        yield
    except VerificationError as error:
        cure = "; ".join(filter(None, [error.cure, "--no-verify goes on with it as it is"]))
        raise VerificationError(error.what, faults=error.faults, cure=cure) from error


@contextmanager
def _opening(told: Console, directory: str) -> Iterator[None]:
    if not told.is_terminal:
        yield
        return
    with told.status(Text(f"opening {escaped(directory)}")):
        yield


def _introduce(told: Console, view: View, at_terminal: bool) -> None:
    told.print(facts([("stage", _who(view)), ("base", view.base), ("check", _verified(view))]))
    if at_terminal:
        told.print(Text("/help tells what can be done; Ctrl-D ends", style="dim"))


def _who(view: View) -> str:
    if view.shown is None:
        return "none: the base alone"
    return " → ".join(view.chains[view.shown])


def _verified(view: View) -> str:
    if view.shown is None:
        return ""
    report = view.verified.get(view.shown)
    if report is None:
        return "not verified"
    if report.proved:
        return "it answers as when it was saved"
    return "nothing is wrong, but no answers are on record to replay"


# --- at a terminal -------------------------------------------------------------------------------


def _converse(told: Console, talk: Conversation) -> None:
    _edit_lines()
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            told.print()
            return
        except KeyboardInterrupt:
            told.print(Text("\n/quit or Ctrl-D ends", style="dim"))
            continue
        try:
            if _obeyed(told, talk, line):
                continue
            with _stopped_by_ctrl_c() as stop:
                reply = talk.say(line, lambda piece: _show(piece) and not stop.asked)
            _end_answer(told, reply)
        except LaminaError as error:
            print_error(error)
        except KeyboardInterrupt:
            # While a stage is read; what was shown is shown.
            told.print(Text("\nstopped", style="dim"))


def _edit_lines() -> None:
    """Arrow keys and a history for `input`, where Python has them."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)


def _show(piece: str) -> bool:
    """Write a piece of an answer, whatever a terminal would obey in it shown instead."""
    if piece:
        typer.echo(escaped(piece), nl=False)
        sys.stdout.flush()
    return True


def _end_answer(told: Console, reply: Reply) -> None:
    parts = [f"{reply.stage or 'base'}: {count_of(reply.tokens, 'token')} in {reply.seconds:.1f} s"]
    if reply.stopped:
        parts.append("stopped")
    elif not reply.ended:
        parts.append("cut off: --max-new-tokens allows no more")
    if reply.forgotten:
        parts.append(
            f"{count_of(reply.forgotten, 'message')} did not fit any more and are forgotten"
        )
    told.print()
    told.print(Text(", ".join(parts), style="dim"), soft_wrap=True)


class _Stop:
    asked = False

    def ask(self, *_: Any) -> None:
        self.asked = True


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[_Stop]:
    """Ctrl-C asks for a stop inside, and raises nothing."""
    stop = _Stop()
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# --- in a pipe -----------------------------------------------------------------------------------


def _read_lines(told: Console, talk: Conversation, as_json: bool) -> None:
    for read in sys.stdin:
        line = read.rstrip("\r\n")
        if _obeyed(told, talk, line):
            continue
        reply = talk.say(line)
        answer = reply.text
        if as_json:
            answer = json.dumps(dataclasses.asdict(reply), ensure_ascii=False, allow_nan=False)
        typer.echo(escaped(answer))
        sys.stdout.flush()


# --- commands ------------------------------------------------------------------------------------


class _Quit(typer.Exit):
    """Ends the conversation."""


def _obeyed(told: Console, talk: Conversation, line: str) -> bool:
    """Whether a line was a command, or nothing at all; then it is done."""
    if not line.strip():
        return True
    if not line.startswith("/"):
        return False
    word, _, rest = line.strip().partition(" ")
    if word in ("/quit", "/exit"):
        raise _Quit
    if word == "/reset":
        talk.reset()
        told.print(Text("forgotten", style="dim"))
    elif word == "/stage":
        _switch(told, talk.view, rest.strip())
    elif word == "/help":
        told.print(facts(_HELP))
    else:
        told.print(Text(f"{word} is no command; begin with a blank to say it", style="yellow"))
        told.print(facts(_HELP))
    return True


def _switch(told: Console, view: View, name: str) -> None:
    from lamina.stages.viewed import BASE

    if not name:
        for each in (None, *view.stages):
            mark = "→ " if each == view.shown else "  "
            told.print(Text(f"{mark}{each or BASE}"))
        return
    view.show(None if name == BASE else name)
    told.print(Text(f"now {_who(view)}", style="dim"), soft_wrap=True)
    told.print(facts([("check", _verified(view))]))
