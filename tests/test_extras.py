"""Optional packages are imported in one place, which names the extra that brings them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lamina
from lamina.extras import require


def test_what_is_there_is_given() -> None:
    import json.decoder

    assert require("json.decoder", "quant") is json.decoder


def test_what_is_missing_names_the_extra() -> None:
    with pytest.raises(lamina.MissingExtraError, match="no_such_package is needed") as caught:
        require("no_such_package.part", "quant")
    assert caught.value.cure == "pip install 'lamina[quant]'"
    assert isinstance(caught.value, ImportError)


def test_adapting_a_dense_model_imports_no_quantiser() -> None:
    code = (
        "import sys, torch, lamina\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "model = lamina.get_peft_model(model, lamina.LoraConfig(target_modules=['0']))\n"
        "model.merge_and_unload()\n"
        "print([m for m in ('bitsandbytes', 'torchao', 'hqq') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
