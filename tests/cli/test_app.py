"""Starting without torch and in time, and how errors end the program."""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lamina._version import __version__
from lamina.cli.app import EXIT_CODE, _Verbs, app
from lamina.errors import StageError
from tests.cli.made import lamina, write_chain

VERBS = ("demo", "inspect", "lineage", "targets", "merge", "env")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lamina", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def modules_after(*arguments: object) -> set[str]:
    """The modules that a run of the command line has imported."""
    words = [str(each) for each in arguments]
    code = (
        "import sys, contextlib, io; from lamina.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    app({words!r})\n"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_and_version_import_neither_torch_nor_what_a_verb_may_need(
    arguments: list[str],
) -> None:
    assert not {"torch", "transformers", "numpy", "safetensors"} & modules_after(*arguments)


@pytest.mark.parametrize("verb", ["inspect", "lineage"])
def test_verbs_that_read_files_import_no_torch(verb: str, tmp_path: Path) -> None:
    write_chain(tmp_path / "chat")
    imported = modules_after(verb, tmp_path / "chat")
    assert "lamina.checkpoint.describe" in imported
    assert not {"torch", "transformers", "safetensors.torch"} & imported


def test_env_imports_no_torch() -> None:
    assert "torch" not in modules_after("env")


def processor_time(*arguments: object) -> float:
    """Seconds of processor time that a run takes, which other programs don't change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("arguments", "limit_s"),
    [
        (["--version"], 0.5),
        (["--help"], 0.5),
        (["env"], 1),
        (["inspect", "DIR"], 1),
        (["lineage", "DIR"], 1),
    ],
)
def test_starts_in_time(arguments: list[str], limit_s: float, tmp_path: Path) -> None:
    # About a third of the limit on the machine where this was written.
    write_chain(tmp_path / "chat")
    words = [str(tmp_path / "chat") if each == "DIR" else each for each in arguments]
    assert min(processor_time(*words) for _ in range(2)) < limit_s


def test_version_is_the_packages() -> None:
    assert lamina("--version").stdout == f"lamina {__version__}\n"


def test_help_lists_every_verb_in_the_order_of_use() -> None:
    text = lamina("--help").stdout
    assert sorted(VERBS, key=text.index) == list(VERBS)


def test_an_error_of_the_library_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "nothing")
    assert done.returncode == EXIT_CODE == 2
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first == f"error: There is no directory '{tmp_path / 'nothing'}'."
    assert rest[-1].startswith("To mend it: ")
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


def test_an_error_shows_all_faults_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = typer.Typer(cls=_Verbs)
    broken.callback()(lambda: None)

    @broken.command()
    def fail() -> None:
        raise StageError("What [bold]happened[/bold].", faults=["a" * 200, "[1, 2]"], cure="this")

    done = CliRunner(env={"COLUMNS": "80"}).invoke(broken, ["fail"])
    assert done.exit_code == EXIT_CODE
    assert done.stderr.splitlines() == [
        "error: What [bold]happened[/bold].",
        f"  - {'a' * 200}",
        "  - [1, 2]",
        "To mend it: this",
    ]


def test_other_errors_stay_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("lamina.checkpoint.describe.describe_adapter", broken)
    done = CliRunner().invoke(app, ["inspect", "anything"])
    assert isinstance(done.exception, ZeroDivisionError)
    assert done.exit_code == 1


def test_no_verb_shows_the_help() -> None:
    done = lamina()
    assert "Usage" in done.output
    assert done.exit_code != 0


def test_a_terminal_that_knows_no_arrows_gets_no_traceback(tmp_path: Path) -> None:
    write_chain(tmp_path / "chat")
    command = [sys.executable, "-m", "lamina", "inspect", str(tmp_path / "chat")]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "32 ? 16" in done.stdout


def test_a_verb_prints_nothing_of_what_quantisers_note_when_they_are_imported(
    tmp_path: Path,
) -> None:
    """Transformers imports them, installed or not asked for."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "targets", str(files("lamina.demo") / "base")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "all-linear" in done.stdout
    assert done.stderr == ""
