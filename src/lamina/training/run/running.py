"""A plan from its base to its last stage: what a run needs around it, and what it comes to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lamina.errors import GateError, LaminaError, PlanError
from lamina.extras import require
from lamina.interop.peft import standing_in
from lamina.training.plan import Plan
from lamina.training.plan.document import Document
from lamina.training.plan.located import located
from lamina.training.preflight import check_plan
from lamina.training.quiet import quiet
from lamina.training.report import write_report
from lamina.training.run.interrupts import Stop, stopped_by_signals
from lamina.training.run.lock import locked
from lamina.training.run.room import disk_faults_told
from lamina.training.run.stages import Stages
from lamina.training.run.told import RunResult, Told
from lamina.training.trainers.functions import importable


def run_plan(
    plan: Plan,
    *,
    root: str | os.PathLike[str] = ".",
    document: Document | None = None,
    console: Told | None = None,
    resume: bool = True,
    report: bool = True,
) -> RunResult:
    """Take the base of a plan through its stages.

    A stage is saved in `output_dir/NAME`, its log in `output_dir/logs/NAME.jsonl`, and what is done
    in `output_dir/run.json`. A stage is kept if all that it depends on is as it was: the plan, the
    data, the versions of the libraries, and the stage before. One that was cut off goes on from its
    last whole checkpoint, to the end that it would have come to undisturbed.

    Every stage that was saved is opened again, verified, and measured on the plan's evals, as the
    base is; what comes out lies in `output_dir/evaluation.json`. A stage that costs more than its
    gate allows ends the run, or is made again at a lower learning rate, or is left out of the
    chain: the next one is built on the stage before it.

    Args:
        plan: the plan.
        root: the folder of the plan's file, where its base, data and functions are looked for
            before the working directory; `output_dir` is relative to the latter.
        document: of the plan, for the lines of what is wrong with it.
        console: what hears of the progress.
        resume: go on from what is there; False runs and measures every stage anew.
        report: write the report of a run that came to its end, or to a gate that ended it.

    Raises:
        PlanError, RunError, DataError: before anything is trained, with all that is wrong.
        DirectoryInUseError: another run works in `output_dir`.
        PreflightError: a stage would train nothing, or the wrong thing.
        GateError: a stage cost more than its gate allows.
        VerificationError: a stage, opened again, doesn't answer as when it was saved.
    """
    for package in ("trl", "datasets", *(("matplotlib", "jinja2") if report else ())):
        require(package, "train")
    folder = Path(root).expanduser().resolve()
    plan = located(plan, folder).model_copy(
        update={"output_dir": str(Path(plan.output_dir).expanduser().resolve())}
    )
    with _surroundings(plan, folder) as stop:
        _check()
        check_plan(plan, document=document, root=folder).check()
        directory = Path(plan.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        with disk_faults_told(directory), locked(directory):
            stages = Stages(plan, folder, console or Told(), stop, resume=resume)
            try:
                result = stages.all_of_them()
            except GateError:
                if report:
                    # What the gate says is not hidden by what keeps a report from being written.
                    with suppress(LaminaError):
                        write_report(directory)
                raise
            if report and not result.interrupted:
                result = replace(result, report=str(write_report(directory).html))
            return result


@contextmanager
def _surroundings(plan: Plan, folder: Path) -> Iterator[Stop]:
    """Lamina's models are peft's to the trainers, and libraries keep quiet, inside."""
    with ExitStack() as stack:
        stack.enter_context(standing_in())
        stack.enter_context(quiet())
        if _has_functions(plan):
            # Else a folder of results that is called as a library is would be taken for that.
            stack.enter_context(importable(folder, Path.cwd()))
        yield stack.enter_context(stopped_by_signals())


def _has_functions(plan: Plan) -> bool:
    rewards = any(plan.settings_of(stage).reward_functions for stage in plan.stages)
    return rewards or any(":" in each.metric for each in plan.evals.values())


def _check() -> None:
    """What a run doesn't do is not passed over in silence."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PlanError(
            "The plan can't be run in several processes: a run is one process.",
            cure="start it without a launcher",
        )
