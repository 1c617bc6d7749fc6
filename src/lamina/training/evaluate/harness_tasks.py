"""Tasks of the lm-eval harness: those that come with it, and those that lie beside a plan."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from lamina.errors import PlanError, nearest
from lamina.extras import require
from lamina.training.data.examples import quiet
from lamina.training.quiet import errors_only

# What `lm_eval run` draws examples with.
_SEED = 1234
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Tasks:
    """What a plan asks of the harness.

    Attributes:
        names: of tasks and groups; tags are the tasks that have them.
        folders: where tasks are defined beside those that come with the harness.
        built_in: whether those that come with it are needed at all: to find them takes a while.
        root: the folder of the plan.
    """

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    built_in: bool
    root: Path

    @property
    def manager(self) -> Any:
        """The harness's manager of these."""
        return _manager(self.folders, self.built_in)

    @property
    def local(self) -> Tasks:
        """Those that are defined in `folders`."""
        index = self.manager.task_index
        return replace(self, names=tuple(n for n in self.names if self._is_local(index[n])))

    def definitions(self) -> Iterator[str]:
        """What is defined in `folders`, wherever they lie, with the modules beside it."""
        index = self.manager.task_index
        for entry in (index[name] for name in sorted(index) if self._is_local(index[name])):
            folder = Path(entry.yaml_path).resolve().parent
            # Functions are told by their paths.
            yield json.dumps(entry.cfg, sort_keys=True, default=str).replace(str(folder), "")
            yield from (each.read_text("utf-8") for each in sorted(folder.glob("*.py")))

    def _is_local(self, entry: Any) -> bool:
        there = () if entry.yaml_path is None else Path(entry.yaml_path).resolve().parents
        return any(folder in there for folder in self.folders)

    def load(self, num_fewshot: int | None = None) -> dict[str, Any]:
        """Tasks with their data, and groups.

        Data with relative paths is looked for in the plan's folder, then in the working directory.

        Args:
            num_fewshot: examples that every task is shown; None for as many as it says, or none.

        Raises:
            PlanError: a task is always shown none.
        """
        names = list(self.names)
        try:
            with _inside(self.root):
                loaded: dict[str, Any] = self.manager.load(names)
        except FileNotFoundError:
            loaded = self.manager.load(names)
        _show(loaded["tasks"], num_fewshot)
        return loaded


def find_tasks(told: Sequence[str], root: Path) -> Tasks:
    """Tasks by their names, or by files and folders where they are defined.

    Args:
        told: names of tasks, groups and tags, or paths of YAML files and folders.
        root: the folder that paths are looked for in first.

    Raises:
        PlanError: with every name that is unknown, and every path without a task.
    """
    paths = {name: _local(name, root) for name in told}
    found = {name: path for name, path in paths.items() if path is not None}
    folders = tuple(dict.fromkeys(p if p.is_dir() else p.parent for p in found.values()))
    local = _manager(folders, False) if folders else None
    built_in = len(found) < len(paths) or bool(local and _elsewhere(local))
    manager = _manager(folders, built_in)
    names: list[str] = []
    faults: list[str] = []
    for name, path in paths.items():
        there = _defined_in(path, manager) if path else _named(name, manager)
        names += there
        if not there:
            faults.append(_unknown(name, path, manager))
    if faults:
        raise PlanError(
            "These are no tasks of the lm-eval harness.",
            faults=faults,
            cure="names as `lm_eval ls tasks` has them, or the path of a task's YAML file",
        )
    return Tasks(tuple(dict.fromkeys(names)), folders, built_in, root)


def _show(tasks: Mapping[str, Any], count: int | None) -> None:
    """Set how many examples tasks are shown, drawn as the harness's own runs draw them."""
    own = {name: task.get_config("num_fewshot") for name, task in tasks.items()}
    faults = [f"{name} is always shown none" for name in own if count and own[name] == 0]
    if faults:
        cure = "leave num_fewshot out, or put these into an eval of their own"
        raise PlanError(f"num_fewshot: {count} can't be had.", faults=faults, cure=cure)
    for name, task in tasks.items():
        task.set_config(key="num_fewshot", value=(own[name] or 0) if count is None else count)
        task.set_fewshot_seed(seed=_SEED)


@contextmanager
def keeping_quiet() -> Iterator[None]:
    """No remarks and progress bars of the harness inside."""
    with ExitStack() as stack:
        stack.enter_context(quiet(always=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("lm_eval", "datasets", "evaluate", "absl", "transformers"):
            stack.enter_context(errors_only(logging.getLogger(name)))
        stack.enter_context(_no_bars())
        yield


def _manager(folders: tuple[Path, ...], built_in: bool) -> Any:
    files = sorted(file for folder in folders for file in folder.glob("**/*.yaml"))
    return _indexed(folders, built_in, tuple((each, each.stat().st_mtime_ns) for each in files))


@lru_cache(maxsize=4)
def _indexed(folders: tuple[Path, ...], built_in: bool, files: tuple[tuple[Path, int], ...]) -> Any:
    """What is defined there; it is looked for anew when a file changes."""
    with keeping_quiet():
        tasks = require("lm_eval.tasks", "eval")
        return tasks.TaskManager(include_path=list(folders), include_defaults=built_in)


def _local(name: str, root: Path) -> Path | None:
    """A file or folder that is meant; None if it is a name."""
    told = Path(name).expanduser()
    looks = told.suffix in _SUFFIXES or len(told.parts) > 1
    for path in (root / told, told):
        if path.is_dir() or (path.is_file() and path.suffix in _SUFFIXES):
            return path.resolve()
    return (root / told).resolve() if looks else None


def _defined_in(path: Path, manager: Any) -> list[str]:
    """Groups and tasks of a file, or of a folder those that are no members of groups in it."""
    there = {
        name: entry
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None
        and (path == Path(entry.yaml_path).resolve() or path in Path(entry.yaml_path).parents)
    }
    members = {each for entry in there.values() for each in _members(entry)}
    return [name for name in there if name not in members]


def _named(name: str, manager: Any) -> list[str]:
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]


def _members(entry: Any) -> Iterator[str]:
    listed = (entry.cfg or {}).get("task")
    for each in listed if isinstance(listed, list) else ():
        named = each if isinstance(each, str) else each.get("task", each.get("group"))
        if isinstance(named, str):
            yield named


def _elsewhere(manager: Any) -> bool:
    """Whether a group has members that are defined nowhere here."""
    index = manager.task_index
    return any(name not in index for entry in index.values() for name in _members(entry))


def _unknown(name: str, path: Path | None, manager: Any) -> str:
    if path is None:
        close = nearest(name, manager.all_tasks, 3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        return f"there is no task {name!r}{hint}"
    return f"{name}: {'no task is defined there' if path.exists() else 'there is no such file'}"


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    """The harness has no switch for most of its progress bars, nor for what it prints."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            shown = vars(module).get("tqdm") if name.startswith("lm_eval.") else None
            if isinstance(shown, type):
                stack.enter_context(_having(module, "tqdm", partial(_unshown, shown)))
        metrics = sys.modules.get("lm_eval.api.metrics")
        if metrics is not None:
            stack.enter_context(_having(metrics, "print", _said_nothing))
        yield


def _unshown(bar: type[Any], *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **{**kwargs, "disable": True})


@contextmanager
def _having(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """A name of a module means something else inside."""
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _said_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of `print`: what a verb writes may be read by another program."""
