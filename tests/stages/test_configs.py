"""A config that was edited after its stage was saved is refused wherever the stage is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamina import PeftModel, begin_stage, load
from lamina.errors import RecordError
from lamina.stages.export import export
from lamina.stages.flatten import flatten
from lamina.stages.merged import save_merged
from lamina.stages.split import split
from tests import models
from tests.stages.chains import CONFIG, answer, config_of, llama_lora, run_chain

Use = Callable[[Path, Path], Any]
CHAT = llama_lora(r=6, lora_alpha=9, target_modules=["v_proj", "o_proj"])
USES: dict[str, Use] = {
    "load": lambda path, out: load(path, models.tiny_llama()),
    "begin": lambda path, out: begin_stage(
        models.tiny_llama(), name="next", parent=path, mode="stack", config=CHAT
    ),
    "streaming merge": lambda path, out: save_merged(path, out, base=_base(path)),
    "merge": lambda path, out: save_merged(path, out, base=_base(path), streaming=False),
    "flatten": flatten,
    "split": split,
    "export": lambda path, out: export(path, out, target="peft"),
}


def _base(path: Path) -> str:
    base = path.parent / "base"
    models.tiny_llama().save_pretrained(base)
    return str(base)


def edit(path: Path, **changes: Any) -> None:
    (path / CONFIG).write_text(json.dumps({**config_of(path), **changes}))


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return run_chain(tmp_path, [("sft", None, llama_lora()), ("chat", "stack", CHAT)])[1]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", [{"lora_alpha": 30}, {"rank_pattern": {}}])
def test_an_edited_config_is_refused(
    use: str, change: dict[str, Any], chat: Path, tmp_path: Path
) -> None:
    (name,) = change
    before = config_of(chat)[name]
    edit(chat, **change)
    with pytest.raises(RecordError) as caught:
        USES[use](chat, tmp_path / "out")
    assert f"set {name} to {json.dumps(before)}" in (caught.value.cure or "")
    assert not (tmp_path / "out").exists()
    edit(chat, **{name: before})
    USES[use](chat, tmp_path / "out")


def test_another_scaling_in_all_modules_is_refused_too_and_may_be_meant(tmp_path: Path) -> None:
    _, path = run_chain(tmp_path, [("sft", None, llama_lora())])
    edit(path, lora_alpha=16)
    with pytest.raises(RecordError, match=r"q_proj: scaled by 4 by the config, by 2 on record"):
        load(path, models.tiny_llama())
    meant = PeftModel.from_pretrained(models.tiny_llama(), path).eval()
    edit(path, lora_alpha=8)
    saved = load(path, models.tiny_llama())
    base, once, twice = answer(models.tiny_llama()), answer(saved), answer(meant)
    assert (twice - base).norm() > 1.5 * (once - base).norm()
