"""Putting Lamina in the place of peft, and taking it away again."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest

import lamina
from lamina.interop.peft import install, installed, uninstall
from lamina.interop.peft.modules import names, resolve


@pytest.fixture
def dropin():
    install()
    yield importlib.import_module("peft")
    uninstall()


def ours(name="peft"):
    return {k: v for k, v in sys.modules.items() if k == name or k.startswith(f"{name}.")}


def test_import_peft_is_lamina(dropin):
    assert installed()
    assert issubclass(dropin.LoraConfig, lamina.LoraConfig)
    assert issubclass(dropin.PeftModelForCausalLM, lamina.PeftModelForCausalLM)


def test_it_looks_installed(dropin):
    assert importlib.util.find_spec("peft") is not None
    assert importlib.metadata.version("peft") == "0.21.2" == dropin.__version__
    assert "peft" in importlib.metadata.packages_distributions()["peft"]


def test_submodules_are_attributes(dropin):
    from peft.tuners.lora.layer import Linear

    assert dropin.tuners.lora.layer.Linear is Linear
    assert dropin.tuners.lora.Linear is Linear


def test_unknown_names_and_modules_are_import_errors(dropin):
    with pytest.raises(ImportError, match="nothing"):
        from peft import nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("peft.nothing")


def test_every_name_of_the_tree_resolves_to_one_object(dropin):
    for module, name in names():
        assert resolve(module, name) is resolve(module, name)


def test_setting_a_name_sets_it_where_it_lives(dropin, monkeypatch):
    from lamina.interop.peft import config

    monkeypatch.setattr(importlib.import_module("peft.config"), "__version__", "9.9")
    assert config.__version__ == "9.9"
    assert dropin.LoraConfig().peft_version == "9.9"


def test_uninstall_restores_modules_and_finders():
    marker = types.ModuleType("peft.marker")
    sys.modules["peft.marker"] = marker
    modules, finders = ours(), list(sys.meta_path)
    try:
        install()
        install()
        assert "peft.marker" not in sys.modules
        importlib.import_module("peft.utils.other")
        uninstall()
        uninstall()
        assert ours() == modules
        assert sys.meta_path == finders
        assert not installed()
    finally:
        sys.modules.pop("peft.marker", None)


def library(monkeypatch, tmp_path, source):
    """A module that passes for one of transformers'."""
    path = tmp_path / "remembers.py"
    path.write_text(source)
    name = "transformers.remembers"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_names_that_were_imported_before_are_replaced_and_put_back(monkeypatch, tmp_path):
    source = "THERE = False\nif THERE:\n    from peft import PeftModel\n"
    module = library(monkeypatch, tmp_path, source)

    install()
    try:
        assert module.PeftModel is importlib.import_module("peft").PeftModel
    finally:
        uninstall()
    assert not hasattr(module, "PeftModel")


def test_the_answer_that_peft_is_missing_is_forgotten(monkeypatch, tmp_path):
    module = library(
        monkeypatch,
        tmp_path,
        "import functools\nanswers = [False]\n"
        "@functools.lru_cache\ndef is_peft_available():\n    return answers[0]\n",
    )
    assert not module.is_peft_available()
    module.answers[0] = True

    install()
    try:
        assert module.is_peft_available()
    finally:
        uninstall()
