"""Finding and parsing data: files, folders, patterns, splits, and what is broken in them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lamina.errors import DataError
from lamina.training.data import Source, open_data
from lamina.training.data import hub as hub_module
from lamina.training.plan.settings import Data
from tests.training.data.written import jsonl

ROWS = [{"text": f"t{number}"} for number in range(10)]


def texts(source: Source) -> list[str]:
    return [row["text"] for _, row in source.rows() if isinstance(row, dict)]


def opened(path: Path, **settings: Any) -> Source:
    return open_data(Data(path=str(path), **settings))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "t0"}\n\n{"text": "t1"}\n'),
        ("a.json", b'\n [{"text": "t0"}, {"text": "t1"}]'),
        ("lines.json", b'{"text": "t0"}\n{"text": "t1"}'),
        ("marked.jsonl", b'\xef\xbb\xbf{"text": "t0"}\r\n{"text": "t1"}\r\n'),
        ("a.csv", b'id,text\n1,t0\n2,"t1"\n'),
        ("a.tsv", b"id\ttext\n1\tt0\n2\tt1\n"),
        ("a.txt", b"\nt0\n\n \nt1"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "t0"}\n{"text": "t1"}', mtime=0)),
        ("a.csv.bz2", bz2.compress(b"text\nt0\nt1\n")),
    ],
)
def test_reads_each_kind_of_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(opened(tmp_path / name)) == ["t0", "t1"]


def test_reads_parquet_with_lists(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    table = pyarrow.table({"text": ["t0", "t1"], "talk": [talk, talk]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet")
    assert list(source.rows()) == [
        ("row 1", {"text": "t0", "talk": talk}),
        ("row 2", {"text": "t1", "talk": talk}),
    ]


def test_blank_lines_part_the_documents_of_a_text_and_markdown_is_one(tmp_path: Path) -> None:
    content = "# One\nline\n\nTwo\n"
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "a.md").write_text(content)
    assert texts(opened(tmp_path / "a.txt")) == ["# One\nline", "Two"]
    assert texts(opened(tmp_path / "a.md")) == ["# One\nline\n\nTwo"]


def test_a_folder_is_all_its_data_in_order_without_what_is_about_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", ROWS[:1])
    jsonl(tmp_path / "a" / "z.jsonl", ROWS[1:3])
    jsonl(tmp_path / ".hidden" / "x.jsonl", ROWS[3:])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "load.py").write_text("raise SystemExit('run')")
    assert texts(opened(tmp_path)) == ["t1", "t2", "t0"]
    assert texts(opened(tmp_path / "**" / "*.jsonl")) == ["t1", "t2", "t0"]
    places = [place for place, _ in opened(tmp_path).rows()]
    assert places == ["z.jsonl, line 1", "z.jsonl, line 2", "b.jsonl, line 1"]


def test_reads_what_datasets_has_saved(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    assert texts(opened(tmp_path / "one")) == [row["text"] for row in ROWS]
    several = datasets.DatasetDict(train=made.select([0, 1]), test=made.select([2]))
    several.save_to_disk(str(tmp_path / "two"))
    assert texts(opened(tmp_path / "two")) == ["t0", "t1"]
    assert texts(opened(tmp_path / "two", split="test")) == ["t2"]


def test_a_name_like_that_of_a_note_is_data_still(tmp_path: Path) -> None:
    jsonl(tmp_path / "state.jsonl", ROWS[:1])
    jsonl(tmp_path / "license-texts.jsonl", ROWS[1:2])
    assert texts(opened(tmp_path)) == ["t1", "t0"]


def test_files_named_after_splits_are_not_mixed_up(tmp_path: Path) -> None:
    jsonl(tmp_path / "train-0.jsonl", ROWS[:2])
    jsonl(tmp_path / "train-1.jsonl", ROWS[2:3])
    jsonl(tmp_path / "test.jsonl", ROWS[3:])
    assert texts(opened(tmp_path)) == ["t0", "t1", "t2"]
    assert len(texts(opened(tmp_path, split="test"))) == 7
    with pytest.raises(DataError, match="no split 'validation'"):
        opened(tmp_path, split="validation")
    jsonl(tmp_path / "more.jsonl", ROWS)
    with pytest.raises(DataError, match=r"more\.jsonl names no split"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [("train[:25%]", 0, 2), ("train[25%:]", 2, 10), ("train[2:5]", 2, 5), ("train[-3:]", 7, 10)],
)
def test_slices_are_those_of_datasets(tmp_path: Path, split: str, first: int, last: int) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    expected = datasets.load_dataset(
        "json", data_files=str(path), split=split, cache_dir=str(tmp_path / "cache")
    )
    assert texts(opened(path, split=split)) == list(expected["text"])
    assert len(expected) == last - first
    assert texts(opened(path, split=split, max_samples=1)) == [f"t{first}"]


def test_paths_are_looked_for_beside_the_plan_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "plans"
    jsonl(here / "a.jsonl", ROWS[:1])
    jsonl(there / "a.jsonl", ROWS[1:2])
    jsonl(here / "own.jsonl", ROWS[2:3])
    monkeypatch.chdir(here)
    assert texts(open_data(Data(path="a.jsonl"), there)) == ["t1"]
    assert texts(open_data(Data(path="own.jsonl"), there)) == ["t2"]


def test_the_digest_is_of_the_bytes_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    digest = opened(path).digest
    inner = hashlib.sha256(path.read_bytes()).digest()
    assert digest == hashlib.sha256(inner).hexdigest()
    assert opened(path.rename(tmp_path / "b.jsonl")).digest == digest
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("\n")
    assert opened(tmp_path / "b.jsonl").digest != digest


def test_what_is_not_there_is_told_with_what_is_near(tmp_path: Path) -> None:
    jsonl(tmp_path / "chats.jsonl", ROWS)
    with pytest.raises(DataError, match=r"There is no chat\.jsonl[\s\S]*'chats\.jsonl'"):
        open_data(Data(path="chat.jsonl"), tmp_path)
    # It ends like a file, and so is no name on the hub.
    with pytest.raises(DataError, match="no file, no folder"):
        open_data(Data(path="data/chats.jsonl"), tmp_path)
    with pytest.raises(DataError, match="No file matches"):
        open_data(Data(path="*.csv"), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.xlsx", b"x", "of no kind that is known"),
        ("a.json", b'[{"a": 1},\n {]', "line 2, column 3"),
        ("b.json", b'{\n "a": 1\n}', "one object over several lines"),
        ("a.jsonl", '{"text": "ä"}'.encode("utf-16"), "UTF-16"),
        ("a.csv", b"a;b\n1;2\n", "separated by ';'"),
        ("b.csv", b"a,a\n1,2\n", "names a column twice"),
        ("c.csv", b'a,b\n1,"2\n', "line 2"),
        ("d.csv", b"a,b\n1,\xff\n", "isn't UTF-8"),
        ("a.parquet", b"PAR1 no", "no Parquet file"),
        ("a.arrow", b"no", "no Arrow file"),
        ("a.jsonl.gz", b"no gzip", "can't be read"),
        ("b.jsonl.gz", gzip.compress(b'{"text": "long enough"}', mtime=0)[:-12], "can't be read"),
        ("a.md", b"\xff", "isn't UTF-8"),
    ],
)
def test_files_that_are_broken_as_a_whole(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        list(opened(tmp_path / name).rows())


def test_broken_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "t0"}\n{"text"\n[1]\n{"text": "\xff"}\n')
    told = [(place, row) for place, row in opened(path).rows() if isinstance(row, str)]
    assert [place for place, _ in told] == ["line 2", "line 3", "line 4"]
    assert "no JSON" in told[0][1]
    assert "no object" in told[1][1]
    assert "UTF-8" in told[2][1]
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    assert [row for _, row in opened(path).rows()] == [
        {"text": "\U0001f600"},
        "holds half a character (a lone surrogate)",
    ]
    (tmp_path / "a.csv").write_text('a,b\n"1\n2",3\n4\n')
    assert list(opened(tmp_path / "a.csv").rows()) == [
        ("line 3", {"a": "1\n2", "b": "3"}),
        ("line 4", "has 1 cells; the first line names 2"),
    ]


def test_folders_that_are_unclear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is empty"):
        opened(tmp_path)
    jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("text\nt\n")
    with pytest.raises(DataError, match="several kinds"):
        opened(tmp_path)
    for path in (tmp_path / "a.jsonl", tmp_path / "*.jsonl", jsonl(tmp_path / "c/d.jsonl", ROWS)):
        with pytest.raises(DataError, match="named after a split 'test'"):
            opened(path, split="test")
    with pytest.raises(DataError, match="named after a split 'test'"):
        opened(tmp_path / "c", split="test")
    named = jsonl(tmp_path / "test.jsonl", ROWS[:1])
    assert texts(opened(named)) == texts(opened(named, split="test")) == ["t0"]


def test_what_is_for_the_hub_means_nothing_to_files(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError) as error:
        opened(path, name="x", revision="main", split="train+test")
    assert [fault.split(":")[0] for fault in error.value.faults] == ["name", "revision", "split"]


class _Builder:
    """As `datasets` would make it of a hub dataset of Parquet files."""

    def __init__(self) -> None:
        self.hash = "c0ffee"
        self.asked: list[Any] = []

    def download_and_prepare(self) -> None:
        self.asked.append("prepared")

    def as_dataset(self, split: str) -> datasets.Dataset:
        self.asked.append(split)
        return datasets.Dataset.from_list(ROWS)


def test_hub_names_go_to_datasets_with_all_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    made = _Builder()

    def builder(path: str, name: str | None, **more: Any) -> _Builder:
        asked.append((path, name, more))
        return made

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(_Builder, "__module__", "datasets.packaged_modules.parquet.parquet")
    data = Data(path="owner/data", name="en", revision="v1", split="train[:9]", max_samples=2)
    source = open_data(data)
    assert asked == [("owner/data", "en", {"revision": "v1"})]
    assert texts(source) == ["t0", "t1"]
    assert made.asked == ["prepared", "train[:9]"]
    other = _Builder()
    other.hash = "other"
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **b: other)
    assert open_data(data).digest != source.digest
    monkeypatch.setattr(_Builder, "__module__", "datasets.packaged_modules.pandas.pandas")
    with pytest.raises(DataError, match="isn't plain text or tables"):
        open_data(data)


def test_a_hub_that_answers_otherwise_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr(hub_module.require("datasets", "train"), "load_dataset_builder", refuse)
    with pytest.raises(DataError, match="no such host"):
        open_data(Data(path="owner/data"))


def test_rows_can_be_read_again(tmp_path: Path) -> None:
    source = opened(jsonl(tmp_path / "a.jsonl", ROWS))
    assert list(source.rows()) == list(source.rows())
    assert json.dumps(source.first(2)) == json.dumps(ROWS[:2])
