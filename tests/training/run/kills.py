"""Run a plan, kill it at moments drawn from a seed, and run it again until it ends.

    python -m tests.training.run.kills PLAN KILLS SEED

A process that has imported everything forks each attempt, so that they begin at once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer

from lamina.training.run import callbacks, stage
from lamina.training.run.state import RunState
from tests.training.run import plans


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_checkpoint() -> None:
    """The weights are there, the rest isn't."""
    Trainer._save_optimizer_and_scheduler = die


def before_a_checkpoint_is_sealed() -> None:
    callbacks.seal = die


def after_the_last_step() -> None:
    stage._save = die


def before_the_end_is_noted() -> None:
    """The stage is saved, and `run.json` doesn't know."""
    write = RunState.write

    def writing(self: RunState, directory: Path) -> None:
        if any(each.status == "finished" for each in self.stages.values()):
            die()
        write(self, directory)

    RunState.write = writing  # type: ignore[method-assign]


MOMENTS = (
    in_a_checkpoint,
    before_a_checkpoint_is_sealed,
    after_the_last_step,
    before_the_end_is_noted,
)


def attempt(plan: Path, after: float | None, prepare: Callable[[], None] | None = None) -> int:
    """A run in a process of its own, killed after so many seconds; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            if prepare:
                prepare()
            plans.run(plan)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(plan: Path, kills: int, seed: int) -> None:
    quiet = plan.parent / "undisturbed.yaml"
    quiet.write_text(plan.read_text().replace("/out\n", "/undisturbed\n", 1))
    began = time.monotonic()
    assert attempt(quiet, None) == 0
    took = time.monotonic() - began
    for prepare in MOMENTS:
        assert attempt(plan, None, prepare) == signal.SIGKILL, prepare
    draw = random.Random(seed)
    killed = 0
    for _ in range(kills):
        killed += attempt(plan, draw.uniform(0.1, 0.8) * took) == signal.SIGKILL
    assert attempt(plan, None) == 0
    print(f"{killed + len(MOMENTS)} killed, {took:.1f} s undisturbed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
