from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

from lamina._version import __version__

ROOT = Path(__file__).parents[1]


def test_the_version_comes_from_one_place() -> None:
    assert importlib.metadata.version("lamina") == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_importing_the_package_leaves_torch_alone() -> None:
    code = "import lamina, lamina._version, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_constraints_pin_every_torch_without_a_local_version() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    releases = [pin for pin in pins if not pin.startswith("#")]
    assert "torch==2.13.0" in releases
    assert all("==" in pin and "+" not in pin for pin in releases)


def test_the_typing_marker_ships() -> None:
    assert (ROOT / "src" / "lamina" / "py.typed").is_file()


def test_templates_of_reports_ship() -> None:
    folder = importlib.resources.files("lamina.training.report") / "templates"
    names = {each.name for each in folder.iterdir()}
    assert {"index.html.j2", "style.css", "card.md.j2"} <= names
