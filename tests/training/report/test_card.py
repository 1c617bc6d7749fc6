from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from lamina.training.report import ReportResult, write_report
from lamina.training.report.card import MARK, fenced, is_hub_name, markdown
from tests.stages import chains
from tests.training.report import hostile, made


def card_in(text: str) -> ModelCard:
    """As the hub's client reads it, which raises where the metadata are broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ModelCard(text, ignore_metadata_errors=False)


@pytest.fixture(scope="module")
def text(reported: ReportResult) -> str:
    return reported.card.read_text(encoding="utf-8")


def table_below(text: str, heading: str) -> list[list[str]]:
    part = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_metadata_are_what_the_hub_asks_for(text: str) -> None:
    data = card_in(text).data
    assert data.base_model == made.BASE
    assert data["base_model_relation"] == "adapter"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["continued-pretraining", "dpo", "lamina", "lora", "sft"]


def test_evals_are_a_model_index(text: str) -> None:
    written = yaml.safe_load(text.split("---\n")[1])
    name, results = model_index_to_eval_results(written["model-index"])
    assert name == "assistant"
    told = {(each.dataset_name, each.metric_type): each.metric_value for each in results}
    assert told[("docs", "loss")] == 2.941
    assert told[("docs", "perplexity")] == pytest.approx(18.934772)
    assert told[("facts", "exact_match")] == 0.42
    assert {each.task_type for each in results} == {"text-generation"}


def test_reading_and_writing_it_changes_nothing(text: str) -> None:
    card = card_in(text)
    again = card_in(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert again.text == card.text


def test_only_what_lies_on_the_hub_is_a_dataset(tmp_path: Path, finished: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)

    def on_hub(record: dict[str, Any]) -> None:
        sources = record["stages"][-1]["data"]["sources"]
        sources[1]["hub"] = True
        # A folder whose path looks like a name.
        sources[0] |= {"path": "data/dialogues", "hub": False}

    chains.rewrite_record(run / "chat", on_hub)
    data = card_in(write_report(run).card.read_text()).data
    assert data.datasets == ["acme/dialogues"]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("acme/tiny-llama", True),
        ("gpt2", True),
        ("/models/llama", False),
        ("./llama", False),
        ("~/llama", False),
        ("a/b/c", False),
        ("C:\\llama", False),
        ("", False),
        (None, False),
    ],
)
def test_names_of_the_hub_are_no_paths(name: str | None, is_one: bool) -> None:
    assert is_hub_name(name) is is_one


def test_a_base_on_a_disk_is_in_no_metadata(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run", made.CHAIN[:1], adapters=False, base="/home/ada/secret")
    text = write_report(run).card.read_text()
    assert card_in(text).data.base_model is None
    assert "secret" not in text
    assert "`BASE` its base model" in text


def test_the_body_has_evals_and_settings(text: str) -> None:
    assert table_below(text, "Evals")[0] == [
        "eval", "base", "domain", "chat", "slang", "prefer", "gain", "forgetting",
    ]  # fmt: skip
    assert table_below(text, "Evals")[2] == [
        "docs (loss, lower is better)", "3.214", "2.861", "2.934", "3.804 (rolled back)", "2.941",
        "+0.273", "0.080",
    ]  # fmt: skip
    assert table_below(text, "Lineage")[4][:4] == [
        "prefer", "dpo", "continues chat", "rank 4 of chat",
    ]  # fmt: skip
    assert ["learning_rate", "0.0002", "0.0001", "–", "5e-06"] in table_below(text, "Settings")
    assert "slang cost more than its gate allows and is no part of this adapter." in text


def test_the_body_says_how_to_use_it_anywhere(text: str) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)\n```", text, re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python", "python", "sh", "sh"]
    for language, code in blocks:
        if language == "python":
            compile(code, "card", "exec")
    assert blocks[3][1].splitlines()[1] == (
        "vllm serve acme/tiny-llama --enable-lora --max-lora-rank 16 --lora-modules prefer=PATH"
    )


def test_a_reward_model_is_used_as_one(tmp_path: Path) -> None:
    stages = (replace(made.CHAIN[0], method="reward"),)
    text = write_report(made.write_run(tmp_path / "run", stages, adapters=False)).card.read_text()
    assert card_in(text).data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in text
    assert "vllm" not in text


@pytest.mark.parametrize(
    ("failure", "standing"), [("rollback", "rolled back"), ("stop", "refused")]
)
def test_scores_of_the_base_are_no_results_of_a_run_that_came_to_nothing(
    tmp_path: Path, failure: str, standing: str
) -> None:
    assert made.REFUSED.gate is not None
    refused = replace(made.REFUSED, gate=replace(made.REFUSED.gate, on_failure=failure))
    run = made.write_run(tmp_path / "run", (refused,), adapters=False)
    text = write_report(run).card.read_text(encoding="utf-8")
    assert not ModelCard(text).data.eval_results
    assert f"| 3.214 | 3.804 ({standing}) |" in text


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    text = write_report(hostile.write_run(tmp_path)).card.read_text(encoding="utf-8")
    card = card_in(text)
    assert card.data.base_model is None
    assert "datasets" not in text.split("---\n")[1]
    body = card.text.partition(MARK)[2]
    for line in _outside_of_code(body):
        assert not re.search(r"(?<!\\)<(?!!--)", line), line
        assert not re.search(r"(?<!\\)\]\((?!https://huggingface\.co/)", line), line
        assert "://" not in line
    lengths = {len(row) for row in table_below(body, "Settings")}
    assert len(lengths) == 1


def _outside_of_code(body: str) -> list[str]:
    found, fence = [], ""
    for line in body.splitlines():
        ticks = re.match("`{3,}", line)
        if fence:
            fence = "" if line == fence else fence
        elif ticks:
            fence = ticks[0]
        else:
            found.append(line)
    assert not fence
    return found


def test_markdown_keeps_plain_words_and_breaks_what_is_none() -> None:
    assert markdown("lora_r 8, a (b): c → d") == "lora_r 8, a (b): c → d"
    assert markdown("a | *b* <i> [x](y)\n# z") == "a &#124; \\*b\\* &lt;i&gt; \\[x\\](y) # z"
    assert markdown("# a") == "\\# a"
    assert markdown("https://x www.x.y @z") == "https&#58;//x www&#46;x.y &#64;z"
    assert fenced("a\n```\nb", "sh") == "````sh\na\n```\nb\n````"
