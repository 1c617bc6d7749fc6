"""Every stage of a plan in turn: kept, gone on with, made again, or left out of the chain."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

from lamina.errors import DivergedError, GateError, RunError
from lamina.storage.staging import remove_tree
from lamina.training.data import StageData, prepare
from lamina.training.plan import Plan, StagePlan
from lamina.training.run.base import load_tokenizer
from lamina.training.run.identity import Inputs, differences, digest, inputs_of
from lamina.training.run.interrupts import Stop
from lamina.training.run.judging import Judging, Saved
from lamina.training.run.stage import Outcome, Places, Task, run_stage
from lamina.training.run.state import Judgement, Retry, RunState, StageState, adapter_digests
from lamina.training.run.told import RunResult, StageResult, Told
from lamina.training.trainers import METHODS


class Stages:
    """The stages of a plan, being run.

    Args:
        plan: the plan, with its paths as they are found from anywhere.
        root: the folder of its file.
        told: hears of the progress.
        stop: is looked at between steps.
        resume: go on from what is there.

    Raises:
        LaminaError: data, tokenizer or what lies in `output_dir` can't be used.
    """

    def __init__(self, plan: Plan, root: Path, told: Told, stop: Stop, *, resume: bool) -> None:
        self._plan, self._root = plan, root
        self._told, self._stop, self._resume = told, stop, resume
        self._directory = Path(plan.output_dir)
        self._tokenizer = load_tokenizer(plan, root)
        self._data = self._all_data()
        self._judging = Judging(plan, self._tokenizer, root, told, stop, resume=resume)
        before = RunState.read(self._directory)
        _check_ours(plan, self._directory, before)
        names = tuple(stage.name for stage in plan.stages)
        self._state = replace(before, order=names, base=plan.model_name_or_path)

    def all_of_them(self) -> RunResult:
        """Run what isn't finished.

        Raises:
            GateError: a stage cost more than its gate allows.
        """
        names = [stage.name for stage in self._plan.stages]
        # Else a plan that only leaves stages out would change nothing.
        self._state.write(self._directory)
        self._told.begins(names, str(self._directory))
        results: list[StageResult] = []
        built_on: str | None = None
        whole = self._judging.base() and not self._stop.asked
        for number, stage in enumerate(self._plan.stages):
            if not whole:
                break
            result = self._one(number, stage, built_on)
            results.append(result)
            self._told.stage_ends(result)
            if result.status not in {"interrupted", "rolled back"}:
                built_on = stage.name
            whole = result.status != "interrupted" and not self._stop.asked
        done = len(results) == len(names) and all(r.status != "interrupted" for r in results)
        path = "" if built_on is None else str(self._directory / built_on)
        return RunResult(str(self._directory), path, tuple(results), interrupted=not done)

    def _all_data(self) -> dict[str, StageData]:
        """The data of all stages, so that what is wrong with the last is told before the first."""
        return {
            stage.name: prepare(
                self._plan.settings_of(stage), tokenizer=self._tokenizer, root=self._root
            )
            for stage in self._plan.stages
        }

    def _one(self, number: int, stage: StagePlan, built_on: str | None) -> StageResult:
        """A stage with all its tries."""
        gate = self._plan.settings_of(stage).gate
        # With the stages before it rolled back it is the first.
        begun = stage if built_on else stage.model_copy(update={"mode": None})
        inputs = self._inputs(begun, built_on)
        retries = self._retries(stage, digest(inputs))
        while True:
            result, judgement = self._try(number, begun, built_on, inputs, retries)
            if judgement is None or judgement.passed:
                return result
            if judgement.on_failure == "rollback":
                return replace(result, status="rolled back", why="; ".join(judgement.faults))
            if gate is None or judgement.on_failure != "retry" or len(retries) >= gate.max_retries:
                self._told.stage_ends(replace(result, status="refused"))
                raise _refused(stage.name, judgement, len(retries), self._directory)
            rate = self._rate(stage, len(retries))
            retries = (*retries, Retry(rate, judgement.faults))
            self._told.retried(stage.name, self._rate(stage, len(retries)))

    def _try(
        self,
        number: int,
        stage: StagePlan,
        built_on: str | None,
        inputs: Inputs,
        retries: tuple[Retry, ...],
    ) -> tuple[StageResult, Judgement | None]:
        """One of them, and what the gate says of it; nothing of a stage that was interrupted."""
        gate = self._plan.settings_of(stage).gate
        judgement: Judgement | None = None
        try:
            result = self._tried(number, stage, built_on, inputs, retries)
        except DivergedError as error:
            if gate is None or gate.on_failure == "stop":
                raise
            result = StageResult(stage.name, str(self._directory / stage.name), "diverged")
            judgement = Judgement(False, gate.on_failure, (error.what,))
        else:
            saved = self._saved(stage, built_on)
            if result.status == "interrupted" or not self._judging.stage(saved):
                return replace(result, status="interrupted"), None
            if gate is not None:
                judgement = self._judging.judgement(gate, stage.name, built_on)
        self._judged(stage.name, judgement)
        return result, judgement

    def _retries(self, stage: StagePlan, first: str) -> tuple[Retry, ...]:
        """Those of an earlier run, unless what they were tries of, or their rates, changed."""
        gate = self._plan.settings_of(stage).gate
        before = self._state.stages.get(stage.name)
        if gate is None or gate.on_failure != "retry" or before is None or not self._resume:
            return ()
        if before.first != first:
            return ()
        tries = enumerate(before.retries)
        same = takewhile(lambda each: each[1].learning_rate == self._rate(stage, each[0]), tries)
        return tuple(each for _, each in same)

    def _rate(self, stage: StagePlan, retries: int) -> float:
        settings = self._plan.settings_of(stage)
        assert settings.learning_rate is not None
        factor = settings.gate.retry_factor if settings.gate else 1.0
        return settings.learning_rate * factor**retries

    def _tried(
        self,
        number: int,
        stage: StagePlan,
        built_on: str | None,
        inputs: Inputs,
        retries: tuple[Retry, ...],
    ) -> StageResult:
        places = Places(self._directory, stage.name)
        first = digest(inputs)
        if retries:
            lower = {"learning_rate": self._rate(stage, len(retries))}
            stage, inputs = stage.model_copy(update=lower), {**inputs, **lower}
        own = digest(inputs)
        before = self._state.stages.get(stage.name)
        kept = self._kept(places, before, own)
        if kept is not None:
            return kept
        if self._resume and before and before.hash == own and before.diverged:
            raise DivergedError(before.why)
        why = _why(before, inputs, own)
        self._told.stage_begins(stage.name, number, why)
        task = Task(
            plan=self._plan,
            stage=stage,
            places=places,
            hash=own,
            parent=self._directory / built_on if built_on else None,
            data=self._data[stage.name],
            tokenizer=self._tokenizer,
            resume=self._resume,
        )
        spent = before.seconds if before and before.hash == own and self._resume else 0.0
        running = StageState(
            "running",
            own,
            inputs,
            seconds=spent,
            built_on=built_on,
            first=first,
            retries=retries,
        )
        return self._trained(task, running, why)

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
            if isinstance(error, DivergedError):
                remove_tree(places.work)
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

    def _saved(self, stage: StagePlan, built_on: str | None) -> Saved:
        method = METHODS[self._plan.settings_of(stage).method or "sft"]
        return Saved(stage.name, self._identity(stage.name), built_on, method.head)

    def _judged(self, name: str, judgement: Judgement | None) -> None:
        known = self._state.stages[name]
        if known.gate != judgement:
            self._note(name, replace(known, gate=judgement))
        if judgement is not None:
            self._told.gate(name, judgement)

    def _note(self, name: str, state: StageState) -> None:
        self._state = self._state.having(name, state)
        self._state.write(self._directory)

    def _inputs(self, stage: StagePlan, built_on: str | None) -> Inputs:
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
            parent=self._identity(built_on) if built_on else None,
            reference=self._identity(str(named)) if explicit else None,
            template=getattr(self._tokenizer, "chat_template", None),
        )

    def _identity(self, name: str) -> str:
        """What a finished stage is to those that depend on it."""
        state = self._state.stages.get(name)
        return state.identity if state else ""

    def _kept(self, places: Places, before: StageState | None, own: str) -> StageResult | None:
        """A stage that is finished, and still is what was saved."""
        if not self._resume or before is None or before.status != "finished":
            return None
        if before.hash != own or not places.stage.is_dir():
            return None
        remove_tree(places.work)
        return StageResult(places.name, str(places.stage), "kept", "", before.steps, before.metrics)


def _refused(name: str, judgement: Judgement, retries: int, directory: Path) -> GateError:
    tries = f", after {retries} {'retry' if retries == 1 else 'retries'}" if retries else ""
    return GateError(
        f"Stage {name!r} costs more than its gate allows{tries}.",
        faults=judgement.faults,
        cure=f"lamina report {directory} shows what it gained and cost; change the stage, or its "
        "gate, and run again: what is finished is kept",
    )


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
