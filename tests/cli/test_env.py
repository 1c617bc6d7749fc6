"""`lamina env`."""

from __future__ import annotations

import json
from importlib.metadata import version

import torch

from lamina._version import __version__
from tests.cli.made import lamina


def test_shows_versions_without_importing() -> None:
    told = json.loads(lamina("env", "--json").stdout)
    assert told["packages"]["lamina"] == __version__
    assert told["packages"]["torch"] == version("torch")
    assert told["packages"]["deepspeed"] is None
    assert 1 <= told["cores_usable"] <= told["cores"]
    assert told["devices"] is None


def test_lists_what_is_missing_in_one_line() -> None:
    lines = lamina("env").stdout.splitlines()
    assert any("not installed" in line and "deepspeed" in line for line in lines)


def test_gpu_asks_torch() -> None:
    told = json.loads(lamina("env", "--gpu", "--json").stdout)
    cuda = [device for device in told["devices"] if device["name"].startswith("cuda")]
    assert len(cuda) == torch.cuda.device_count()
