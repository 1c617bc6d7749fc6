from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lamina.errors import CheckpointError, RunError
from lamina.training.report import ReportResult, write_report
from lamina.training.report.card import MARK
from tests.training.report import made


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one stage."""
    return made.write_run(tmp_path_factory.mktemp("short") / "run", made.CHAIN[:1])


@pytest.fixture
def run(tmp_path: Path, short: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(short, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_what_is_written_is_what_is_told(reported: ReportResult, finished: Path) -> None:
    folder = finished.resolve() / "report"
    assert reported.html == folder / "index.html"
    names = ["lineage.png", "curves.png", "matrix.png", "drift.png"]
    assert [file.name for file in reported.pngs] == names
    assert sorted(os.listdir(folder)) == sorted([*names, "index.html", "README.md"])
    assert reported.stage_card == finished.resolve() / "prefer" / "README.md"
    assert reported.stage_card.read_bytes() == reported.card.read_bytes()
    assert reported.verdict.startswith("prefer is better than the base on all 3 evals")


def test_pictures_can_be_printed(reported: ReportResult) -> None:
    for file in reported.pngs:
        with Image.open(file) as picture:
            assert picture.info["dpi"][0] >= 150
            assert picture.width >= 1000
            assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert len(colours) > 50


@pytest.mark.slow
def test_the_same_files_make_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "assistant"))
    first = contents(write_report(run).html.parent)
    # Another process: other hashes, another time, settings of matplotlib that are the user's own.
    code = "import sys; from lamina.training.report import write_report; write_report(sys.argv[1])"
    rc = run.parent / "matplotlibrc"
    rc.write_text("font.size: 20\naxes.grid: True\nfigure.dpi: 30\nsvg.fonttype: path\n")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(rc)}
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, env=environment)
    assert contents(run / "report") == first


def test_somebodys_own_card_is_left_alone(run: Path) -> None:
    own = run / "domain" / "README.md"
    own.write_text("# Mine\n")
    result = write_report(run)
    assert own.read_text() == "# Mine\n"
    assert (result.stage_card, result.card_was_kept) == (None, own.resolve())


def test_our_own_card_is_replaced_until_somebody_takes_it_over(run: Path) -> None:
    own = run / "domain" / "README.md"
    own.write_text(f"{MARK}\nold\n")
    result = write_report(run)
    assert result.stage_card == own.resolve()
    assert own.read_bytes() == result.card.read_bytes()
    edited = own.read_text().replace(MARK, "")
    own.write_text(edited)
    assert write_report(run).card_was_kept == own.resolve()
    assert own.read_text() == edited


def test_other_files_in_the_folder_stay_and_old_pictures_go(run: Path) -> None:
    folder = run / "report"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "drift.png").write_text("old")
    shutil.rmtree(run / "logs")
    (run / "evaluation.json").unlink()
    write_report(run)
    assert sorted(os.listdir(folder)) == ["README.md", "index.html", "lineage.png", "notes.txt"]


def test_a_file_in_place_of_the_folder_changes_nothing(run: Path) -> None:
    (run / "report").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        write_report(run)
    assert (run / "report").read_text() == "mine"
    assert not (run / "domain" / "README.md").exists()


def test_no_run_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="There is no run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_torch_stays_away(run: Path) -> None:
    code = (
        "import sys; from lamina.training.report import write_report; write_report(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)


def test_many_stages_with_long_names(tmp_path: Path) -> None:
    stages = [made.Made(f"stage-{'x' * 58}{n}", lines=2 if n else 0) for n in range(10)]
    run = made.write_run(tmp_path / "run", stages, adapters=False, base_scores=None, drift=False)
    result = write_report(run)
    assert [file.name for file in result.pngs] == ["lineage.png", "curves.png"]
