"""How things look on a terminal: tables, numbers, sizes, errors."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lamina.errors import LaminaError, LaminaWarning, escaped


class _Console(Console):
    """One that shows what a terminal would obey in names from files, rather than pass it on."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(escaped(text), style)


def console(*, stderr: bool = False) -> Console:
    """A console on the stream as it is now; plain text where that is no terminal."""
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON document on the standard output; JSON has no NaN and no infinity, but null."""
    told = _without_infinity(value)
    typer.echo(escaped(json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False)))


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_error(error: LaminaError) -> None:
    """What happened, all faults, and the cure, on the standard error."""
    lines = [
        Text.assemble(("error: ", "bold red"), error.what),
        *(Text(f"  - {fault}") for fault in error.faults),
        *([Text.assemble(("To mend it: ", "bold"), error.cure)] if error.cure else []),
    ]
    for line in lines:
        console(stderr=True).print(line, soft_wrap=True)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Let warnings of this library look like its errors; those of others stay as they are."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, LaminaWarning):
                usual(message, category, *where, **more)
                return
            line = Text.assemble(("warning: ", "bold yellow"), str(message))
            console(stderr=True).print(line, soft_wrap=True)

        warnings.showwarning = show
        yield


def table(
    columns: Iterable[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    folded: Collection[str] = (),
) -> Table:
    """A table without a frame.

    Args:
        columns: the headings.
        rows: the cells as they are to be read.
        right: the headings of the columns that are aligned to the right.
        folded: the headings of the columns that go over several lines where room is short.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(
            Text(_one_line(column)),
            justify="right" if column in right else "left",
            overflow="fold" if column in folded else "ellipsis",
            no_wrap=column not in folded,
        )
    for row in rows:
        made.add_row(*(Text(_one_line(cell)) for cell in row))
    return made


def _one_line(text: str) -> str:
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and what they are, a line each; without those that are empty."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            made.add_row(Text(_one_line(name)), Text(_one_line(value)))
    return made


def span(values: tuple[int, int]) -> str:
    """A smallest and a largest value: `4`, `4-8`."""
    least, most = values
    return str(least) if least == most else f"{least}-{most}"


def some(names: Sequence[str], shown: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def hush_imports() -> None:
    """Keep off the terminal what quantisers note when Transformers imports them.

    It is about kernels for other devices, and about torch's own ways.
    """
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hush_loading() -> None:
    """Keep the bars of Transformers' loading and saving off the terminal."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
