"""`lamina init`: a plan to begin with."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
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


def test_asks_at_a_terminal_for_what_the_options_do_not_say(tmp_path: Path) -> None:
    """A real one: what is typed there is taken, and a default by the return key alone."""
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "lamina", "init", str(tmp_path / "plan.yaml")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    said = b""
    for question, answer in (
        (b"Base model", "models/small\n"),
        (b"Stages", "\n"),
        (b"Data of stage 1 (pt)", "manual.txt\n"),
        (b"Data of stage 2 (sft)", "talks.jsonl\n"),
    ):
        while question not in said:
            said += os.read(ours, 1024)
        os.write(ours, answer.encode())
    assert running.wait(timeout=60) == 0
    os.close(ours)
    plan = read_plan(tmp_path / "plan.yaml")
    assert plan.model_name_or_path == "models/small"
    assert [(each.method, (each.datasets or [])[0].path) for each in plan.stages] == [
        ("pt", "manual.txt"),
        ("sft", "talks.jsonl"),
    ]
