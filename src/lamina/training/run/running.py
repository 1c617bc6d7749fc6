"""A plan from its base to its last stage; what is finished is kept, what was cut off goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lamina.errors import PlanError, RunError
from lamina.extras import require
from lamina.interop.peft import install, installed, uninstall
from lamina.storage.staging import remove_tree
from lamina.training.data import StageData, prepare
from lamina.training.plan import Plan, StagePlan
from lamina.training.plan.document import Document
from lamina.training.plan.located import located
from lamina.training.preflight import check_plan
from lamina.training.run.base import load_tokenizer
from lamina.training.run.identity import Inputs, differences, digest, inputs_of
from lamina.training.run.interrupts import Stop, stopped_by_signals
from lamina.training.run.lock import locked
from lamina.training.run.quiet import quiet
from lamina.training.run.stage import Outcome, Places, Task, run_stage
from lamina.training.run.state import RunState, StageState, adapter_digests
from lamina.training.run.told import StageResult, Told
from lamina.training.trainers.functions import importable


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        path: the directory of the last stage.
        stages: what became of each, as far as the run came.
        interrupted: whether it was stopped; the same call goes on.
    """

    path: str
    stages: tuple[StageResult, ...]
    interrupted: bool = False


def run_plan(
    plan: Plan,
    *,
    root: str | os.PathLike[str] = ".",
    document: Document | None = None,
    console: Told | None = None,
    resume: bool = True,
) -> RunResult:
    """Take the base of a plan through its stages.

    A stage is saved in `output_dir/NAME`, its log in `output_dir/logs/NAME.jsonl`, and what is done
    in `output_dir/run.json`. A stage is kept if all that it depends on is as it was: the plan, the
    data, the versions of the libraries, and the stage before. One that was cut off goes on from its
    last whole checkpoint, to the end that it would have come to undisturbed.

    Args:
        plan: the plan.
        root: the folder of the plan's file, where its base, data and functions are looked for
            before the working directory; `output_dir` is relative to the latter.
        document: of the plan, for the lines of what is wrong with it.
        console: what hears of the progress.
        resume: go on from what is there; False runs every stage anew.

    Raises:
        PlanError, RunError, DataError: before anything is trained, with all that is wrong.
        DirectoryInUseError: another run works in `output_dir`.
        PreflightError: a stage would train nothing, or the wrong thing.
    """
    for package in ("trl", "datasets"):
        require(package, "train")
    folder = Path(root).expanduser().resolve()
    plan = located(plan, folder).model_copy(
        update={"output_dir": str(Path(plan.output_dir).expanduser().resolve())}
    )
    with _surroundings(plan, folder) as stop:
        _check(plan)
        check_plan(plan, document=document, root=folder).check()
        directory = Path(plan.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            return _Run(plan, folder, console or Told(), stop, resume=resume).all_stages()


@contextmanager
def _surroundings(plan: Plan, folder: Path) -> Iterator[Stop]:
    """Lamina's models are peft's to the trainers, and libraries keep quiet, inside."""
    with ExitStack() as stack:
        if not installed():
            install()
            stack.callback(uninstall)
        stack.enter_context(quiet())
        if any(plan.settings_of(stage).reward_functions for stage in plan.stages):
            # Else a folder of results that is called as a library is would be taken for that.
            stack.enter_context(importable(folder, Path.cwd()))
        yield stack.enter_context(stopped_by_signals())


def _check(plan: Plan) -> None:
    """What a plan may say, and a run doesn't do yet, is not passed over in silence."""
    faults = [
        f"{stage.name}: gate: a run can't judge stages yet"
        for stage in plan.stages
        if plan.settings_of(stage).gate is not None
    ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        faults.append("several processes: a run is one process; start it without a launcher")
    if plan.evals:
        faults.append("evals: a run can't measure stages yet")
    if plan.prompts:
        faults.append("prompts: a run can't let stages write yet")
    if faults:
        raise PlanError("The plan can't be run as it is.", faults=faults, cure="leave these out")


class _Run:
    """A run that is going on."""

    def __init__(self, plan: Plan, root: Path, told: Told, stop: Stop, *, resume: bool) -> None:
        self._plan, self._root = plan, root
        self._told, self._stop, self._resume = told, stop, resume
        self._directory = Path(plan.output_dir)
        self._tokenizer = load_tokenizer(plan, root)
        self._data = self._all_data()
        before = RunState.read(self._directory)
        _check_ours(plan, self._directory, before)
        names = tuple(stage.name for stage in plan.stages)
        self._state = replace(before, order=names)

    def all_stages(self) -> RunResult:
        """Every stage in turn."""
        names = [stage.name for stage in self._plan.stages]
        self._told.begins(names, str(self._directory))
        results: list[StageResult] = []
        parent: str | None = None
        for number, stage in enumerate(self._plan.stages):
            if self._stop.asked:
                break
            result, parent = self._one(number, stage, parent)
            results.append(result)
            self._told.stage_ends(result)
            if result.status == "interrupted":
                break
        done = len(results) == len(names) and all(r.status != "interrupted" for r in results)
        return RunResult(str(self._directory / names[-1]), tuple(results), interrupted=not done)

    def _all_data(self) -> dict[str, StageData]:
        """The data of all stages, so that what is wrong with the last is told before the first."""
        return {
            stage.name: prepare(
                self._plan.settings_of(stage), tokenizer=self._tokenizer, root=self._root
            )
            for stage in self._plan.stages
        }

    def _one(self, number: int, stage: StagePlan, parent: str | None) -> tuple[StageResult, str]:
        places = Places(self._directory, stage.name)
        inputs = self._inputs(stage, parent)
        own = digest(inputs)
        before = self._state.stages.get(stage.name)
        kept = self._kept(places, before, own)
        if kept is not None:
            return kept, self._identity(stage.name)
        why = _why(before, inputs, own)
        self._told.stage_begins(stage.name, number, why)
        previous = self._plan.stages[number - 1].name if number else None
        task = Task(
            plan=self._plan,
            stage=stage,
            places=places,
            hash=own,
            parent=self._directory / previous if previous else None,
            data=self._data[stage.name],
            tokenizer=self._tokenizer,
            resume=self._resume,
        )
        spent = before.seconds if before and before.hash == own and self._resume else 0.0
        running = StageState("running", own, inputs, seconds=spent)
        return self._trained(task, running, why), self._identity(stage.name)

    def _trained(self, task: Task, running: StageState, why: str) -> StageResult:
        name, places = task.stage.name, task.places
        self._note(name, running)
        if not self._resume:
            remove_tree(places.work)
        began = time.monotonic()
        try:
            outcome = run_stage(task, self._told, self._stop)
        except BaseException as error:
            status: Literal["interrupted", "failed"] = (
                "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            )
            told = str(error).partition("\n")[0]
            self._note(name, replace(running, status=status, why=told))
            raise
        seconds = time.monotonic() - began
        state = replace(
            running,
            status="interrupted" if outcome.interrupted else "finished",
            metrics=outcome.metrics,
            steps=outcome.steps,
            seconds=round(running.seconds + seconds, 3),
            weights=outcome.weights,
            files={} if outcome.interrupted else adapter_digests(places.stage),
        )
        self._note(name, state)
        if not outcome.interrupted:
            remove_tree(places.work)
        return _result(task, outcome, why, seconds)

    def _note(self, name: str, state: StageState) -> None:
        self._state = self._state.having(name, state)
        self._state.write(self._directory)

    def _inputs(self, stage: StagePlan, parent: str | None) -> Inputs:
        settings = self._plan.settings_of(stage)
        data = self._data[stage.name]
        named = settings.reference
        explicit = named not in {None, "parent", "base"}
        entries = [*(settings.datasets or ()), *(settings.eval_datasets or ())]
        laid_out = [each.model_dump(exclude={"path"}, exclude_none=True) for each in entries]
        return inputs_of(
            self._plan,
            stage,
            data=digest({"read": data.digest, "as": laid_out, "rows": data.rows}),
            parent=parent,
            reference=self._identity(str(named)) if explicit else None,
            template=getattr(self._tokenizer, "chat_template", None),
        )

    def _identity(self, name: str) -> str:
        """What a finished stage is to those that depend on it."""
        state = self._state.stages.get(name)
        return digest({"hash": state.hash, "weights": state.weights}) if state else ""

    def _kept(self, places: Places, before: StageState | None, own: str) -> StageResult | None:
        """A stage that is finished, and still is what was saved."""
        if not self._resume or before is None or before.status != "finished":
            return None
        if before.hash != own or not places.stage.is_dir():
            return None
        remove_tree(places.work)
        return StageResult(places.name, str(places.stage), "kept", "", before.steps, before.metrics)


def _check_ours(plan: Plan, directory: Path, state: RunState) -> None:
    """What lies where stages are saved was saved there by this run, and not changed since."""
    faults = []
    for stage in plan.stages:
        there = adapter_digests(directory / stage.name)
        known = state.stages.get(stage.name)
        if known is None and there:
            faults.append(f"{stage.name}: there is an adapter that this run didn't save")
        elif known is not None and known.status == "finished" and there:
            names = sorted(known.files.keys() | there.keys())
            changed = [name for name in names if known.files.get(name) != there.get(name)]
            faults += [f"{stage.name}: {name} was changed since it was saved" for name in changed]
    if faults:
        raise RunError(
            f"What lies in {directory} would be lost.",
            faults=faults,
            cure="put the files back; or move the stage's directory away, and it is run anew; or "
            "give another output_dir",
        )


def _why(before: StageState | None, inputs: Inputs, own: str) -> str:
    """Why a stage that was run before is run again."""
    if before is None or (before.hash == own and before.status != "finished"):
        return ""
    if before.hash == own:
        return "its directory is gone, or everything is run anew"
    return "; ".join(differences(before.inputs, inputs))


def _result(task: Task, outcome: Outcome, why: str, seconds: float) -> StageResult:
    status = "interrupted" if outcome.interrupted else "resumed" if outcome.began else "trained"
    return StageResult(
        name=task.stage.name,
        path=str(task.places.stage),
        status=status,
        why=f"went on from step {outcome.began}" if outcome.began else why,
        steps=outcome.steps,
        metrics=outcome.metrics,
        seconds=seconds,
    )


def as_document(result: RunResult) -> dict[str, Any]:
    """A result as JSON has it."""
    return asdict(result)
