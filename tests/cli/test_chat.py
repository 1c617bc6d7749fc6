"""`lamina chat`: in a pipe, at a terminal, and with what may not reach one."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from lamina.cli import app
from lamina.stages.viewed import open_view
from lamina.training.conversing.conversation import Conversation
from tests import models
from tests.cli.test_hostile_names import HOSTILE, obeyed
from tests.stages.verifying import changed
from tests.training.conversing.talking import make_run, write_state


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def chat(said: str, *arguments: object, columns: int = 120) -> Result:
    words = ["chat", *map(str, arguments)]
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, words, input=said)


def answers(out: Path, stage: str | None, *said: str, **settings: Any) -> list[str]:
    view = open_view(out / "dpo")
    view.show(stage)
    talk = Conversation(view, max_new_tokens=4, **settings)
    return [talk.say(each).text for each in said]


def test_a_pipe_is_one_conversation_and_only_answers_are_on_the_output(out: Path) -> None:
    done = chat("w5 w6\n\nw7\n", out / "dpo", "--max-new-tokens", 4)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == answers(out, "dpo", "w5 w6", "w7")
    told = [line.rstrip() for line in done.stderr.splitlines()]
    assert "stage  domain → chat → dpo" in told
    assert f"base   {out.parent / 'base'}" in told
    assert "check  it answers as when it was saved" in told


def test_commands_switch_and_forget_in_a_pipe_too(out: Path) -> None:
    said = "w5\n/stage base\n/reset\nw5\n/stage chat\n/reset\nw5\n/stage\n/quit\nw5\n"
    done = chat(said, out / "dpo", "--max-new-tokens", 4)
    assert done.exit_code == 0, done.output
    expected = [answers(out, stage, "w5")[0] for stage in ("dpo", None, "chat")]
    assert done.stdout.splitlines() == expected
    assert len(set(expected)) == 3
    assert "now none: the base alone" in done.stderr
    assert "now domain → chat\n" in done.stderr
    assert "→ chat\n" in done.stderr


def test_lines_of_json_say_who_answered_what(out: Path) -> None:
    arguments = (out / "dpo", "--stage", "domain", "--json", "--max-new-tokens", 4)
    done = chat("w5\n/stage base\nw6\n", *arguments)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["stage"], each["question"]) for each in lines] == [("domain", "w5"), (None, "w6")]
    assert lines[0]["text"] == answers(out, "domain", "w5")[0]
    assert lines[0]["tokens"] == len(lines[0]["text"].split())
    assert lines[0]["ended"] == (lines[0]["tokens"] < 4)


def test_the_base_a_system_message_and_draws(out: Path) -> None:
    base = chat("w5\n", out / "dpo", "--stage", "base", "--max-new-tokens", 4)
    assert base.stdout.splitlines() == answers(out, None, "w5")
    system = chat("w5\n", out / "dpo", "--system", "w20", "--max-new-tokens", 4)
    assert system.stdout.splitlines() == answers(out, "dpo", "w5", system="w20")
    draws = ("--temperature", 5, "--max-new-tokens", 12, "--seed")
    drawn = [chat("w5\n", out / "dpo", *draws, seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_run_is_talked_to_by_its_last_stage_that_counts(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    write_state(folder, rolled_back=("dpo",))
    done = chat("w5\n", folder, "--max-new-tokens", 4)
    assert done.exit_code == 0, done.output
    assert "stage  domain → chat" in [line.rstrip() for line in done.stderr.splitlines()]
    assert done.stdout.splitlines() == answers(folder, "chat", "w5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--stage", "domian"), "choose 'domain'"),
        (("--tokenizer", "nowhere"), "There is no tokenizer in nowhere"),
        (("--base", "nowhere"), "nowhere"),
        (("--seed", "1"), "at temperature 0 nothing is drawn"),
        (("--top-p", "0.5"), "at temperature 0 nothing is drawn"),
    ],
)
def test_what_is_wrong_ends_it_before_anything_is_said(
    out: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = chat("w5\n", out / "dpo", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr


def test_a_stage_that_does_not_verify_is_refused_unless_asked_for(
    out: Path, tmp_path: Path
) -> None:
    changed(out / "domain", tmp_path / "bent", lambda t: {k: x * 1.5 for k, x in t.items()})
    done = chat("w5\n", tmp_path / "bent", "--tokenizer", out / "domain")
    assert done.exit_code == 2
    assert "doesn't answer" in done.stderr
    assert "--no-verify goes on" in done.stderr
    done = chat("w5\n", tmp_path / "bent", "--tokenizer", out / "domain", "--no-verify")
    assert done.exit_code == 0, done.output
    assert "check  not verified" in done.stderr


def test_a_stage_that_was_trained_on_is_looked_for_beside(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "dpo", tmp_path / "dpo")
    done = chat("w5\n", tmp_path / "dpo", "--stage", "chat")
    assert done.exit_code == 2
    assert "no longer has 'chat' as it was saved: 'dpo' trained its ranks on" in done.stderr
    shutil.copytree(out / "chat", tmp_path / "chat")
    done = chat("w5\n", tmp_path / "dpo", "--stage", "chat", "--max-new-tokens", 4)
    assert done.stdout.splitlines() == answers(out, "chat", "w5")


def hostile_words() -> PreTrainedTokenizerFast:
    """A tokenizer in which almost every answer would clear the screen."""
    vocabulary = {"w5": 5} | {f"{HOSTILE}{i}": i for i in range(models.VOCABULARY) if i != 5}
    made = Tokenizer(WordLevel(vocabulary, unk_token=f"{HOSTILE}0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_written_can_not_drive_a_terminal(out: Path, tmp_path: Path, as_json: bool) -> None:
    hostile_words().save_pretrained(tmp_path)
    arguments = [out / "dpo", "--tokenizer", tmp_path, "--no-verify", "--max-new-tokens", 6]
    done = chat(f"w5\n/{HOSTILE}\n", *arguments, *(["--json"] if as_json else []))
    assert done.exit_code == 0, done.output
    assert "evil" in done.stdout
    assert obeyed(done.stdout) == []
    assert obeyed(done.stderr) == []


def test_a_hostile_name_of_a_stage_is_shown_with_escapes(out: Path) -> None:
    done = chat("", out / "dpo", "--stage", HOSTILE)
    assert done.exit_code == 2
    assert obeyed(done.stderr) == []
    done = chat(f"/stage {HOSTILE}\n", out / "dpo")
    assert done.exit_code == 2
    assert obeyed(done.stderr) == []


# --- at a terminal -------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal with a process in it, that sees what a person would see."""

    def __init__(self, columns: int, *arguments: object) -> None:
        self.seen = ""
        self._from = 0
        self.process, self._end = pty.fork()
        if self.process == 0:  # pragma: no cover
            environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
            environment.pop("COLUMNS", None)
            code = "from lamina.cli.app import main; main()"
            os.execve(
                sys.executable, [sys.executable, "-c", code, *map(str, arguments)], environment
            )
        size = struct.pack("HHHH", 40, columns, 0, 0)
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, size)

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What was written until `text` was, since the last time."""
        until = time.monotonic() + seconds
        while text not in self.seen[self._from :]:
            assert time.monotonic() < until, f"{text!r} did not come:\n{self.seen[self._from :]}"
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._end, 1 << 16).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended:\n{self.seen[self._from :]}") from None
        end = self.seen.index(text, self._from) + len(text)
        found, self._from = self.seen[self._from : end], end
        return found

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def ended(self) -> int:
        for _ in range(300):
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.process = 0
                return os.waitstatus_to_exitcode(status)
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    os.read(self._end, 1 << 16)
                except OSError:
                    time.sleep(0.1)
        raise AssertionError("it goes on")

    def close(self) -> None:
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self._end)


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    """One whose answers take a while."""
    return make_run(tmp_path, ends=False, max_position_embeddings=4096, eos_token_id=None)


@pytest.fixture
def terminal(long_run: Path) -> Iterator[Terminal]:
    made = Terminal(80, "chat", long_run / "dpo", "--max-new-tokens", 3000)
    yield made
    made.close()


@pytest.mark.slow
def test_a_conversation_at_a_terminal(terminal: Terminal) -> None:
    greeting = terminal.wait_for("> ")
    assert "domain → chat → dpo" in greeting
    assert "it answers as when it was saved" in greeting
    # Ctrl-C where nothing is answered says how to end; readline has to be there to hear it.
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.wait_for("/quit or Ctrl-D ends")
    terminal.wait_for("> ")
    terminal.type("w5 w6\n")
    # The echo of what was typed, then words long before all 3,000 tokens are there.
    terminal.wait_for("\n")
    terminal.wait_for("w", seconds=10)
    time.sleep(0.5)
    terminal.type("\x03")
    told = terminal.wait_for("> ", seconds=10)
    assert "stopped" in told
    tokens = int(told.split("dpo: ")[1].split(" token")[0].replace(",", ""))
    assert 0 < tokens < 3000
    terminal.type("/stage domian\n")
    terminal.wait_for("choose 'domain'")
    terminal.wait_for("> ")
    terminal.type("/stage domain\n")
    assert "now domain" in terminal.wait_for("> ")
    terminal.type("w7\n")
    terminal.wait_for("w7\r\n")
    terminal.wait_for("w", seconds=10)
    terminal.type("\x03")
    assert "domain: " in terminal.wait_for("> ", seconds=10)
    terminal.type("\x04")
    assert terminal.ended() == 0


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_hostile_reaches_a_terminal(out: Path, tmp_path: Path, columns: int) -> None:
    hostile_words().save_pretrained(tmp_path)
    arguments = ["--tokenizer", tmp_path, "--no-verify", "--max-new-tokens", "4"]
    terminal = Terminal(columns, "chat", out / "dpo", *arguments)
    try:
        terminal.wait_for("> ")
        terminal.type("w5\n")
        told = terminal.wait_for("> ")
    finally:
        terminal.close()
    assert "evil" in told
    # Colours are Lamina's own; nothing else is obeyed.
    for own in ("\x1b[2m", "\x1b[0m", "\x1b[?2004h", "\x1b[?2004l", "\r\n", "\r"):
        told = told.replace(own, "")
    assert obeyed(told) == []
