from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from lamina.storage import exchange
from tests.storage.directories import CONFIG, WEIGHTS, save


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "renames":
        monkeypatch.setattr(exchange, "_swap_call", lambda libc: None)
    return str(request.param)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory that was saved and used: with checkpoints, a tokenizer and links."""
    target = tmp_path / "runs" / "chat"
    save(target, "old")
    (target / "checkpoint-10" / "sft").mkdir(parents=True)
    (target / "checkpoint-10" / CONFIG).write_text("ten")
    (target / "checkpoint-10" / "sft" / WEIGHTS).write_text("ten sft")
    (target / "tokenizer.json").write_text("tokens")
    (target / "latest").symlink_to("checkpoint-10")
    (target / "gone").symlink_to("nowhere")
    return target


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[object]:
    mounted: list[Path] = []

    def do(point: Path, *arguments: str) -> Path:
        point.mkdir(parents=True, exist_ok=True)
        command = ["mount", *arguments, str(point)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode != 0:
            pytest.skip("can't mount here")
        mounted.append(point)
        return point

    yield do
    for point in reversed(mounted):
        subprocess.run(["umount", str(point)], check=True)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail(f"asked the hub: {args} {kwargs}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
