"""Rows of data files, each with the place it stands at: JSON, CSV, Parquet, Arrow, plain text.

A file is only parsed, never run. JSON and CSV are read here, line by line, since `datasets` doesn't
say which line of a file is broken.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lamina.errors import DataError
from lamina.extras import require

# Where a row stands ("line 3"), and its values; or what is wrong there.
Row = tuple[str, dict[str, Any] | str]

KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
}
_COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_CELL = 1 << 24


def kind_of(path: Path) -> str | None:
    """What a file holds by its name: a key of the readers, or None."""
    return KINDS.get(_suffix(path))


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a file, broken ones too.

    Text files: the documents of a `.txt` are separated by blank lines; a `.md` is one document.

    Raises:
        DataError: the file as a whole can't be read.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        "json": _json,
        "csv": _csv,
        "parquet": _parquet,
        "arrow": _arrow,
        "text": _text,
        "markdown": _markdown,
    }
    try:
        yield from readers[KINDS[_suffix(path)]](path)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}.") from error


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return name.suffix.lower()


def _open(path: Path) -> IO[bytes]:
    opened = _COMPRESSED.get(path.suffix.lower(), open)(path, "rb")
    mark = opened.read(3)
    if mark[:2] in _UTF16_MARKS:
        opened.close()
        raise DataError(f"{path} is UTF-16 text.", cure="save it as UTF-8")
    if mark != _UTF8_MARK:
        opened.seek(0)
    return opened  # type: ignore[no-any-return]


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or an object on every line."""
    with _open(path) as file:
        start = file.tell()
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(start)
        yield from _json_list(path, file) if first == b"[" else _json_lines(path, file)


def _json_list(path: Path, file: IO[bytes]) -> Iterator[Row]:
    try:
        content = file.read()
        listed = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except json.JSONDecodeError as error:
        told = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(f"{path} is no JSON.", faults=[told]) from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply.") from error
    escaped = _escapes(content)
    for number, value in enumerate(listed, 1):
        yield f"example {number}", _object(value, escaped)


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield place, f"isn't UTF-8 (byte {error.start + 1} of the line)"
        except json.JSONDecodeError as error:
            if number == 1 and line.strip() == b"{":
                told = "it holds one object over several lines"
                cure = "a list of objects, or one object on each line"
                raise DataError(f"{path} holds no examples: {told}.", cure=cure) from error
            yield place, f"is no JSON: {error.msg} at column {error.colno}"
        except RecursionError:
            yield place, "is nested too deeply"
        else:
            yield place, _object(value, _escapes(line))


def _object(value: Any, escaped: bool) -> dict[str, Any] | str:
    if isinstance(value, dict):
        return (
            value
            if not escaped or _is_unicode(value)
            else "holds half a character (a lone surrogate)"
        )
    return f"is {type(value).__name__} {str(value)[:40]!r}, and no object with names and values"


def _escapes(content: bytes) -> bool:
    return b"\\ud" in content or b"\\uD" in content


def _is_unicode(value: Any) -> bool:
    """Whether all text can be written; escapes in JSON may spell half of a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        table = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(table, [])
            _check_header(path, names, delimiter)
            for cells in table:
                # A record may go over several lines: this is the one that it ends on.
                place = f"line {table.line_num}"
                if not cells:
                    continue
                if len(cells) != len(names):
                    yield place, f"has {len(cells)} cells; the first line names {len(names)}"
                else:
                    yield place, dict(zip(names, cells, strict=True))
        except csv.Error as error:
            told = f"line {table.line_num}: {error}"
            raise DataError(f"{path} is no table.", faults=[told]) from error
        except UnicodeDecodeError as error:
            told = f"soon after line {table.line_num}: {error.reason}"
            raise DataError(
                f"{path} isn't UTF-8.", faults=[told], cure="save it as UTF-8"
            ) from error


def _check_header(path: Path, names: list[str], delimiter: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        told = [f"column {name!r} is there {names.count(name)} times" for name in twice]
        raise DataError(f"{path} names a column twice.", faults=told)
    other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    if other is not None and other != delimiter:
        cure = "save it with commas, or as .tsv with tabs"
        raise DataError(f"{path} has its columns separated by {other!r}.", cure=cure)


def _parquet(path: Path) -> Iterator[Row]:
    parquet = require("pyarrow.parquet", "train")
    with _open_plain(path) as file:
        yield from _batches(
            path, "Parquet", lambda: parquet.ParquetFile(file).iter_batches(batch_size=1000)
        )


def _arrow(path: Path) -> Iterator[Row]:
    """A stream, as `Dataset.save_to_disk` writes it."""
    streams = require("pyarrow.ipc", "train")
    with _open_plain(path) as file:
        yield from _batches(path, "Arrow", lambda: streams.open_stream(file))


def _batches(path: Path, kind: str, read: Callable[[], Iterable[Any]]) -> Iterator[Row]:
    arrow = require("pyarrow", "train")
    try:
        number = 0
        for batch in read():
            for values in batch.to_pylist():
                number += 1
                yield f"row {number}", values
    except arrow.ArrowException as error:
        raise DataError(f"{path} is no {kind} file: {error}.") from error


def _open_plain(path: Path) -> IO[bytes]:
    return _COMPRESSED.get(path.suffix.lower(), open)(path, "rb")  # type: ignore[no-any-return]


def _text(path: Path) -> Iterator[Row]:
    """Documents with blank lines between them, read without holding the file."""
    began = 0
    lines: list[str] = []
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield f"line {number}", f"isn't UTF-8 (byte {error.start + 1} of the line)"
                continue
            if line.strip():
                began = began or number
                lines.append(line)
            elif lines:
                yield f"line {began}", {"text": "\n".join(lines)}
                began, lines = 0, []
    if lines:
        yield f"line {began}", {"text": "\n".join(lines)}


def _markdown(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        try:
            text = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error
    if text.strip():
        yield "line 1", {"text": text.replace("\r\n", "\n").strip("\n")}


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    line = error.object[: error.start].count(b"\n") + 1
    where = f" (near line {line})" if line > 1 else ""
    return DataError(f"{path} isn't UTF-8{where}: {error.reason}.", cure="save it as UTF-8")
