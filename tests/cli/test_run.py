"""`lamina run`, `lamina status`, `lamina logs`: a run from the command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lamina.amounts import duration
from lamina.cli import app
from lamina.cli.progress import View
from lamina.training.run.told import StageResult
from tests.cli.test_app import modules_after
from tests.training.run import plans

STAGES = [{"name": "a", "method": "pt"}, {"name": "b", "method": "sft", "mode": "stack"}]


def lamina_says(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder in which a plan was run, and what was said."""
    folder = tmp_path_factory.mktemp("run")
    plan = plans.write_plan(folder, STAGES)
    code, out, err = lamina_says("run", plan)
    assert code == 0, err
    return folder, out, err


def test_a_pipe_gets_a_line_for_every_event(done: tuple[Path, str, str]) -> None:
    _, out, err = done
    lines = err.splitlines()
    assert lines[0].startswith("2 stages to ")
    assert lines[1] == "a (1 of 2)"
    assert lines[2].startswith("a 1/4  loss 4.")
    assert any(line.startswith("b trained in ") for line in lines)
    assert "\x1b" not in out + err
    assert [line.split()[:3] for line in out.splitlines()[1:3]] == [
        ["a", "trained", "4"],
        ["b", "trained", "4"],
    ]


def test_the_same_command_keeps_what_is_done(done: tuple[Path, str, str]) -> None:
    code, out, err = lamina_says("run", done[0] / "plan.yaml", "--json")
    assert code == 0, err
    assert err == ""
    assert [each["status"] for each in json.loads(out)["stages"]] == ["kept", "kept"]


def test_what_is_wrong_is_one_message(done: tuple[Path, str, str]) -> None:
    code, out, err = lamina_says("run", done[0] / "plan.yaml", "stages.b.trainer_args={x: 1}")
    assert code == 2
    assert not out
    assert "SFTConfig has no such field" in err


def test_status_tells_how_far_it_is(done: tuple[Path, str, str], tmp_path: Path) -> None:
    out = done[0] / "out"
    code, said, _ = lamina_says("status", out)
    assert code == 0
    assert "no process works on it" in said
    assert [line.split()[:3] for line in said.splitlines()[3:]] == [
        ["a", "finished", "4/4"],
        ["b", "finished", "4/4"],
    ]
    told = json.loads(lamina_says("status", out, "--json")[1])
    assert [each["status"] for each in told["stages"]] == ["finished", "finished"]
    shutil.copytree(out, tmp_path / "cut")
    state = json.loads((tmp_path / "cut" / "run.json").read_text())
    state["stages"]["b"]["status"] = "running"
    (tmp_path / "cut" / "run.json").write_text(json.dumps(state))
    assert "cut off" in lamina_says("status", tmp_path / "cut")[1]
    code, _, error = lamina_says("status", tmp_path)
    assert code == 2
    assert "There is no run" in error


def test_logs_are_lines_of_stages(done: tuple[Path, str, str]) -> None:
    out = done[0] / "out"
    _, said, _ = lamina_says("logs", out)
    assert [line.split()[:2] for line in said.splitlines()] == [
        [stage, f"{step}/4"] for stage in "ab" for step in (1, 2, 3, 4)
    ]
    assert {each["stage"] for each in json.loads(lamina_says("logs", out, "b", "--json")[1])} == {
        "b"
    }
    code, _, error = lamina_says("logs", out, "c")
    assert code == 2
    assert "no stage 'c'" in error


@pytest.mark.parametrize("verb", ["status", "logs"])
def test_looking_at_a_run_imports_no_torch(verb: str, done: tuple[Path, str, str]) -> None:
    assert not {"torch", "transformers"} & modules_after(verb, done[0] / "out")


def test_the_view_of_a_terminal_fits_into_it() -> None:
    for width in (80, 120):
        out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        now = 0.0
        view = View(lambda: now)  # noqa: B023
        view.begins(["domain", "chat", "preferences"], "out")
        view.stage_begins("domain", 0, "")
        view.training_begins("domain", 0, 4)
        view.step("domain", 4, 4)
        view.stage_ends(StageResult("domain", "out/domain", "trained", "", 4, None, 65.0))
        view.stage_begins("chat", 1, "learning_rate: 0.1 -> 0.2")
        view.training_begins("chat", 2, 1000)
        view.step("chat", 3, 1000)
        now = 0.5
        view.logged("chat", 3, {"loss": 1.25, "memory": 3 << 30})
        view.logged("chat", 3, {"eval_loss": 1.5})
        out.print(view)
        lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        assert "1:05 min" in lines[0]
        assert "3/1,000" in lines[1]
        assert "loss 1.2500" in lines[1]
        assert lines[1].rstrip().endswith("2.0/s, 8:18 min left")
        assert "waiting" in lines[2]
        assert lines[3].strip() == "chat, held out: loss 1.5000   3.0 GiB of memory at most"


def test_spans_of_time_are_short() -> None:
    assert [duration(each) for each in (4.21, 200, 7500)] == ["4.2 s", "3:20 min", "2:05 h"]


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    stages = [{"name": "a", "method": "pt", "max_steps": 3000, "save_steps": 1000}]
    plan = plans.write_plan(tmp_path, stages)
    command = [sys.executable, "-m", "lamina", "run", str(plan)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "logs" / "a.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "Another run" in refused.stderr
    assert "running" in lamina_says("status", tmp_path / "out")[1]
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "Traceback" not in said
    told = json.loads(lamina_says("status", tmp_path / "out", "--json")[1])
    step = told["stages"][0]["step"]
    assert told["stages"][0]["status"] == "interrupted"
    code, out, err = lamina_says("run", plan, "stages.a.max_steps=3000", "--json")
    assert code == 0, err
    stage = json.loads(out)["stages"][0]
    assert stage["status"] == "resumed"
    assert stage["why"] == f"went on from step {step}"


def test_a_run_ends_with_a_matrix_a_report_and_what_gates_say(tmp_path: Path) -> None:
    evals = {"talks": {"datasets": "sft.jsonl"}}
    gate = {"may_lose": {"talks": "-50%"}}
    plan = plans.write_plan(tmp_path, [STAGES[1] | {"mode": None, "gate": gate}], evals=evals)
    code, out, err = lamina_says("run", plan)
    assert code == 2
    assert "b doesn't pass its gate: talks: loss " in err
    assert "error: Stage 'b' costs more than its gate allows." in err
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    rolled_back = lamina_says("run", plan, "stages.b.gate.on_failure=rollback")
    assert rolled_back[0] == 0
    assert "b was rolled back: talks: loss " in rolled_back[1]
    assert "no stage counts" in rolled_back[1]
    code, out, err = lamina_says("run", plan, "stages.b.gate.may_lose.talks=99%")
    assert code == 0, err
    assert out.split("eval   measures")[1].split()[:6] == [
        "base",
        "b",
        "gain",
        "forgotten",
        "talks",
        "loss",
    ]
    assert f"the report is {tmp_path / 'out' / 'report' / 'index.html'}" in out.replace("\n", "")
    said = lamina_says("status", tmp_path / "out")[1]
    assert "talks  loss" in said
    told = json.loads(lamina_says("status", tmp_path / "out", "--json")[1])
    assert told["matrix"]["columns"] == ["base", "b"]


def test_the_base_is_measured_when_something_else_begins() -> None:
    view = View()
    view.begins(["a"], "out")
    # With prompts alone, no score tells that it is done.
    view.judging_begins("base", [])
    assert "* base  judging" in drawn(view)
    view.stage_begins("a", 0, "")
    assert "+ base  measured" in drawn(view)
    other = View()
    other.begins(["a"], "out")
    other.judging_begins("base", ["texts", "talks"])
    other.measured("base", "texts", None)
    assert "* base  judging" in drawn(other)
    # A stage that is kept begins with its being measured.
    other.judging_begins("a", ["texts"])
    assert "+ base  measured" in drawn(other)


def drawn(view: View) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(view)
    return out.getvalue()
