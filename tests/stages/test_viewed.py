"""One base under all stages of a chain."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamina.errors import LaminaError, MissingFileError, StageError, VerificationError
from lamina.model import AutoPeftModel, PeftModel
from lamina.stages.viewed import Opening, View, open_view
from tests import models
from tests.stages.chains import answer, distance, llama_lora, run_stage
from tests.training.conversing.talking import make_run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def expected(out: Path, stage: str | None) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(out.parent / "base").eval()
    if stage is None:
        return answer(base)
    return answer(PeftModel.from_pretrained(base, out / stage).eval())


def same(view: View, out: Path, stage: str | None) -> bool:
    assert view.shown == stage
    return distance(answer(view.model), expected(out, stage)) < 1e-5


def test_every_stage_and_the_base_over_one_base(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    load_base = AutoPeftModel.load_base

    def counted(*args: Any, **kwargs: Any) -> Any:
        loaded.append(load_base(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(AutoPeftModel, "load_base", counted)
    view = open_view(out / "dpo")
    assert view.stages == ("domain", "chat", "dpo")
    for stage in ("dpo", "domain", None, "chat", "dpo", None, None, "domain"):
        if stage != "dpo" or view.shown != "dpo":
            view.show(stage)
        assert same(view, out, stage)
    assert len(loaded) == 1
    assert {*view.verified} == {"domain", "chat", "dpo"}
    assert all(report.proved for report in view.verified.values())
    assert view.chains["chat"] == ("domain", "chat")
    assert not any(module.training for module in view.model.modules())
    assert not any(parameter.requires_grad for parameter in view.model.parameters())


def test_an_earlier_stage_first(out: Path) -> None:
    view = open_view(out / "dpo", "chat")
    assert same(view, out, "chat")
    view.show("dpo")
    assert same(view, out, "dpo")


def test_stages_of_directories_that_have_nothing_to_do_with_each_other(
    out: Path, tmp_path: Path
) -> None:
    build = lambda: AutoModelForCausalLM.from_pretrained(out.parent / "base")  # noqa: E731
    run_stage(tmp_path / "other", llama_lora(target_modules=["o_proj"]), build=build)
    found = {"chat": out / "chat", "other": tmp_path / "other"}
    view = open_view(tmp_path / "other", directories=found)
    view.show("chat")
    assert same(view, out, "chat")
    view.show(None)
    assert same(view, out, None)


def test_what_was_trained_whole_is_switched_too(tmp_path: Path, out: Path) -> None:
    build = lambda: AutoModelForCausalLM.from_pretrained(out.parent / "base")  # noqa: E731
    first = llama_lora(modules_to_save=["lm_head"])
    run_stage(tmp_path / "a", first, build=build)
    run_stage(tmp_path / "b", llama_lora(), parent=tmp_path / "a", mode="stack", build=build)
    view = open_view(tmp_path / "b")
    for stage in ("a", None, "b"):
        view.show(stage)
        wanted = build().eval()
        if stage:
            wanted = PeftModel.from_pretrained(wanted, tmp_path / stage).eval()
        assert distance(answer(view.model), answer(wanted)) < 1e-5


def test_a_stage_that_does_not_answer_as_recorded_is_refused_and_nothing_changes(
    out: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    from tests.stages.verifying import changed

    shutil.rmtree(folder / "chat")
    changed(out / "chat", folder / "chat", lambda t: {k: x * 1.5 for k, x in t.items()})
    view = open_view(folder / "dpo")
    with pytest.raises(VerificationError, match="chat"):
        view.show("chat")
    assert same(view, out, "dpo")
    view.show("domain")
    assert same(view, out, "domain")
    with pytest.raises(VerificationError):
        open_view(folder / "chat")
    view = open_view(folder / "chat", how=Opening(verify=False))
    assert not view.verified
    assert view.chains == {"chat": ("domain", "chat")}


def test_another_base_is_refused(out: Path, tmp_path: Path) -> None:
    models.tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(VerificationError, match="base"):
        open_view(out / "chat", how=Opening(base=str(tmp_path / "other")))
    view = open_view(out / "chat", how=Opening(base=str(tmp_path / "other"), verify=False))
    assert view.base == str(tmp_path / "other")


def test_unknown_stages_models_that_do_not_write_and_missing_tokenizers(
    out: Path, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="choose 'domain'"):
        open_view(out / "dpo", "domian")
    view = open_view(out / "domain")
    with pytest.raises(StageError, match="'dpo'"):
        view.show("dpo")
    assert same(view, out, "domain")
    models.tiny_bert_classifier().save_pretrained(tmp_path / "bert")
    from transformers import AutoModelForSequenceClassification

    from lamina.config import LoraConfig

    build = lambda: AutoModelForSequenceClassification.from_pretrained(  # noqa: E731
        tmp_path / "bert"
    )
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    run_stage(tmp_path / "reward", config, build=build)
    with pytest.raises(StageError, match="SEQ_CLS: it doesn't write"):
        open_view(tmp_path / "reward")
    models.tiny_llama().save_pretrained(tmp_path / "bare")
    build = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "bare")  # noqa: E731
    run_stage(tmp_path / "silent", llama_lora(), build=build)
    with pytest.raises(MissingFileError, match="no tokenizer"):
        open_view(tmp_path / "silent")
    with pytest.raises(LaminaError, match="There is no tokenizer in"):
        open_view(tmp_path / "silent", how=Opening(tokenizer=tmp_path / "nowhere"))
    view = open_view(tmp_path / "silent", how=Opening(tokenizer=out.parent / "base"))
    assert len(view.tokenizer) == models.VOCABULARY
