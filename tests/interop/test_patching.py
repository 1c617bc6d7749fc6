"""What is patched in a module of the drop-in is patched where it is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest

from lamina.interop import peft as drop_in
from lamina.optim import lorafa


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    drop_in.install()
    try:
        yield
    finally:
        drop_in.uninstall()


def test_a_patch_reaches_the_home_and_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("peft.optimizers.lorafa")
    before = lorafa.is_bf16_available
    with monkeypatch.context() as patch:
        patch.setattr(module, "is_bf16_available", lambda: "patched")
        assert lorafa.is_bf16_available() == "patched"
        assert module.is_bf16_available() == "patched"
    assert lorafa.is_bf16_available is before
    assert module.is_bf16_available is before


def test_through_a_name_that_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("peft.optimizers")
    with monkeypatch.context() as patch:
        patch.setattr(package, "create_loraplus_optimizer", None)
        assert importlib.import_module("lamina.optim").create_loraplus_optimizer is None
    assert callable(importlib.import_module("lamina.optim").create_loraplus_optimizer)


def test_a_name_of_its_own_stays_in_the_module() -> None:
    module = importlib.import_module("peft.optimizers.lorafa")
    module.nothing_of_ours = 1
    assert module.nothing_of_ours == 1
    assert not hasattr(lorafa, "nothing_of_ours")
