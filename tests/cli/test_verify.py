"""`lamina verify`: its exit codes, its figures, and the cause in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lamina import LoraConfig, begin_stage, load, save_stage
from tests import adapters, models
from tests.cli.made import lamina

CONFIG = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
)


def words(prefix: str = "w") -> PreTrainedTokenizerFast:
    vocabulary = {f"{prefix}{index}": index for index in range(models.VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=f"{prefix}0"))
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, a stage over it, the two merged, another base and tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    models.tiny_llama().save_pretrained(folder / "base")
    words().save_pretrained(folder / "base")
    words("v").save_pretrained(folder / "words")
    models.tiny_llama(seed=1).save_pretrained(folder / "other")
    model = begin_stage(
        AutoModelForCausalLM.from_pretrained(folder / "base"), name="sft", config=CONFIG
    )
    adapters.fill(model, "sft")
    save_stage(model, folder / "sft", tokenizer=words())
    load(folder / "sft").merge_and_unload().save_pretrained(folder / "merged")
    adapters.llama_adapter().save_pretrained(str(folder / "plain"))
    return folder


def test_an_honest_stage(runs: Path) -> None:
    done = lamina("verify", runs / "sft")
    assert done.exit_code == 0, done.output
    assert f"{runs / 'sft'}  verified: it answers as when it was saved" in done.stdout
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "base alone" in lines["answers, beside the record"]
    assert "base and adapter" in lines["answers, beside the record"]
    assert "at most" in lines["largest difference"]
    assert lines["same first choice"].count("100%") == 2
    assert "KL divergence, nats" in lines
    assert "FAILED" not in done.output
    assert "cause" not in done.output


def test_json(runs: Path) -> None:
    done = lamina("verify", runs / "sft", "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["passed"] is told["proved"] is True
    assert told["answers"]["max_difference"] <= told["answers"]["tolerance"]
    assert told["answers"]["top1_agreement"] == 1.0
    assert told["answers"]["kl"] < 1e-6
    assert told["stages"] == ["sft"]
    assert told["causes"] == []
    assert {check["name"] for check in told["checks"]} == {
        "record",
        "weights",
        "tokenizer",
        "base",
        "base answers",
        "answers",
        "effect",
    }


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--base", "other"], "another base"),
        (["--base", "merged"], "base already merged"),
        (["--tokenizer", "words"], "another tokenizer"),
    ],
)
def test_a_fault_ends_with_1_and_its_cause(runs: Path, options: list[str], cause: str) -> None:
    words = [options[0], runs / options[1]]
    done = lamina("verify", runs / "sft", *words, "--json")
    assert done.exit_code == 1, done.output
    told = json.loads(done.stdout)
    assert [each["kind"] for each in told["causes"]] == [cause]
    shown = lamina("verify", runs / "sft", *words, columns=200)
    assert shown.exit_code == 1
    assert f"{runs / 'sft'}  FAILED" in shown.stdout
    text = " ".join(shown.stdout.split())
    assert f"Likeliest cause: {told['causes'][0]['sentence']}." in text
    assert f"To mend it: {told['causes'][0]['cure']}" in shown.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_dtypes(runs: Path, dtype: str) -> None:
    done = lamina("verify", runs / "sft", "--dtype", dtype, "--json")
    assert done.exit_code == 0, done.output
    judged = json.loads(done.stdout)["answers"]["judged_by"]
    assert judged == ("float32" if dtype == "auto" else dtype)


def test_a_plain_adapter_is_not_proved(runs: Path) -> None:
    done = lamina("verify", runs / "plain", "--base", runs / "base")
    assert done.exit_code == 0, done.output
    assert "not proved: nothing is wrong, but no answers are on record" in done.stdout
    strict = lamina("verify", runs / "plain", "--base", runs / "base", "--require-proof")
    assert strict.exit_code == 1
    assert strict.stdout == done.stdout


def test_what_cannot_be_read_ends_with_2(runs: Path, tmp_path: Path) -> None:
    done = lamina("verify", tmp_path)
    assert done.exit_code == 2
    assert "error: " in done.stderr
    done = lamina("verify", runs / "sft", "--base", tmp_path / "nowhere")
    assert done.exit_code == 2
    assert "To mend it: " in done.stderr
    done = lamina("verify", runs / "sft", "--tokenizer", tmp_path / "nowhere")
    assert done.exit_code == 2
    assert "There is no tokenizer in" in done.stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_terminal(runs: Path, columns: int) -> None:
    done = lamina("verify", runs / "sft", "--base", runs / "merged", columns=columns)
    # Paths in tables are folded; a cure is one line, to be copied.
    lines = [line for line in done.stdout.splitlines() if "To mend it" not in line]
    assert max(map(len, lines[1:])) <= columns


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from lamina.cli import app; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(app, ['verify', '--help']).exit_code == 0; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
