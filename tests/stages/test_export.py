"""The whole of an export: nothing half written, ranks left out with the error, answers compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lamina.checkpoint.adapter import WEIGHTS_NAME
from lamina.checkpoint.export.base_config import read_base_config
from lamina.checkpoint.export.gguf import Gguf
from lamina.checkpoint.export.registry import TARGETS
from lamina.errors import CheckpointError, ConfigError, ExportError, StageError
from lamina.stages.export import check_export, export
from lamina.stages.verify import verify
from tests import models
from tests.adapters import llama_adapter
from tests.checkpoint.export import made
from tests.stages.chains import (
    answer,
    deltas_in,
    distance,
    llama_lora,
    open_with_peft,
    run_chain,
)

SFT = llama_lora(r=4, lora_alpha=8)
DPO = llama_lora(r=6, lora_alpha=9, target_modules=["v_proj", "o_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    models.tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    return run_chain(folder, [("sft", None, SFT), ("dpo", "stack", DPO)])[1]


@pytest.mark.parametrize("target", TARGETS)
def test_a_chain_answers_the_same_after_every_export(
    tmp_path: Path, base: Path, chain: Path, target: str
) -> None:
    report = export(chain, tmp_path / "out", target=target, base=base, served_base="base")
    assert report.probe is not None
    assert report.probe.passed
    assert report.probe.max_difference < 1e-6 < report.probe.max_logit
    assert report.difference < 1e-7
    assert report.modules == 6
    assert set(TARGETS[target].files) == set(report.files)


@pytest.mark.parametrize("target", ["vllm", "mlx"])
def test_a_base_in_memory_is_asked_and_left_as_it_was(
    tmp_path: Path, chain: Path, target: str
) -> None:
    model = models.tiny_llama()
    expected = answer(model)
    names = [name for name, _ in model.named_modules()]
    report = export(chain, tmp_path / "out", target=target, base=model)
    assert report.probe is not None
    assert report.probe.passed
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(answer(model), expected)


def test_a_base_of_which_there_is_a_config_only_is_not_asked(
    tmp_path: Path, base: Path, chain: Path
) -> None:
    config = read_base_config(str(base))
    assert export(chain, tmp_path / "out", target="gguf", base=config).probe is None
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((base / "config.json").read_bytes())
    report = export(chain, tmp_path / "again", target="gguf", base=tmp_path / "config")
    assert report.probe is None


def test_a_wrong_base_is_refused_before_anything_is_written(tmp_path: Path, chain: Path) -> None:
    wrong = models.tiny_llama(num_hidden_layers=3)
    with pytest.raises(StageError):
        export(chain, tmp_path / "out", target="vllm", base=wrong)
    assert not (tmp_path / "out").exists()


def test_larger_ranks_are_compressed_as_asked_and_the_error_is_told(
    tmp_path: Path, base: Path, chain: Path
) -> None:
    report = export(chain, tmp_path / "out", target="vllm", rank=3, base=base)
    assert report.rank == (3, 3)
    # By the dense matrices: what the singular values after the third hold.
    before, after = deltas_in(chain), deltas_in(tmp_path / "out")
    lost = sum(np.linalg.norm(before[name] - after[name]) ** 2 for name in before)
    whole = sum(np.linalg.norm(delta) ** 2 for delta in before.values())
    best = sum((np.linalg.svd(delta, compute_uv=False)[3:] ** 2).sum() for delta in before.values())
    assert report.compression == pytest.approx(np.sqrt(lost / whole), rel=1e-5)
    assert lost == pytest.approx(best, rel=1e-5)
    assert report.probe is not None
    assert report.probe.max_difference > 1e-4


def test_ranks_that_fit_are_left_alone(tmp_path: Path, chain: Path) -> None:
    report = export(chain, tmp_path / "out", target="vllm", rank=10)
    assert report.compression is None
    assert report.difference == 0


def test_an_export_does_not_overwrite_unless_told_to(tmp_path: Path, chain: Path) -> None:
    out = tmp_path / "out"
    export(chain, out, target="mlx")
    with pytest.raises(CheckpointError, match="not empty"):
        export(chain, out, target="vllm")
    (out / "notes.txt").write_text("mine")
    export(chain, out, target="vllm", force=True)
    # What another program would have read is gone, what nobody wrote here is not.
    names = {file.name for file in out.iterdir()}
    assert names == {"adapter_config.json", WEIGHTS_NAME, "notes.txt"}
    for source in (chain, tmp_path):
        with pytest.raises(CheckpointError):
            export(chain, source, target="vllm", force=source == chain)


def test_an_export_into_the_base_is_refused(tmp_path: Path, chain: Path) -> None:
    base = made.base_config(tmp_path / "base")
    with pytest.raises(CheckpointError, match="read from"):
        export(chain, base, target="gguf", base=base, force=True)
    assert [file.name for file in base.iterdir()] == ["config.json"]


def test_what_reads_back_otherwise_is_not_published(
    tmp_path: Path, chain: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(chain, out, target="gguf", base=read_base_config(str(base)))
    before = (out / "adapter.gguf").read_bytes()
    write = Gguf.write

    def spoilt(self: Gguf, updates: Any, directory: Path, options: Any) -> None:
        write(self, updates, directory, options)
        content = bytearray((directory / "adapter.gguf").read_bytes())
        content[-50] ^= 0x40
        (directory / "adapter.gguf").write_bytes(content)

    monkeypatch.setattr(Gguf, "write", spoilt)
    with pytest.raises(ExportError, match="differs from the adapter"):
        export(chain, out, target="gguf", base=read_base_config(str(base)), force=True)
    assert (out / "adapter.gguf").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_goes_where_it_is_looked_for(tmp_path: Path) -> None:
    adapter = made.write(tmp_path / "a")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("x")
    for target, there in (("vllm", True), ("peft", True), ("mlx", False)):
        export(adapter, tmp_path / target, target=target)
        assert (tmp_path / target / "tokenizer.json").exists() == there
        assert (tmp_path / target / "chat_template.jinja").exists() == there


def test_a_folder_of_an_adapter_is_found(tmp_path: Path) -> None:
    made.write(tmp_path / "run" / "inner")
    report = export(tmp_path / "run", tmp_path / "out", target="vllm", subfolder="inner")
    assert report.modules == len(made.MODULES)
    assert check_export(tmp_path / "run", target="vllm", subfolder="inner").ok


def test_dora_goes_to_peft_and_says_elsewhere_how_it_could(tmp_path: Path) -> None:
    model = llama_adapter(use_dora=True)
    model.save_pretrained(tmp_path / "a")
    for target in ("vllm", "mlx"):
        (fault,) = check_export(tmp_path / "a", target=target).faults
        assert "DoRA" in fault.what
        assert "lamina flatten" in fault.cure
        assert "lamina merge" in fault.cure
    base: LlamaForCausalLM = models.tiny_llama()
    report = export(tmp_path / "a", tmp_path / "out", target="peft", base=base)
    assert report.probe is not None
    assert report.probe.max_difference == 0
    assert distance(answer(open_with_peft(tmp_path / "out")), answer(model)) < 1e-6


def test_an_unknown_target_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'vlm'") as refused:
        check_export(made.write(tmp_path / "a"), target="vlm")
    assert "'vllm'" in str(refused.value.cure)


def test_a_config_that_cannot_be_honoured_is_told_before_anything_else(tmp_path: Path) -> None:
    config = made.adapter_config(r="two", modules_to_save=7)
    with pytest.raises(ConfigError) as refused:
        export(made.write(tmp_path / "a", config=config), tmp_path / "out", target="vllm")
    assert len(refused.value.faults) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_told_by_module(tmp_path: Path, bad: float) -> None:
    tensors = made.factors()
    key = f"{made.PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"
    tensors[key][0, 0] = bad
    for target in ("vllm", "peft", "mlx"):
        with pytest.raises(ExportError, match="NaN or infinity in 1 module") as refused:
            export(made.write(tmp_path / "a", tensors), tmp_path / "out", target=target)
        assert refused.value.faults == ("model.layers.1.mlp.down_proj",)
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_base_is_run(tmp_path: Path) -> None:
    base = made.base_config(tmp_path / "base", model_type="x", auto_map={"AutoConfig": "evil.C"})
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    with pytest.raises(ExportError, match="can't be read"):
        check_export(made.write(tmp_path / "a"), target="gguf", base=base)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    adapter = made.write(tmp_path / "a")
    tensors = load_file(adapter / WEIGHTS_NAME)
    (adapter / WEIGHTS_NAME).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        export(adapter, tmp_path / "out", target="vllm")


def test_an_export_can_be_verified_and_one_that_is_rounded_says_why_not(
    tmp_path: Path, base: Path, chain: Path
) -> None:
    report = export(chain, tmp_path / "out", target="vllm")
    assert not report.notes
    assert verify(tmp_path / "out", base).proved
    rounded = export(chain, tmp_path / "half", target="vllm", dtype=torch.bfloat16)
    assert "answers are left out" in rounded.notes[0].what
    found = verify(tmp_path / "half", base)
    assert not found.proved
    assert found.passed
