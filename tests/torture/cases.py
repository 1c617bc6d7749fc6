"""What is interrupted: each case changes one directory, again and again, and can read it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lamina.checkpoint.header import data_start
from lamina.config import LoraConfig
from lamina.errors import StageError
from lamina.interop.peft import adapting, lora_config
from lamina.model import get_peft_model
from lamina.stages import begin_stage, lineage, load, merged_streaming, save_stage
from lamina.stages.edit import rename_stage
from lamina.stages.flatten import flatten
from lamina.stages.merged import save_merged
from lamina.storage import exchange
from lamina.storage.atomic import atomic_directory, recover
from tests import models
from tests.stages.chains import fill_trainable, llama_lora, wide

ABSENT = "absent"
# When something was made is on record, and differs from one time to the next.
_DATE = re.compile(rb"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Case:
    """One way of writing.

    `act` writes version `number` to `work/out`, `read` says which version lies there and fails if
    it is a mixture. `others` are files that are none of its business; `beside` are those of them
    that lie in `work/out` now.
    """

    told = ""
    others: tuple[str, ...] = ("tokenizer.json", "checkpoint-10/adapter_config.json")
    beside: tuple[str, ...] = ()

    def prepare(self, work: Path) -> None:
        """Make what is read, and nothing at `work/out`."""

    def act(self, work: Path, number: int) -> None:
        raise NotImplementedError

    def read(self, work: Path) -> str:
        raise NotImplementedError

    def label(self, number: int) -> str:
        """What `read` says of a version."""
        return str(number)

    def inputs(self, work: Path) -> dict[str, str]:
        """The digests of what must not change."""
        return {str(p.relative_to(work)): digest(p) for p in files_in(work) if _is_input(work, p)}

    def forget(self, work: Path) -> None:
        """Take away what an interrupted act would go on from."""

    def lay_beside(self, work: Path) -> None:
        """Put other files into a directory that was written."""
        self.beside = self.others
        for name in self.beside:
            (work / "out" / name).parent.mkdir(exist_ok=True)
            (work / "out" / name).write_text(name)
        if self.beside and not os.path.lexists(work / "out" / "latest"):
            (work / "out" / "latest").symlink_to("checkpoint-10")

    def check_beside(self, work: Path) -> None:
        for name in self.beside:
            assert (work / "out" / name).read_text() == name
        if self.beside:
            assert os.readlink(work / "out" / "latest") == "checkpoint-10"

    def names(self, work: Path) -> set[str]:
        """The files of `work/out`, without those beside."""
        out = work / "out"
        return {str(path.relative_to(out)) for path in files_in(out)} - set(self.beside)


class Directory(Case):
    """The directory writer alone."""

    told = "a directory, exchanged in one step"
    size = 20_000

    def act(self, work: Path, number: int) -> None:
        with atomic_directory(work / "out") as staging:
            (staging / WEIGHTS).write_text(f"{number} " * self.size)
            (staging / CONFIG).write_text(f"{number}")

    def read(self, work: Path) -> str:
        if not (work / "out").exists():
            return ABSENT
        number = (work / "out" / CONFIG).read_text()
        assert (work / "out" / WEIGHTS).read_text() == f"{number} " * self.size
        assert self.names(work) == {CONFIG, WEIGHTS}
        return number


class DirectoryByRenames(Directory):
    """Where the system has no exchange of directories."""

    told = "a directory, by two renames"

    def act(self, work: Path, number: int) -> None:
        swap_call = exchange._swap_call
        exchange._swap_call = lambda libc: None
        try:
            super().act(work, number)
        finally:
            exchange._swap_call = swap_call

    def read(self, work: Path) -> str:
        # What every reader does first.
        recover(work / "out")
        return super().read(work)


class SaveStage(Case):
    """A stage over itself; data, metrics, config and every number are the version."""

    told = "save_stage"

    def prepare(self, work: Path) -> None:
        config = LoraConfig(r=256, target_modules=["0"])
        self.model = begin_stage(seeded_wide(), name="chat", config=config)

    def act(self, work: Path, number: int) -> None:
        config = {**self.model.stage.config, "lora_dropout": number / 1e6}
        self.model.stage = replace(self.model.stage, config=config)
        _fill(self.model, number)
        save_stage(self.model, work / "out", metrics={"number": number}, data=number)

    def read(self, work: Path) -> str:
        out = work / "out"
        if not out.exists():
            return ABSENT
        record = lineage(out)
        (stage,) = record.stages
        assert isinstance(stage.data, int)
        assert stage.metrics == {"number": stage.data}
        assert record.laminae[0].config["lora_dropout"] == stage.data / 1e6
        assert json.loads((out / CONFIG).read_text())["lora_dropout"] == stage.data / 1e6
        assert _filled_with(out / WEIGHTS) == stage.data
        assert load(out, seeded_wide()).active_adapters == ["chat"]
        assert self.names(work) == {CONFIG, WEIGHTS}
        return str(stage.data)


class SavePretrained(Case):
    """Two adapters, one of them in a folder."""

    told = "save_pretrained of two adapters"
    make = staticmethod(get_peft_model)
    config_class: Any = LoraConfig
    more: frozenset[str] = frozenset()

    def prepare(self, work: Path) -> None:
        config = self.config_class(r=64, target_modules=["0"])
        self.model = self.make(wide(), config)
        self.model.add_adapter("other", config)

    def act(self, work: Path, number: int) -> None:
        _fill(self.model, number, "lora_")
        for config in self.model.peft_config.values():
            config.lora_dropout = number / 1e6
        self.model.save_pretrained(work / "out")

    def read(self, work: Path) -> str:
        out = work / "out"
        if not out.exists():
            return ABSENT
        seen = set()
        for folder in (out, out / "other"):
            seen.add(round(json.loads((folder / CONFIG).read_text())["lora_dropout"] * 1e6))
            seen.add(_filled_with(folder / WEIGHTS))
        (number,) = seen
        both = {CONFIG, WEIGHTS, f"other/{CONFIG}", f"other/{WEIGHTS}"}
        assert self.names(work) == both | self.more
        return str(number)


class DropIn(SavePretrained):
    """The same by the facade that stands in for peft."""

    told = "save_pretrained of the drop-in"
    make = staticmethod(adapting.get_peft_model)
    config_class = lora_config.LoraConfig
    more = frozenset({"README.md"})


class FromInputs(Case):
    """A result that is made of files: its bytes are those of one of two references."""

    sources = ("even", "odd")
    others: tuple[str, ...] = ()

    def label(self, number: int) -> str:
        return self.sources[number % 2]

    def read(self, work: Path) -> str:
        if not (work / "out").exists():
            return ABSENT
        here = _content(work / "out", without=self.beside)
        different = {}
        for label in self.sources:
            there = _content(work / "references" / label)
            different[label] = [n for n in {*here, *there} if here.get(n) != there.get(n)]
            if not different[label]:
                return label
        raise AssertionError(f"out is neither: {different}")

    def make_references(self, work: Path) -> None:
        for number, label in enumerate(self.sources):
            self.act(work, number)
            (work / "references").mkdir(exist_ok=True)
            shutil.move(work / "out", work / "references" / label)


class Merge(FromInputs):
    """`lamina merge` into a base of several shards."""

    told = "merge of a sharded base"

    def prepare(self, work: Path) -> None:
        # It looks for room before it begins; here others take that away afterwards.
        merged_streaming._refuse_too_small = lambda place, sizes: None
        base = models.tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=3)
        base.save_pretrained(work / "base", max_shard_size="200KB")
        for file in files_in(work / "base"):
            # Some are made for their owner only.
            file.chmod(0o644)
        for seed, label in enumerate(self.sources):
            model = get_peft_model(base, llama_lora())
            fill_trainable(model, seed)
            model.save_pretrained(work / label)
            base = model.unload()
        self.make_references(work)

    def act(self, work: Path, number: int) -> None:
        save_merged(work / self.label(number), work / "out", base=str(work / "base"), force=True)

    def forget(self, work: Path) -> None:
        shutil.rmtree(work / ".out.merging", ignore_errors=True)


class Flatten(FromInputs):
    """`lamina flatten` of a chain of two stages."""

    told = "flatten of two stages"

    def prepare(self, work: Path) -> None:
        for seed, label in enumerate(self.sources):
            stages = [("first", None), (label, "stack")]
            parent = None
            for name, mode in stages:
                base = models.tiny_llama()
                model = begin_stage(base, name=name, parent=parent, mode=mode, config=llama_lora())
                fill_trainable(model, seed)
                parent = work / name
                save_stage(model, parent)
        self.make_references(work)

    def act(self, work: Path, number: int) -> None:
        flatten(work / self.label(number), work / "out", force=True)


class Edit(FromInputs):
    """`lamina edit` of a directory in place."""

    told = "edit in place"
    others = Case.others

    def prepare(self, work: Path) -> None:
        model = begin_stage(models.tiny_llama(), name="seed", config=llama_lora())
        fill_trainable(model)
        save_stage(model, work / "seed")
        self.make_references(work)

    def act(self, work: Path, number: int) -> None:
        out, new = work / "out", self.label(number)
        if not out.exists():
            rename_stage(work / "seed", "seed", new, out)
        elif (old := lineage(out).newest.name) != new:
            # Another process may have given it the new name since.
            with suppress(StageError):
                rename_stage(out, old, new)


CASES: dict[str, type[Case]] = {
    "directory": Directory,
    "renames": DirectoryByRenames,
    "stage": SaveStage,
    "pretrained": SavePretrained,
    "dropin": DropIn,
    "merge": Merge,
    "flatten": Flatten,
    "edit": Edit,
}


def seeded_wide() -> torch.nn.Module:
    """The same in every process."""
    with models.seeded(0):
        return wide()


def _fill(model: torch.nn.Module, number: int, pattern: str = "") -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or (pattern and pattern in name):
            parameter.data.fill_(number)


def _filled_with(path: Path) -> int:
    tensors = load_file(path)
    assert len(tensors) == 2
    (number,) = {float(bound) for tensor in tensors.values() for bound in torch.aminmax(tensor)}
    return int(number)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        # The strings in the header are written in any order.
        start = data_start(path)
        header = json.dumps(json.loads(content[8:start]), sort_keys=True)
        content = header.encode() + content[start:]
    return hashlib.sha256(_DATE.sub(b"", content)).hexdigest()


def _content(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    files = {str(path.relative_to(folder)): path for path in files_in(folder)}
    return {name: digest(path) for name, path in files.items() if name not in without}


def _is_input(work: Path, path: Path) -> bool:
    top = path.relative_to(work).parts[0]
    return top != "out" and not top.startswith(".")
