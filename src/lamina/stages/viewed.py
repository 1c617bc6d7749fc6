"""One base under the stages of a chain: which of them acts is switched without loading it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.adapter import AdapterFile, read_adapter
from lamina.errors import MissingFileError, StageError, nearest
from lamina.model import PeftModel, loading
from lamina.model.vocabulary import grown
from lamina.stages.earlier import earlier
from lamina.stages.verify import VerifyReport, contents_of, examine
from lamina.stages.verify.opening import open_base, open_tokenizer

BASE = "base"


@dataclass(frozen=True)
class Opening:
    """How a base is opened.

    Attributes:
        base: its path or hub id; None takes the one on record.
        tokenizer: the tokenizer, or where it is; None takes one that lies with the stage or base.
        dtype: to load the base in; None takes the one on record.
        load_in_4bit: whether to quantise it; None does as on record.
        device: where it goes; None is the GPU if there is one.
        verify: replay what every stage answered when it was saved, before it is shown.
    """

    base: str | None = None
    tokenizer: Any = None
    dtype: torch.dtype | str | None = None
    load_in_4bit: bool | None = None
    device: str | None = None
    verify: bool = True


@dataclass
class View:
    """A base with stages over it, of which one acts, or none.

    Attributes:
        model: it; in evaluation mode, frozen.
        tokenizer: of it.
        base: what the base was loaded from.
        stages: those that can be shown, oldest first.
        shown: the one that acts; None is the base.
        find: reads the adapter of a stage.
        verify: whether stages are verified before they are shown.
        chains: stage -> all that it is made of, oldest first; of those that were shown.
        verified: stage -> what verifying it found.
    """

    model: PeftModel
    tokenizer: Any
    base: str
    stages: tuple[str, ...]
    shown: str | None
    find: Callable[[str], AdapterFile]
    verify: bool = True
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    verified: dict[str, VerifyReport] = field(default_factory=dict)

    def show(self, stage: str | None) -> None:
        """Let a stage act, with all that it was built on; None leaves the base alone.

        A stage is read when it is shown for the first time.

        Raises:
            StageError: there is no such stage, or it isn't to be had as it was saved.
            VerificationError: it doesn't answer as when it was saved; what was shown is shown.
        """
        state = self.model.adapter_state
        if stage is None:
            state.disabled = True
            state.show_biases()
        else:
            if stage not in self.model.peft_config:
                self._add(stage)
            state.disabled = False
            self.model.base_model.activate([stage])
        self.shown = stage

    def _add(self, stage: str) -> None:
        check_known(stage, self.stages)
        file = self.find(stage)
        _check_task(file)
        before = self.shown
        _lay_beside(self.model, stage, file)
        try:
            self.judge(stage, file)
        except BaseException:
            self.model.delete_adapter(stage)
            self.show(before)
            raise

    def judge(self, stage: str, file: AdapterFile, *, base: bool = False) -> None:
        """Verify a stage that lies over the base, if that is asked for.

        Args:
            stage: it.
            file: what it was read from.
            base: whether to compare the base's weights with those on record, too.

        Raises:
            VerificationError: it doesn't answer as when it was saved.
        """
        self.chains[stage] = _names(file)
        if not self.verify:
            return
        state = self.model.adapter_state
        state.disabled = False
        self.model.base_model.activate([stage])
        report = examine(contents_of(file), self.model, stage, tokenizer=self.tokenizer, base=base)
        report.raise_if_failed()
        self.verified[stage] = report


def open_view(
    path: str | Path,
    stage: str | None = None,
    *,
    directories: Mapping[str, Path] | None = None,
    how: Opening | None = None,
) -> View:
    """Open a stage on its base, ready to be switched to others of its chain.

    Args:
        path: the directory (or hub id) of the chain's end, or any plain PEFT adapter.
        stage: what is shown first; None is the chain's end.
        directories: stage -> where it was saved, for those that are in directories of their own;
            all others are looked for in the file, see `lamina.stages.earlier`.
        how: how the base is opened.

    Raises:
        StageError: there is no such stage, or it isn't to be had as it was saved.
        CheckpointError: files are missing or broken.
        VerificationError: base and stage don't answer as when the stage was saved.
    """
    how = how or Opening()
    if directories:
        known, find = tuple(directories), _in_directories(directories)
    else:
        end = read_adapter(path)
        known, find = _names(end), partial(earlier, end)
    first = known[-1] if stage is None else stage
    check_known(first, known)
    file = find(first)
    _check_task(file)
    base = _opened_base(file, how)
    name = str(getattr(base, "name_or_path", "") or "")
    tokenizer = _tokenizer(how, [str(path), file.source, name])
    with grown(base, file):
        kind = PeftModel.for_task(file.config.task_type)
        model = loading.over(kind, base, file, loading.How(), first).eval()
    view = View(model, tokenizer, name, known, first, find, how.verify)
    view.judge(first, file, base=True)
    return view


def check_known(stage: str, known: Sequence[str]) -> None:
    """Refuse a stage that isn't there.

    Raises:
        StageError: with the nearest one.
    """
    if stage not in known:
        close = nearest(stage, known)
        raise StageError(
            f"There is no stage {stage!r}.",
            faults=[f"the stages are {' -> '.join(known)}"],
            cure=f"choose {(close[0] if close else known[-1])!r}",
        )


def _in_directories(directories: Mapping[str, Path]) -> Callable[[str], AdapterFile]:
    return lambda stage: read_adapter(directories[stage])


def _names(file: AdapterFile) -> tuple[str, ...]:
    return tuple(each.name for each in file.record().stages)


def _check_task(file: AdapterFile) -> None:
    if PeftModel.for_task(file.config.task_type).task_heads:
        raise StageError(
            f"{file.source} is a model of the task {file.config.task_type}: it doesn't write.",
            cure="choose a stage that is a language model: --stage NAME",
        )


def _opened_base(file: AdapterFile, how: Opening) -> Any:
    base = open_base(file, file.record(), how.base, dtype=how.dtype, load_in_4bit=how.load_in_4bit)
    if not callable(getattr(base, "generate", None)):
        raise StageError(
            f"The base of {file.source}, a {type(base).__name__}, doesn't write.",
            cure="a causal language model",
        )
    device = how.device or ("cuda" if torch.cuda.is_available() else "cpu")
    quantised = getattr(base, "is_quantized", False) or hasattr(base, "hf_device_map")
    return base if quantised else base.to(device)


def _tokenizer(how: Opening, near: list[str]) -> Any:
    found = open_tokenizer(how.tokenizer, near)
    if found is None:
        raise MissingFileError(
            "There is no tokenizer, neither with the stage nor with its base.",
            cure="give one: --tokenizer DIR",
        )
    return found


def _lay_beside(model: PeftModel, name: str, file: AdapterFile) -> None:
    """Add an adapter that was read to a model that has others."""
    file.config.inference_mode = True
    config = model._own_config(model.get_base_model(), file.config)
    model.base_model.add(name, config, trainable=False, initialise=False, strict=False)
    try:
        loading.fill(model, name, file, loading.How())
    except BaseException:
        model.delete_adapter(name)
        raise
    model.eval()
