"""`lamina doctor`: what it prints, its JSON, its exit codes, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import models
from tests.checkpoint.doctor.made import CONFIG, key, plain
from tests.cli.made import lamina


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    return plain().write(tmp_path / "healthy")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    parts = plain(r=32)
    parts.tensors[key(0, "q_proj", "A")][0, 0] = float("nan")
    for layer in range(5):
        parts.tensors[key(layer, "v_proj", "B")].zero_()
    return parts.write(tmp_path / "broken")


def test_a_healthy_adapter(healthy: Path) -> None:
    found = lamina("doctor", healthy)
    assert found.exit_code == 0
    assert found.stdout.splitlines()[0] == str(healthy)
    assert "Nothing found" in found.stdout


def test_findings_say_what_where_and_the_cure(broken: Path) -> None:
    found = lamina("doctor", broken)
    text = squeezed(found.stdout)
    assert found.exit_code == 3
    assert "error: not-finite Entries are no numbers: 1 NaN in base_model" in text
    assert "warning: zero-b B is all zero, so that it changes nothing there in 5: model" in text
    assert "layers.2.self_attn.v_proj and 2 more cure: if it was trained" in text
    assert "note: vllm-rank" in text
    assert text.index("error:") < text.index("warning:") < text.index("note:")
    assert found.stdout.splitlines()[-1] == "1 error, 1 warning, 1 note"


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_terminal(broken: Path, columns: int) -> None:
    _, *rest = lamina("doctor", broken, columns=columns).stdout.splitlines()
    assert max(map(len, rest)) <= columns
    assert not any(line.endswith(" ") for line in rest)


def test_exit_codes(healthy: Path, tmp_path: Path) -> None:
    parts = plain()
    parts.config["peft_version"] = "99.0"
    assert lamina("doctor", parts.write(tmp_path / "note")).exit_code == 0
    parts.config["rank_pattern"] = {"o_proj": 2}
    assert lamina("doctor", parts.write(tmp_path / "warning")).exit_code == 1
    parts.config["r"] = 9
    assert lamina("doctor", parts.write(tmp_path / "error")).exit_code == 3
    missing = lamina("doctor", tmp_path / "nothing")
    assert missing.exit_code == 2
    assert "There is no directory" in missing.stderr


def test_what_a_program_refuses(tmp_path: Path) -> None:
    parts = plain()
    parts.config["alpha_pattern"] = {"v_proj": 8}
    path = parts.write(tmp_path)
    assert lamina("doctor", path).exit_code == 0
    assert lamina("doctor", path, "--for", "vllm").exit_code == 3


def test_headers_alone(broken: Path) -> None:
    found = lamina("doctor", broken, "--quick")
    assert found.exit_code == 0
    assert "Not checked, since the values were not read: Whether the values can be" in squeezed(
        found.stdout
    )


def test_json_is_all_there_is(broken: Path, healthy: Path) -> None:
    found = lamina("doctor", broken, "--json")
    assert found.exit_code == 3
    told = json.loads(found.stdout)
    assert told["path"] == str(broken)
    assert (told["base"], told["healthy"], told["unchecked"]) == (None, False, [])
    assert told["counts"] == {"error": 1, "warning": 1, "note": 1}
    (first, *_) = told["findings"]
    assert first["code"] == "not-finite"
    assert first["where"] == [key(0, "q_proj", "A")]
    assert {*first} == {"severity", "code", "what", "where", "cure"}
    assert json.loads(lamina("doctor", healthy, "--json").stdout)["findings"] == []


def test_against_a_base(tmp_path: Path) -> None:
    path = plain(layers=2).write(tmp_path / "adapter")
    models.tiny_llama().save_pretrained(tmp_path / "base")
    found = lamina("doctor", path, "--base", tmp_path / "base")
    assert found.exit_code == 0
    assert found.stdout.splitlines()[:2] == [str(path), f"against {tmp_path / 'base'}"]
    models.tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    assert lamina("doctor", path, "-b", tmp_path / "wide").exit_code == 3


def test_a_directory_in_ruins(healthy: Path) -> None:
    (healthy / CONFIG).write_text("{")
    (healthy / "adapter_model.safetensors").write_bytes(b"\0" * 4)
    found = lamina("doctor", healthy)
    assert found.exit_code == 3
    assert "config-unreadable" in found.stdout
    assert "weights-unreadable" in found.stdout
    assert "2 errors" in found.stdout


def test_needs_no_torch(healthy: Path) -> None:
    code = (
        "import sys; from lamina.cli import app; "
        f"app(['doctor', {str(healthy)!r}], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert torch.__version__
