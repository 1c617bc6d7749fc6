"""Save over a directory again and again, killed before each step that changes the disk in turn.

Run as `python crash_every_step.py DIR exchange|renames`; prints a line of JSON per kill.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from lamina.storage import atomic, exchange

STEPS = ("mkdir", "rename", "link", "symlink", "chmod", "fsync", "unlink", "rmdir")


def main(work: Path, way: str) -> None:
    if way == "renames":
        exchange._swap_call = lambda libc: None
    for step in range(1, 200):
        target = prepared(work / "run")
        child = os.fork()
        if child == 0:
            die_before(step)
            save(target, "new")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"step": step, "killed": os.WIFSIGNALED(status), **seen(target)}))
        if not os.WIFSIGNALED(status):
            return
    raise SystemExit("it never ended")


def prepared(target: Path) -> Path:
    shutil.rmtree(target.parent, ignore_errors=True)
    (target / "checkpoint-1").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (target / name).write_text("old")
    (target / "adapter_model.bin").write_text("stale")
    (target / "tokenizer.json").write_text("tokens")
    (target / "checkpoint-1" / "adapter_config.json").write_text("first")
    (target / "latest").symlink_to("checkpoint-1")
    return target


def die_before(step: int) -> None:
    """Kill this process right before its `step`-th change to the disk."""
    left = step

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    if exchange._swap_call(exchange._libc()) is not None:
        exchange.exchange = counted(exchange.exchange)


def save(target: Path, content: str) -> None:
    with atomic.atomic_directory(target) as staging:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (staging / name).write_text(content)


def seen(target: Path) -> dict[str, object]:
    """What a reader finds after the crash, and what is left once another save is through."""
    absent = not target.exists()
    atomic.recover(target)
    after = listing(target)
    save(target, "next")
    hidden = [name for name in os.listdir(target.parent) if name.startswith(".")]
    return {"absent": absent, "after": after, "next": listing(target), "left": hidden}


def listing(target: Path) -> dict[str, str]:
    files = [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {str(path.relative_to(target)): path.read_text() for path in files}
    return found | {"latest": os.readlink(target / "latest")}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
