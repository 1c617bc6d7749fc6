"""All that is known of a run, from the files in its directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lamina.checkpoint.describe import AdapterDescription, describe_adapter
from lamina.checkpoint.record import Base, Mode
from lamina.errors import LaminaError, RunError
from lamina.training.evaluate.scores import Evaluation, Judged, ModuleDrift
from lamina.training.plan.schema import NAME_PATTERN
from lamina.training.report.curves import Curve, curve_of
from lamina.training.run.lock import is_locked
from lamina.training.run.state import FILE, RunState, StageState
from lamina.training.run.status import log_file

_NAME = re.compile(NAME_PATTERN)
_NOT_COUNTED = ("rolled back", "refused")


@dataclass(frozen=True)
class StageFacts:
    """What is known of one stage.

    Attributes:
        name: of the stage.
        number: its place in the plan, from 0.
        state: what the run noted of it; None if it hasn't begun.
        standing: "waiting", "running", "cut off" (killed while it ran), "interrupted", "failed",
            "finished", "outdated" (what it is built on isn't what it was), "rolled back" or
            "refused".
        mode: how it was, or is to be, begun: "fresh" on the base, else as in a plan; None if
            nothing says.
        built_on: the stage that it was begun on; None is the base.
        in_chain: whether the end of the run holds it.
        adapter: what lies in its directory; None if nothing that can be read does.
        directory: that, or where it would be.
        fault: why it can't be read, where something is there.
        curve: what its log says.
        judged: what was measured of it; of one that is outdated nothing is told.
    """

    name: str
    number: int
    state: StageState | None
    standing: str
    mode: Mode | None
    built_on: str | None
    in_chain: bool
    adapter: AdapterDescription | None
    directory: Path
    fault: str
    curve: Curve
    judged: Judged | None

    @property
    def is_dead_end(self) -> bool:
        """Whether its gate refused it, so that nothing is built on it."""
        return self.standing in _NOT_COUNTED

    @property
    def drift(self) -> tuple[ModuleDrift, ...]:
        """What it changed, module by module; empty where that wasn't measured."""
        return (self.judged.drift if self.judged else None) or ()

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What its result depends on."""
        return self.state.inputs if self.state else {}

    @property
    def method(self) -> str | None:
        """How it trains: "pt", "sft", "dpo" ..."""
        found = self.inputs.get("method") or self.data.get("method")
        return found if isinstance(found, str) else None

    @property
    def data(self) -> Mapping[str, Any]:
        """What it was trained on, as its record says."""
        newest = self.adapter.chain.stages[-1] if self.adapter else None
        return newest.data if newest is not None and isinstance(newest.data, dict) else {}


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        directory: of the run.
        name: the directory's own.
        base_name: the base, as the plan or a record names it; None if nothing does.
        base: what records say of it.
        stages: in the plan's order.
        chain: the stages that the end is made of, oldest first.
        evaluation: what was measured.
    """

    directory: Path
    name: str
    base_name: str | None
    base: Base
    stages: tuple[StageFacts, ...]
    chain: tuple[str, ...]
    evaluation: Evaluation

    def stage(self, name: str) -> StageFacts:
        """One of them, by its name."""
        return next(each for each in self.stages if each.name == name)

    @property
    def end(self) -> StageFacts | None:
        """The last stage that counts; None if none does yet."""
        return self.stage(self.chain[-1]) if self.chain else None

    @property
    def is_reward_model(self) -> bool:
        """Whether the end answers with a score, and not with tokens."""
        return self.end is not None and self.end.method == "reward"


def facts_of(directory: str | Path) -> RunFacts:
    """Read a run's directory.

    Raises:
        RunError: there is no run, or its notes can't be understood.
    """
    folder = Path(directory).expanduser().resolve()
    if not (folder / FILE).is_file():
        raise RunError(f"There is no run in {folder}.", cure="lamina run plan.yaml begins one")
    state = RunState.read(folder)
    evaluation = Evaluation.read(folder)
    running = is_locked(folder)
    described = {name: _described(folder, name) for name in state.order}
    built_on = {name: _built_on(state, name, described[name][0]) for name in state.order}
    chain = state.chain
    stages = tuple(
        StageFacts(
            name=name,
            number=number,
            state=state.stages.get(name),
            standing=_standing(state, name, running),
            mode=_mode(state.stages.get(name), described[name][0]),
            built_on=built_on[name],
            in_chain=name in chain,
            adapter=described[name][0],
            directory=folder / name if is_directory_name(name) else folder,
            fault=described[name][1],
            curve=curve_of(log_file(folder, name) if is_directory_name(name) else None),
            judged=None if name in state.outdated else evaluation.stages.get(name),
        )
        for number, name in enumerate(state.order)
    )
    base = next((each.adapter.base for each in reversed(stages) if each.adapter), Base())
    return RunFacts(
        directory=folder,
        name=folder.name,
        base_name=state.base or base.name_or_path,
        base=base,
        stages=stages,
        chain=chain,
        evaluation=evaluation,
    )


def is_directory_name(name: str) -> bool:
    """Whether a stage's name is one that a plan allows, which keeps to the run's directory."""
    return bool(_NAME.match(name))


def _described(folder: Path, name: str) -> tuple[AdapterDescription | None, str]:
    if not is_directory_name(name) or not (folder / name / "adapter_config.json").is_file():
        return None, ""
    try:
        return describe_adapter(folder / name, look_for_zeros=False), ""
    except LaminaError as error:
        return None, error.what


def _built_on(state: RunState, name: str, adapter: AdapterDescription | None) -> str | None:
    """The stage below: by the record, else by the run's notes, else the newest that counts."""
    before = state.order[: state.order.index(name)]
    known = state.stages.get(name)
    if adapter is not None and adapter.has_record:
        below = [each.name for each in adapter.chain.stages[:-1]]
        told = below[-1] if below else None
    elif known is not None:
        told = known.built_on
    else:
        usable = [each for each in before if not _refused(state, each)]
        told = usable[-1] if usable else None
    return told if told in before else None


def _refused(state: RunState, name: str) -> bool:
    return name in state.stages and state.stages[name].standing in _NOT_COUNTED


def _standing(state: RunState, name: str, running: bool) -> str:
    known = state.stages.get(name)
    if known is None:
        return "waiting"
    if name in state.outdated:
        return "outdated"
    return "cut off" if known.status == "running" and not running else known.standing


def _mode(state: StageState | None, adapter: AdapterDescription | None) -> Mode | None:
    if adapter is not None and adapter.has_record:
        return adapter.chain.stages[-1].mode
    told = state.inputs.get("mode") if state else None
    return told if told in get_args(Mode) else "fresh" if state else None
