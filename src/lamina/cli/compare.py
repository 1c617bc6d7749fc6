"""`lamina compare`: answers of base and stages to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lamina.amounts import count_of
from lamina.cli.arguments import Base, Json
from lamina.cli.chat import Device, Dtype, LoadIn4bit, NoVerify, Tokenizer, or_unverified
from lamina.cli.terminal import console, hush_loading, print_json
from lamina.errors import DataError

if TYPE_CHECKING:
    from lamina.training.conversing.compared import Compared, PromptAnswers, StageAnswer
    from lamina.training.plan.schema import Prompt

# Narrower columns of text are no pleasure.
_COLUMN, _GAP = 26, 3


def compare(  # noqa: PLR0913, PLR0917
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A stage's directory or hub id, or a run's.")
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...", help="If there are none: the answers that a run recorded."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A file with a prompt in each line, or .jsonl."),
    ] = None,
    stages: Annotated[
        str | None, typer.Option("--stages", help="Only these, such as base,chat.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; 64 if not given.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Prompts are texts to go on with, no messages.")
    ] = False,
    base: Base = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    load_in_4bit: LoadIn4bit = None,
    device: Device = None,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Show what base and stages answer to the same prompts, always by the likeliest tokens.

    Beside each answer: how often it foresees the same next token on the prompt as the one before
    it, and how far its foresight is from it (KL divergence, in nats).
    """
    from lamina.training.conversing.compared import recorded

    names = [each.strip() for each in stages.split(",") if each.strip()] if stages else None
    asked = _prompts(texts or [], prompts, max_new_tokens, plain)
    opening = {
        "base": base,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "load-in-4bit": load_in_4bit,
        "device": device,
        "max-new-tokens": max_new_tokens,
        "plain": plain or None,
        "no-verify": no_verify or None,
    }
    if not asked:
        _refuse_unused(directory, [name for name, value in opening.items() if value is not None])
    found = None if asked else recorded(directory, names)
    if found is None:
        if not asked:
            raise DataError(
                f"There is nothing to ask, and {directory} has no answers on record.",
                cure=f"lamina compare {directory} 'a prompt', or --prompts FILE",
            )
        from lamina.stages.viewed import Opening
        from lamina.training.conversing.comparing import compare as compared

        hush_loading()
        how = Opening(
            base=base,
            tokenizer=tokenizer,
            dtype=dtype.value if dtype else None,
            load_in_4bit=load_in_4bit,
            device=device,
            verify=not no_verify,
        )
        with or_unverified(), _asking(len(asked), shown=not as_json):
            found = compared(directory, asked, stages=names, how=how)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(console(), found)


def _prompts(
    texts: list[str], file: Path | None, max_new_tokens: int | None, plain: bool
) -> list[Prompt]:
    if not texts and file is None:
        return []
    from lamina.training.conversing.prompts import prompts_of, read_prompts

    chat = False if plain else None
    found = prompts_of(texts, max_new_tokens=max_new_tokens, chat=chat)
    if file is not None:
        found += read_prompts(file, max_new_tokens=max_new_tokens, chat=chat)
    return found


def _refuse_unused(directory: str, options: list[str]) -> None:
    if options:
        raise DataError(
            "Without prompts nothing is loaded or asked, so these options have no meaning.",
            faults=[f"--{name}" for name in options],
            cure=f"lamina compare {directory} 'a prompt', or --prompts FILE",
        )


@contextmanager
def _asking(count: int, *, shown: bool) -> Iterator[None]:
    told = console(stderr=True)
    if not shown or not told.is_terminal:
        yield
        return
    with told.status(Text(f"asking {count} prompt{'' if count == 1 else 's'}")):
        yield


def _print(out: Console, found: Compared) -> None:
    title = " → ".join(found.asked)
    where = "recorded by the run" if found.recorded else f"on {found.base}"
    out.print(Text.assemble((title, "bold"), f"  {where}"), soft_wrap=True)
    for note in found.notes:
        out.print(Text(note, style="yellow"), soft_wrap=True)
    width = len(found.asked) * (_COLUMN + _GAP) - _GAP
    beside = out.is_terminal and out.width >= width
    for number, each in enumerate(found.prompts, 1):
        out.print()
        out.print(Text.assemble((f"{number}. ", "dim"), (each.prompt, "bold")))
        if beside:
            out.print(_columns(each))
        else:
            _print_stacked(out, each)


def _columns(found: PromptAnswers) -> Table:
    made = Table(
        box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold cyan", expand=True
    )
    for each in found.answers:
        made.add_column(Text(each.stage), ratio=1, overflow="fold")
    made.add_row(*(_text(each) for each in found.answers))
    made.add_row(*(Text(_figures(each), style="dim") for each in found.answers))
    return made


def _print_stacked(out: Console, found: PromptAnswers) -> None:
    for each in found.answers:
        title = Text.assemble((each.stage, "bold cyan"), (f"  {_figures(each)}", "dim"))
        out.print(title, soft_wrap=True)
        text = _text(each)
        if out.is_terminal:
            out.print(Padding(text, (0, 0, 0, 4), expand=False))
        else:
            # In a pipe, lines are as long as they are.
            lines = text.split("\n", allow_blank=True)
            out.print(Text("\n").join(Text("    ") + line for line in lines), soft_wrap=True)


def _text(answer: StageAnswer) -> Text:
    # The indentation of a first line is a part of it, a blank before a first word is not.
    said = answer.text.rstrip()
    said = said.lstrip("\n") if said.startswith("\n") else said.lstrip()
    return Text(said) if said else Text("(nothing)", style="dim italic")


def _figures(answer: StageAnswer) -> str:
    parts = [count_of(answer.tokens, "token") + ("" if answer.ended else ", cut off")]
    if answer.agreement is not None:
        parts.append(f"top-1 {answer.agreement:.0%}")
    if answer.kl is not None:
        parts.append(f"KL {answer.kl:.2g}")
    return ", ".join(parts)
