"""`lamina flatten`, `lamina split` and `lamina edit`: what they print, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lamina.stages import lineage
from tests import models
from tests.cli.made import lamina, write_chain
from tests.stages.chains import answer, distance, llama_lora, open_with_peft, run_chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages over a saved base, with ranks 4 and 6 in the value projections."""
    folder = tmp_path_factory.mktemp("chain")
    models.tiny_llama().save_pretrained(folder / "base")
    stages = [
        ("domain", None, llama_lora()),
        ("chat", "stack", llama_lora(r=6, lora_alpha=6, target_modules=["v_proj", "o_proj"])),
        ("polish", "continue", None),
    ]
    _, path = run_chain(
        folder, stages, build=lambda: AutoModelForCausalLM.from_pretrained(folder / "base")
    )
    return path


def test_flatten_exactly(chain: Path, tmp_path: Path) -> None:
    done = lamina("flatten", chain, "-o", tmp_path / "flat")
    assert done.exit_code == 0, done.output
    assert "one adapter, exact" in done.stdout
    assert "domain → chat → polish" in done.stdout
    assert "on the probe" not in done.stdout
    expected = answer(open_with_peft(chain))
    assert distance(answer(open_with_peft(tmp_path / "flat")), expected) < 1e-6
    assert lamina("verify", tmp_path / "flat", "--base", chain.parent / "base").exit_code == 0


def test_flatten_to_fewer_ranks(chain: Path, tmp_path: Path) -> None:
    done = lamina(
        "flatten", chain, "-o", tmp_path / "a", "--rank", 5, "-b", chain.parent / "base", "--json"
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["exact"] is False
    assert told["stages"] == ["domain", "chat", "polish"]
    value = told["modules"]["model.layers.0.self_attn.v_proj"]
    assert (value["rank_before"], value["rank"]) == (10, 5)
    assert 0 < value["relative_error"] < 1
    assert 0 < told["relative_error"] < value["relative_error"]
    assert told["probe"]["max_difference"] > 0
    shown = lamina("flatten", chain, "-o", tmp_path / "b", "--rank", 5, "-b", chain.parent / "base")
    assert f"relative error {told['relative_error']:.3g}" in shown.stdout
    assert "10 → 5" in shown.stdout
    assert f"largest difference {told['probe']['max_difference']:.3g}" in shown.stdout.replace(
        "\n", " "
    )


def test_flatten_some_stages(chain: Path, tmp_path: Path) -> None:
    done = lamina("flatten", chain, "-o", tmp_path / "part", "--stages", "polish ")
    assert done.exit_code == 0, done.output
    assert "left out  domain" in done.stdout
    assert lineage(tmp_path / "part").left_out == ("domain",)
    shown = lamina("lineage", tmp_path / "part").stdout
    assert "without domain, left out of this file" in shown
    done = lamina("flatten", chain, "-o", tmp_path / "x", "--stages", "chat,dmain", "--rank", 0)
    assert done.exit_code == 2
    assert "did you mean 'domain'?" in done.stderr
    assert "'chat' has no ranks of its own any more" in done.stderr
    assert "rank=0" in done.stderr
    assert "To mend it" in done.stderr


def test_lineage_of_what_was_flattened(chain: Path, tmp_path: Path) -> None:
    lamina("flatten", chain, "-o", tmp_path / "flat", "--energy", 0.9)
    shown = lamina("lineage", tmp_path / "flat").stdout
    assert shown.count("flattened: its ranks are in those of polish") == 2
    assert "in 6 modules holds domain, chat, polish as one; compressed, error 0." in shown
    rows = lamina("inspect", tmp_path / "flat").stdout.splitlines()
    (domain,) = (row.split() for row in rows if row.startswith("domain"))
    assert domain[2:4] == ["-", "-"]


def test_lineage_of_one_stage_that_was_compressed(chain: Path, tmp_path: Path) -> None:
    lamina("flatten", chain, "-o", tmp_path / "flat", "--stages", "domain", "--rank", 2)
    shown = lamina("lineage", tmp_path / "flat").stdout
    assert "added rank 2 to 4 modules (q_proj, v_proj); compressed, error 0." in shown


def test_split(chain: Path, tmp_path: Path) -> None:
    done = lamina("split", chain, "-o", tmp_path / "parts", columns=80)
    assert done.exit_code == 0, done.output
    assert "2 adapters, whose sum is the" in " ".join(done.stdout.split())
    assert "base → domain" in done.stdout
    assert "has polish's values of the ranks that chat trained before" in done.stdout
    assert {folder.name for folder in (tmp_path / "parts").iterdir()} == {"domain", "polish"}
    told = json.loads(lamina("split", chain, "-o", tmp_path / "again", "--json").stdout)
    assert [part["stage"] for part in told["parts"]] == ["domain", "polish"]
    assert told["parts"][1]["made_by"] == ["chat", "polish"]
    done = lamina("split", chain, "-o", tmp_path / "parts")
    assert done.exit_code == 2
    assert "is not empty" in done.stderr


def test_edit(tmp_path: Path) -> None:
    path = write_chain(tmp_path / "run")
    done = lamina("edit", path, "--rename", "chat=talk")
    assert done.exit_code == 0, done.output
    assert "chat is now talk" in done.stdout
    assert lineage(path).newest.name == "talk"
    told = json.loads(lamina("edit", path, "--drop-last", "-o", tmp_path / "less", "--json").stdout)
    assert told["stages"] == ["domain", "more"]
    assert told["dropped"] == "talk"
    assert lineage(path).newest.name == "talk"
    done = lamina("edit", tmp_path / "less", "--drop-last")
    assert done.exit_code == 2
    assert "'more' went on training ranks" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--drop-last", "--rename", "a=b"],
        ["--rename", "chat"],
        ["--rename", "=b"],
        ["--rename", "chat="],
        ["--rename", "chta=talk"],
        ["--rename", "chat=../talk"],
    ],
)
def test_an_edit_that_says_nothing_or_too_much(tmp_path: Path, words: list[str]) -> None:
    path = write_chain(tmp_path / "run")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    done = lamina("edit", path, *words)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "To mend it" in done.stderr
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
