"""What reads a mutant, and whether it has read it right."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import lamina
from lamina.checkpoint.adapter import read_adapter
from lamina.checkpoint.describe import describe_adapter
from lamina.checkpoint.doctor import examine
from lamina.cli import app
from lamina.config import AdaLoraConfig, LoraConfig, PeftConfig
from lamina.engine.layers import lora_layers
from lamina.model import PeftModel, get_peft_model_state_dict
from lamina.stages.diff import diff
from lamina.stages.edit import drop_last_stage, rename_stage
from lamina.stages.export import check_export, export
from lamina.stages.flatten import flatten
from lamina.stages.lineage import lineage
from lamina.stages.split import split
from lamina.stages.verify import verify
from tests.stages.chains import answer
from tests.torture.fuzz_configs import SLOW_PATTERNS
from tests.torture.fuzz_corpus import BASES, CONFIG, KINDS, PICKLE

# It can't open these, or does something else with them than what was trained.
_NOT_IN_PEFT = ("sharded", "pickle", "convolutions", "PiSSA", "chain")
# 2 is an error that is told; doctor has codes for warnings and errors that it finds.
_EXIT_CODES = {"doctor": (0, 1, 2, 3), "verify": (0, 1, 2)}
_PARTS_OF_NAMES = ("base_model.model.", "module.", "_orig_mod.", ".default")


class WrongError(AssertionError):
    """A mutant was read, but not as what it is."""


@dataclass(frozen=True)
class Subject:
    """A mutant to be read.

    Attributes:
        path: its directory.
        kind: what it was made from.
        corpus: where that lies.
    """

    path: Path
    kind: str
    corpus: Path

    @property
    def options(self) -> dict[str, Any]:
        return {"allow_pickle": True} if self.kind == "pickle" else {}


@cache
def _pristine(name: str) -> nn.Module:
    return BASES[name]()


class _Base:
    """A base for one use; it has to be as it was if that fails."""

    def __init__(self, subject: Subject) -> None:
        self.original = _pristine(KINDS[subject.kind].base)
        self.model = copy.deepcopy(self.original)

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, lamina.LaminaError):
            return
        ours, theirs = self.model.state_dict(), self.original.state_dict()
        if list(ours) != list(theirs):
            raise WrongError("a load that failed left something in the base")
        changed = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        if changed:
            raise WrongError(f"a load that failed changed {changed[:3]} of the base")


def _inspect(subject: Subject) -> None:
    found = describe_adapter(subject.path, **subject.options)
    json.dumps(found.to_dict(), allow_nan=False).encode()


def _cli(subject: Subject, verb: str, *more: str) -> None:
    result = CliRunner().invoke(app, [verb, str(subject.path), *more])
    if result.exit_code not in _EXIT_CODES.get(verb, (0, 2)):
        raise WrongError(f"lamina {verb} ends with {result.exit_code}") from result.exception
    told = result.output
    if "Traceback" in told or any(mark in told for mark in ("\x1b", "\u202e", "\0")):
        raise WrongError(f"lamina {verb} passes control characters on")


def _lineage(subject: Subject) -> None:
    lineage(subject.path, **subject.options).model_dump_json()


def _read(subject: Subject) -> None:
    file = read_adapter(subject.path, **subject.options)
    expected = tensors_of(subject)
    if list(file.tensors) != list(expected) and set(file.tensors) != set(expected):
        raise WrongError("read_adapter has other names than the file")
    for name, tensor in file.tensors.items():
        if tensor.dtype != expected[name].dtype or not _same(tensor, expected[name]):
            raise WrongError(f"read_adapter has other values of {name}")


def tensors_of(subject: Subject, directory: Path | None = None) -> dict[str, Tensor]:
    """The tensors of a directory, read by the library of safetensors alone."""
    path = subject.path if directory is None else directory
    if subject.kind == "pickle":
        loaded: dict[str, Tensor] = torch.load(path / PICKLE, weights_only=True)
        return loaded
    single = path / "adapter_model.safetensors"
    if single.is_file():
        return load_file(single)
    index = json.loads((path / "adapter_model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        found.update(load_file(path / shard))
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.is_floating_point:
        return torch.equal(torch.nan_to_num(one.float()), torch.nan_to_num(other.float()))
    return torch.equal(one, other)


def _load(subject: Subject) -> None:
    with _Base(subject) as base:
        model = lamina.load(subject.path, base, **subject.options)
        check(model, subject)


def _from_pretrained(subject: Subject) -> None:
    with _Base(subject) as base:
        model = PeftModel.from_pretrained(base, subject.path, **subject.options).eval()
        check(model, subject)


def _begin(subject: Subject, mode: str) -> None:
    config = None
    if mode != "continue":
        task = "CAUSAL_LM" if KINDS[subject.kind].base == "llama" else None
        config = LoraConfig(r=2, target_modules="all-linear", task_type=task)
    with _Base(subject) as base:
        model = lamina.begin_stage(
            base, name="next", parent=subject.path, mode=mode, config=config, **subject.options
        ).eval()
        if _unchanged(subject) and mode != "merge":
            _check_answer(model, subject, 1e-3)


def check(model: PeftModel, subject: Subject) -> None:
    """Whether a loaded model holds what the files say.

    Raises:
        WrongError: it doesn't.
    """
    name = model.active_adapter
    config = model.peft_config[name]
    if not isinstance(config, AdaLoraConfig):
        _check_tensors(get_peft_model_state_dict(model, adapter_name=name), tensors_of(subject))
    _check_scalings(model, name, json.loads((subject.path / CONFIG).read_text()))
    if _unchanged(subject):
        _check_answer(model, subject, 1e-6)


def _plain(name: str) -> str:
    for part in _PARTS_OF_NAMES:
        name = name.replace(part, "")
    return name.replace(".base_layer", "")


def _check_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    expected = {_plain(name): tensor for name, tensor in theirs.items()}
    for name, tensor in ours.items():
        other = expected.get(_plain(name))
        if other is None:
            raise WrongError(f"{name} is in the model, not in the file")
        if not _same(tensor, other.to(tensor.dtype)):
            raise WrongError(f"{name} has other values than the file")


def _check_scalings(model: PeftModel, adapter: str, values: dict[str, Any]) -> None:
    """By the rules of peft, from the JSON alone."""
    tables = [values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}]
    if any(key in SLOW_PATTERNS for table in tables for key in table) or any(
        len(table) > 1000 for table in tables
    ):
        return
    if values.get("peft_type") == "ADALORA":
        # Its forward divides by the rank that it began with.
        return
    for name, layer in lora_layers(model.get_base_model()):
        if adapter not in layer.records or not layer.records[adapter].r or layer.kind == "tokens":
            continue
        record = layer.records[adapter]
        r = _by(tables[0], name, values.get("r", 8))
        alpha = _by(tables[1], name, values.get("lora_alpha", 8))
        expected = alpha / (math.sqrt(r) if values.get("use_rslora") else r)
        if hasattr(record, "config") and not math.isclose(record.scaling, expected, rel_tol=1e-9):
            raise WrongError(f"{name} has scaling {record.scaling}, the file says {expected}")


def _by(table: dict[str, Any], name: str, default: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return table.get(get_pattern_key(table, name), default)


def _unchanged(subject: Subject) -> bool:
    """Whether a mutant says what it was made from."""
    original = subject.corpus / subject.kind
    try:
        ours = json.loads((subject.path / CONFIG).read_text())
        theirs = json.loads((original / CONFIG).read_text())
        if PeftConfig.from_dict(ours).to_dict() != PeftConfig.from_dict(theirs).to_dict():
            return False
        held, before = tensors_of(subject), tensors_of(subject, original)
    except Exception:
        return False
    return held.keys() == before.keys() and all(
        held[n].dtype == before[n].dtype and _same(held[n], before[n]) for n in held
    )


def _check_answer(model: PeftModel, subject: Subject, tolerance: float) -> None:
    expected = expected_answer(subject.kind, subject.corpus)
    actual = _answer(model)
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
        raise WrongError("the same files give other answers")


def _answer(model: nn.Module) -> Tensor:
    if isinstance(getattr(model, "get_base_model", lambda: model)(), type(BASES["mixture"]())):
        with torch.no_grad():
            out: Tensor = model(torch.linspace(-1, 1, 16).reshape(4, 4))
        return out
    return answer(model)


@cache
def expected_answer(kind: str, corpus: Path) -> Tensor:
    """What the valid directory of a kind answers, loaded by the real peft where that can."""
    options = {"allow_pickle": True} if kind == "pickle" else {}
    model = PeftModel.from_pretrained(
        copy.deepcopy(_pristine(KINDS[kind].base)), corpus / kind, **options
    )
    return _answer(model.eval())


def _out(subject: Subject, name: str) -> Path:
    return subject.path.parent / f"out-{name}"


def _export_check(subject: Subject) -> None:
    targets = ("vllm", "gguf", "mlx", "ollama", "peft")
    chosen = targets[int(subject.path.parent.name.rpartition("-")[2]) // 2 % len(targets)]
    check_export(subject.path, target=chosen, **subject.options)


def _export(subject: Subject) -> None:
    export(subject.path, _out(subject, "peft"), target="peft", **subject.options)


def _flatten(subject: Subject) -> None:
    flatten(subject.path, _out(subject, "flat"), **subject.options)


def _split(subject: Subject) -> None:
    split(subject.path, _out(subject, "parts"), **subject.options)


def _edit(subject: Subject) -> None:
    newest = lineage(subject.path, **subject.options).newest.name
    rename_stage(subject.path, newest, "renamed", out=_out(subject, "named"), **subject.options)
    drop_last_stage(subject.path, out=_out(subject, "dropped"), **subject.options)


def _verify(subject: Subject) -> None:
    with _Base(subject) as base:
        report = verify(subject.path, base, **subject.options)
    json.dumps(report.to_dict()).encode()


def _doctor(subject: Subject) -> None:
    json.dumps(examine(subject.path).to_dict()).encode()


def _diff(subject: Subject) -> None:
    str(diff(subject.path, subject.corpus / subject.kind)).encode()


def _as_peft(subject: Subject) -> None:
    """What is loaded answers as it does in the real peft, where that opens it too."""
    with _Base(subject) as base:
        ours = PeftModel.from_pretrained(base, subject.path, **subject.options).eval()
    text = (subject.path / CONFIG).read_text()
    # The real peft hangs on these.
    slow = len(text) > 20_000 or any(pattern in SLOW_PATTERNS for pattern in _strings(text))
    # It drops what is spelled in another way, in silence.
    names = tensors_of(subject, subject.corpus / subject.kind).keys()
    if slow or tensors_of(subject).keys() != names or subject.kind in _NOT_IN_PEFT:
        return
    try:
        with _Base(subject) as base, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(base, str(subject.path)).eval()
            expected = _answer(theirs)
    except Exception:
        return
    if not torch.allclose(_answer(ours), expected, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise WrongError("the real peft answers something else")


def _strings(text: str) -> set[str]:
    found: set[str] = set()
    left: list[Any] = [json.loads(text)]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str):
            found.add(value)
    return found


_OTHERS: dict[str, Callable[[Subject], None]] = {
    "lamina inspect": lambda subject: _cli(subject, "inspect"),
    "lamina lineage": lambda subject: _cli(subject, "lineage"),
    "lamina verify": lambda subject: _cli(subject, "verify", "--json"),
    "lamina diff": lambda subject: _cli(subject, "diff", str(subject.path), "--json"),
    "lamina inspect --json": lambda subject: _cli(subject, "inspect", "--json"),
    "lamina doctor": lambda subject: _cli(subject, "doctor"),
    "as peft": _as_peft,
    "doctor": _doctor,
    "verify": _verify,
    "flatten": _flatten,
    "split": _split,
    "edit": _edit,
    "diff": _diff,
    "export --check": _export_check,
    "export": _export,
}


def consumers(number: int) -> Iterator[tuple[str, Callable[[Subject], None]]]:
    """What reads the case of that number, by name."""
    yield "inspect", _inspect
    yield "lineage", _lineage
    yield "read", _read
    yield "load", _load
    yield "from_pretrained", _from_pretrained
    mode = ("continue", "stack", "merge")[number % 3]
    yield f"begin {mode}", lambda subject: _begin(subject, mode)
    others = [*_OTHERS.items()]
    for step in (0, 3, 7):
        yield others[(number + step) % len(others)]
