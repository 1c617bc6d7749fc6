"""Answers side by side: measured now, or recorded by a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamina.errors import DataError, RunError, StageError
from lamina.model import PeftModel
from lamina.training.conversing.compared import recorded
from lamina.training.conversing.comparing import compare
from lamina.training.conversing.prompts import prompts_of, read_prompts
from lamina.training.evaluate.answers import answers
from lamina.training.plan.schema import Prompt
from tests.training.conversing.talking import make_run, tokenizer, write_answers, write_state

PROMPTS = [Prompt(text="w5 w6 w7", max_new_tokens=5), Prompt(text="w9", max_new_tokens=3)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def model_of(out: Path, stage: str) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(out.parent / "base").eval()
    return base if stage == "base" else PeftModel.from_pretrained(base, out / stage).eval()


def test_all_answer_all_and_differ_as_their_logits_do(out: Path) -> None:
    found = compare(out / "dpo", PROMPTS)
    assert found.asked == ("base", "domain", "chat", "dpo")
    assert not found.recorded
    models = {name: model_of(out, name) for name in found.asked}
    for place, prompt in enumerate(PROMPTS):
        told = found.prompts[place]
        assert told.prompt == prompt.text
        ids = torch.tensor([[11, *tokenizer()(prompt.text)["input_ids"], 12]])
        before = None
        for each in told.answers:
            model = models[each.stage]
            (alone,) = answers([prompt], model, tokenizer(), batch_size=1)
            assert (each.text, each.tokens, each.ended) == (alone.text, alone.tokens, alone.ended)
            with torch.no_grad():
                now = model(input_ids=ids).logits[0].double().softmax(-1)
            if before is None:
                assert (each.agreement, each.kl) == (None, None)
            else:
                kl = (before * (before.log() - now.log())).sum(-1).mean()
                same = (before.argmax(-1) == now.argmax(-1)).double().mean()
                assert each.kl == pytest.approx(float(kl), rel=1e-3)
                assert each.agreement == pytest.approx(float(same))
                assert each.kl > 1e-4
            before = now


def test_only_some_in_the_order_asked_for(out: Path) -> None:
    found = compare(out / "dpo", PROMPTS[:1], stages=["dpo", "base"])
    assert found.asked == ("dpo", "base")
    whole = compare(out / "dpo", PROMPTS[:1])
    by_name = {each.stage: each.text for each in whole.prompts[0].answers}
    assert [(e.stage, e.text) for e in found.prompts[0].answers] == [
        ("dpo", by_name["dpo"]),
        ("base", by_name["base"]),
    ]
    with pytest.raises(StageError, match="choose 'chat'"):
        compare(out / "dpo", PROMPTS, stages=["chta"])


def test_a_run_is_compared_by_its_chain_and_what_was_refused_on_demand(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    write_state(out, rolled_back=("dpo",))
    assert compare(out, PROMPTS[1:]).asked == ("base", "domain", "chat")
    found = compare(out, PROMPTS[1:], stages=["chat", "dpo"])
    assert found.asked == ("chat", "dpo")
    assert found.notes == ("dpo was refused by its gate: no later stage is built on it",)


def test_a_stage_that_is_no_language_model_is_not_asked(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    write_state(out)
    config = json.loads((out / "dpo" / "adapter_config.json").read_text())
    config["task_type"] = "SEQ_CLS"
    (out / "dpo" / "adapter_config.json").write_text(json.dumps(config))
    found = compare(out, PROMPTS[1:])
    assert found.asked == ("base", "domain", "chat")
    assert found.notes == ("dpo is no language model: it wasn't asked",)


def test_prompts_that_can_not_be_asked_are_all_named(out: Path) -> None:
    with pytest.raises(DataError, match="no prompts"):
        compare(out / "dpo", [])
    long = Prompt(text="w5 " * 130)
    with pytest.raises(DataError, match="too long") as caught:
        compare(out / "dpo", [long, PROMPTS[0], long])
    assert [fault.partition(" has")[0] for fault in caught.value.faults] == ["prompt 1", "prompt 3"]


def test_what_a_run_recorded_is_told_without_torch(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    assert recorded(folder) is None
    write_state(folder, rolled_back=("dpo",))
    assert recorded(folder) is None
    texts = {name: [f"{name} one", f"{name} two"] for name in ("base", "domain", "chat", "dpo")}
    write_answers(folder, texts, ["w5", "w6"])
    found = recorded(folder)
    assert found is not None
    assert found.recorded
    assert found.asked == ("base", "domain", "chat")
    assert [each.prompt for each in found.prompts] == ["w5", "w6"]
    assert [each.text for each in found.prompts[1].answers] == [
        "base two",
        "domain two",
        "chat two",
    ]
    some = recorded(folder, ["dpo", "base"])
    assert some is not None
    assert [each.text for each in some.prompts[0].answers] == ["dpo one", "base one"]
    with pytest.raises(RunError, match="'chta'") as caught:
        recorded(folder, ["chta"])
    assert "did you mean 'chat'" in caught.value.faults[0]
    code = (
        "import sys; from lamina.training.conversing.compared import recorded;"
        f"assert recorded({str(folder)!r}).asked; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_of_files(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\n  two {x}\n")
    assert read_prompts(lines, max_new_tokens=9, chat=None) == [
        Prompt(text="one", max_new_tokens=9),
        Prompt(text="  two {x}", max_new_tokens=9),
    ]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a", "max_new_tokens": 3}\n"b"\n{"text": "c", "chat": false}\n')
    assert read_prompts(rows, max_new_tokens=9) == [
        Prompt(text="a", max_new_tokens=3),
        Prompt(text="b", max_new_tokens=9),
        Prompt(text="c", max_new_tokens=9, chat=False),
    ]
    rows.write_text('{"other": 1}\n{"text": 3}\n[1]\n{broken\n{"text": "c", "tokens": 3}\n"ok"\n')
    with pytest.raises(DataError, match="no prompts") as caught:
        read_prompts(rows)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        f"line {number}" for number in (1, 2, 3, 4, 5)
    ]
    lines.write_text("\n")
    with pytest.raises(DataError, match="has no prompts"):
        read_prompts(lines)
    with pytest.raises(DataError, match="can't be read"):
        read_prompts(tmp_path / "nowhere")
    with pytest.raises(DataError, match="prompt 2: text"):
        prompts_of(["a", ""])


def test_prompts_of_the_same_text_are_told_apart(tmp_path: Path) -> None:
    # As a plan has them that asks for a long and a short answer.
    write_state(tmp_path)
    texts = {name: [f"{name} one", f"{name} two"] for name in ("base", "domain", "chat", "dpo")}
    write_answers(tmp_path, texts, ["w5", "w5"])
    found = recorded(tmp_path)
    assert found is not None
    assert [[each.text for each in prompt.answers] for prompt in found.prompts] == [
        ["base one", "domain one", "chat one", "dpo one"],
        ["base two", "domain two", "chat two", "dpo two"],
    ]


def test_a_broken_state_is_an_error(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    write_state(folder)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match="can't be read"):
        recorded(folder)
