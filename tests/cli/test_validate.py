"""`lamina validate`: a table of stages, or all faults with their lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models
from tests.cli.made import lamina
from tests.ecosystem import texts

PLAN = """\
model_name_or_path: base
output_dir: runs
defaults: {lora_r: 2, max_length: 32}
stages:
  - {name: domain, method: pt, datasets: plain.txt}
  - {name: more, method: pt, mode: stack, datasets: plain.txt, lora_target_modules: [v_proj]}
"""


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    texts.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "plain.txt").write_text("\n\n".join(texts.sentence(row) for row in range(5)))
    (tmp_path / "plan.yaml").write_text(PLAN)
    monkeypatch.chdir(tmp_path)


def test_shows_what_each_stage_would_train_and_that_it_can_be_run() -> None:
    done = lamina("validate", "plan.yaml", "stages.more.lora_r=4")
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "stage mode method rank layers trains examples steps" in text
    assert "domain fresh pt 2 14" in text
    # Two layers; A is 4 x 32, and B 16 x 4, since the values have half the heads.
    assert f"more stack pt 4 2 {2 * 4 * (32 + 16)}" in text
    assert text.endswith("ready to run")
    told = json.loads(lamina("validate", "plan.yaml", "--json").stdout)
    assert told["ready"]
    assert [stage["name"] for stage in told["stages"]] == ["domain", "more"]
    assert {need["what"]: need["bytes"] > 0 for need in told["needs"]} == {
        "memory": True,
        "disk": True,
    }


def test_ends_with_all_faults() -> None:
    changes = ["stages.more.lora_target_modules=[v_prj]", "stages.domain.datasets=none.txt"]
    done = lamina("validate", "plan.yaml", *changes)
    assert done.exit_code == 2
    assert "ready" not in done.stdout
    assert "'v_prj' matched 0 modules" in done.stderr
    assert "There is no none.txt" in done.stderr
    assert lamina("validate", "plan.yaml", *changes, "--json").exit_code == 2


def test_a_plan_that_says_nonsense_is_told_so_without_torch(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.replace("method: pt,", "method: ptt,"))
    code = (
        "import sys; from lamina.cli import app; from typer.testing import CliRunner; "
        "done = CliRunner().invoke(app, ['validate', 'plan.yaml']); "
        "assert done.exit_code == 2, done; assert done.stderr.count('did you mean') == 2; "
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
