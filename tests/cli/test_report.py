from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina.cli.app import app
from tests.training.report import made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    stages = made.CHAIN[:1]
    return made.write_run(tmp_path / "run", stages, adapters=False, drift=False)


def lamina(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["report", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_it_says_what_the_run_came_to_and_where_the_page_is(run: Path) -> None:
    code, out, _ = lamina(str(run))
    assert code == 0
    assert out.startswith("domain is better than the base on all 3 evals: ")
    words = "".join(out.split())
    assert f"page{run / 'report' / 'index.html'}" in words
    assert (run / "report" / "index.html").is_file()


def test_json(run: Path) -> None:
    code, out, _ = lamina(str(run), "--json")
    told = json.loads(out)
    assert code == 0
    assert told["html"] == str(run / "report" / "index.html")
    assert [Path(file).name for file in told["pngs"]] == ["lineage.png", "curves.png", "matrix.png"]
    assert told["stage_card"] is None
    assert told["verdict"].startswith("domain is better")


def test_open_shows_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert lamina(str(run), "--open", "--json")[0] == 0
    assert opened == [(run / "report" / "index.html").as_uri()]


def test_no_run_is_one_message(tmp_path: Path) -> None:
    code, out, error = lamina(str(tmp_path))
    assert (code, out) == (2, "")
    assert "There is no run in" in error
    assert "lamina run plan.yaml" in error
