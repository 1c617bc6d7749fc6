"""`lamina init`: a plan to begin with."""

from __future__ import annotations

import json
from pathlib import Path

from lamina.training.plan import json_schema, read_plan
from tests.cli.made import lamina


def test_writes_a_plan_and_its_schema(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    asked = ["init", file, "-m", "base", "--stages", "pt, dpo", "-d", "a.txt", "-d", "b.jsonl"]
    done = lamina(*asked, "--schema")
    assert "next: lamina validate" in done.stdout
    plan = read_plan(file)
    assert [(each.method, each.mode) for each in plan.stages] == [("pt", None), ("dpo", "stack")]
    assert file.read_text().startswith("# yaml-language-server: $schema=plan.schema.json\n")
    assert json.loads((tmp_path / "plan.schema.json").read_text()) == json_schema()
    before = file.read_bytes()
    refused = lamina(*asked)
    assert refused.exit_code == 2
    assert "is there already" in refused.stderr
    assert file.read_bytes() == before
    assert json.loads(lamina(*asked, "--force", "--json").stdout)["stages"] == [
        "domain",
        "preference",
    ]


def test_says_what_it_would_have_asked_for(tmp_path: Path) -> None:
    refused = lamina("init", tmp_path / "plan.yaml")
    assert refused.exit_code == 2
    assert "--model is missing, and there is no terminal to ask at" in refused.stderr
    assert not any(tmp_path.iterdir())
