"""A process with torch loaded that forks a child for each act, under what befalls it.

`python server.py`: reads requests and writes answers as lines of JSON. A child stops itself before
it begins, so that the caller decides when. What it did is in the answer to "wait".
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lamina.storage import staging
from tests.torture.cases import CASES, Case
from tests.torture.storage_calls import Calls

torch.set_num_threads(1)
# Its own lock is shared with the children, and one that is killed may hold it for ever.
tqdm.set_lock(threading.RLock())


class Server:
    """The cases that were prepared, and the children that run."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}

    def prepare(self, name: str, work: str) -> None:
        """Make what a case reads; one that is none of `CASES` is `module:class`."""
        module, _, own = name.partition(":")
        case: Case = getattr(import_module(module), own)() if own else CASES[name]()
        case.prepare(Path(work))
        self.cases[work] = case

    def act(self, work: str, number: int) -> None:
        """Do it in this process."""
        self.cases[work].act(Path(work), number)

    def start(self, work: str, number: int, fate: dict[str, Any], told: str) -> int:
        """Fork a child, which has stopped when this returns its process id."""
        child = os.fork()
        if child == 0:
            _live(lambda: self.cases[work].act(Path(work), number), fate, Path(told))
        os.waitpid(child, os.WUNTRACED)
        return child

    def wait(self, pid: int) -> dict[str, Any]:
        """How a child ended, or that it stopped."""
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return {"stopped": True}
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        return {"stopped": False, "signal": killed}


def _live(act: Callable[[], None], fate: dict[str, Any], told: Path) -> None:
    """Run in the child, to its end."""
    ended: dict[str, Any] = {}
    try:
        calls = _meet(fate)
        result = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        if "uid" in fate:
            os.setgroups([])
            os.setresgid(fate["uid"], fate["uid"], fate["uid"])
            os.setresuid(fate["uid"], fate["uid"], fate["uid"])
        os.kill(os.getpid(), signal.SIGSTOP)
        calls.begin()
        _limit_files(fate)
        try:
            act()
            ended["error"] = None
        except BaseException as error:
            # Ctrl-C is among them.
            ended["error"] = type(error).__name__
            ended["text"] = str(error)
            ended["trace"] = traceback.format_exc()
        ended["calls"] = calls.count
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        os.write(result, json.dumps(ended).encode())
    finally:
        os._exit(0)


def _meet(fate: dict[str, Any]) -> Calls:
    """What happens at which call."""
    # Who waits for the turn of a process that is stopped doesn't do so for long.
    staging._TURN_S = fate.get("patience", staging._TURN_S)
    kind = fate.get("kind", "nothing")
    if kind == "fail":
        number = errno.errorcode and getattr(errno, fate["errno"])

        def happen() -> None:
            raise OSError(number, os.strerror(number))
    else:
        signals = {"die": signal.SIGKILL, "stop": signal.SIGSTOP, "nothing": 0}

        def happen() -> None:
            os.kill(os.getpid(), signals[kind])

    return Calls(fate.get("at", 0), happen)


def _limit_files(fate: dict[str, Any]) -> None:
    """No file can grow beyond `largest` bytes: an error, or with `fatal` death."""
    if "largest" not in fate:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fate["largest"], most))
    if fate.get("fatal"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def main() -> None:
    server = Server()
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print is no answer.
    os.dup2(2, 1)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(server, name)(*arguments)}
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    # Torch takes its time to go.
    os._exit(0)


if __name__ == "__main__":
    main()
