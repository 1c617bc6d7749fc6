"""`lamina preview`: what is printed, in a pipe and in colours, and as JSON."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from tests.cli.made import lamina
from tests.training.data.written import jsonl, said

BASE = str(files("lamina") / "demo" / "base")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}: {% endif %}{% endfor %}"
)


def plan(folder: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    """A plan on the shipped base, whose stages' data lie beside it."""
    talk = [
        {"messages": [said("user", f"ask {i}"), said("assistant", f"say {i}")], "id": i}
        for i in range(10)
    ]
    jsonl(folder / "talk.jsonl", talk)
    pairs = [{"prompt": f"ask {i}", "chosen": " good", "rejected": " bad"} for i in range(4)]
    jsonl(folder / "pairs.jsonl", pairs)
    made = {
        "model_name_or_path": BASE,
        "output_dir": "runs",
        "chat_template": TEMPLATE,
        "stages": [
            {**stage, **({"mode": "stack"} if number else {})}
            for number, stage in enumerate(stages)
        ],
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


CHAT = {
    "name": "chat",
    "method": "sft",
    "datasets": "talk.jsonl",
    "assistant_only_loss": True,
    "eval_fraction": 0.2,
}
PREFER = {"name": "prefer", "method": "dpo", "datasets": "pairs.jsonl"}


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_shows_format_counts_lengths_and_what_is_learnt(tmp_path: Path) -> None:
    answer = lamina("preview", plan(tmp_path, CHAT, PREFER), "--rows", 1)
    text = squeezed(answer.stdout)
    assert answer.exit_code == 0
    assert "chat sft on messages trainer gets messages an epoch 8 examples" in text
    assert "evaluation 2 examples" in text
    assert "talk.jsonl messages 8 2 100% id" in text
    assert re.search(r"  ask (\d):\[\[ say \1<\|end\|>\]\]\n", answer.stdout)
    assert "prefer dpo on preference trainer gets prompt, chosen, rejected" in text
    assert "example 1, chosen" in text
    assert "ask 0[[ good<|end|>]]" in answer.stdout
    assert "ask 0[[ bad<|end|>]]" in answer.stdout
    assert "example 2" not in text


def test_lengths_and_shares_are_counted_in_tokens(tmp_path: Path) -> None:
    path = plan(tmp_path, PREFER, defaults={"max_length": 4})
    answer = json.loads(lamina("preview", path, "--json").stdout)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    sizes = [
        max(len(tokenizer(f"ask {i} {word}<|end|>").input_ids) for word in ("good", "bad"))
        for i in range(4)
    ]
    lengths = answer["stages"][0]["lengths"]
    assert (lengths["shortest"], lengths["longest"]) == (min(sizes), max(sizes))
    assert lengths["too_long"] == sum(size > 4 for size in sizes) > 0
    assert lengths["measured"] == 4
    examples = answer["stages"][0]["examples"]
    assert len(examples) == 2
    spans = [span for example in examples for part in example.values() for span in part]
    assert {span["trained"] for span in spans} == {True, False}
    size = sum(span["tokens"] for span in examples[0]["chosen"])
    assert size <= 4


def test_one_stage_and_settings_over_the_plan(tmp_path: Path) -> None:
    path = plan(tmp_path, CHAT, PREFER)
    words = ("prefer", "stages.prefer.method=reward", "--json")
    (stage,) = json.loads(lamina("preview", path, *words).stdout)["stages"]
    assert (stage["name"], stage["method"]) == ("prefer", "reward")
    assert stage["lengths"]["trained"] == stage["lengths"]["tokens"]
    answer = lamina("preview", path, "prefr")
    assert answer.exit_code == 2
    assert "did you mean 'prefer'?" in answer.stderr


def test_colours_on_a_terminal_brackets_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plan(tmp_path, PREFER)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    coloured = lamina("preview", path, "--rows", 1).stdout
    assert "[[" not in coloured
    assert "\x1b[1;32m good<|end|>" in coloured
    assert "\x1b[2mask 0" in coloured
    assert "ask 0[[ good<|end|>]]" in lamina("preview", path, "--rows", 1, "--no-color").stdout


def test_control_characters_of_data_stay_off_the_terminal(tmp_path: Path) -> None:
    path = plan(tmp_path, {"name": "domain", "method": "pt", "datasets": "text.jsonl"})
    jsonl(tmp_path / "text.jsonl", [{"text": "red \x1b[31m text"}])
    text = lamina("preview", path).stdout
    assert "\x1b" not in text
    assert "\\u001b" in text


def test_an_end_of_a_prompt_that_is_lost_is_told(tmp_path: Path) -> None:
    path = plan(tmp_path, PREFER)
    pairs = [{"prompt": f"ask {i} ", "chosen": "good", "rejected": "bad"} for i in range(4)]
    jsonl(tmp_path / "pairs.jsonl", pairs)
    text = squeezed(lamina("preview", path).stdout)
    assert "in 4 of 4 examples the end of the prompt is left out, such as ' '" in text


def test_errors_of_the_data_end_it_with_one_message(tmp_path: Path) -> None:
    path = plan(tmp_path, {**CHAT, "datasets": "tolk.jsonl"})
    answer = lamina("preview", path)
    assert answer.exit_code == 2
    assert answer.stdout == ""
    assert "There is no tolk.jsonl" in answer.stderr
    assert "'talk.jsonl'" in answer.stderr


def test_streaming_data_has_no_length(tmp_path: Path) -> None:
    data = {"path": "talk.jsonl", "streaming": True}
    stage = {"name": "chat", "method": "sft", "datasets": [data], "max_steps": 3}
    text = squeezed(lamina("preview", plan(tmp_path, stage)).stdout)
    assert "an epoch streaming: not known" in text
    assert "talk.jsonl messages ? - ? id" in text
    assert "the first 10 examples" in text


def test_packing_is_told(tmp_path: Path) -> None:
    stage = {**CHAT, "packing": True}
    text = squeezed(lamina("preview", plan(tmp_path, stage)).stdout)
    assert "packing (bfd): several examples share a sequence" in text
