"""Directories that are broken: each a finding with its cure, and the rest is looked at."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lamina.checkpoint.doctor import Examination, Finding, examine
from lamina.errors import CheckpointError, ConfigError
from tests.checkpoint.doctor.made import CONFIG, WEIGHTS, Parts, chain, key, plain

INDEX = "adapter_model.safetensors.index.json"
SHARDS = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = plain().write(tmp_path / "adapter")
    assert examine(path).findings == ()
    return path


def only(found: Examination, code: str) -> Finding:
    (finding,) = [each for each in found.findings if each.code == code]
    assert finding.what
    assert finding.cure
    return finding


def sharded(path: Path, parts: Parts | None = None) -> None:
    parts = parts or plain()
    halves = [{}, {}]
    for position, (name, tensor) in enumerate(sorted(parts.tensors.items())):
        halves[position % 2][name] = tensor
    table = {name: SHARDS[i] for i, half in enumerate(halves) for name in half}
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file(half, path / shard)
    (path / INDEX).write_text(json.dumps({"weight_map": table}))


# --- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "", "\xff\xfe"])
def test_a_config_that_is_none(adapter: Path, text: str) -> None:
    (adapter / CONFIG).write_bytes(text.encode("latin1"))
    parts = plain()
    parts.tensors[key(0, "q_proj", "A")][0, 0] = float("nan")
    save_file(parts.tensors, adapter / WEIGHTS)
    found = examine(adapter)
    assert only(found, "config-unreadable").where == (CONFIG,)
    # The weights are looked at all the same.
    assert only(found, "not-finite").where == (key(0, "q_proj", "A"),)
    assert any("adapter_config.json can't be read" in line for line in found.unchecked)


def test_no_config(adapter: Path) -> None:
    (adapter / CONFIG).unlink()
    assert only(examine(adapter), "config-missing").severity == "error"
    (adapter / "config.json").write_text("{}")
    assert "not an adapter" in only(examine(adapter), "full-model").what


def test_an_adapter_in_a_folder(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 10):
        shutil.copytree(adapter, run / f"checkpoint-{step}")
    found = only(examine(run), "adapter-elsewhere")
    assert "checkpoint-10" in found.cure
    assert found.cure.startswith("lamina doctor")
    assert examine(run, subfolder="checkpoint-10").healthy


# --- the weights ---------------------------------------------------------------------------------


def test_no_weights(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    assert only(examine(adapter), "weights-missing").severity == "error"
    (adapter / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert "another tool" in only(examine(adapter), "weights-missing").cure


def test_a_pickle_alone_and_beside(adapter: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"never opened")
    assert only(examine(adapter), "pickle-twin").severity == "warning"
    (adapter / WEIGHTS).unlink()
    found = examine(adapter)
    assert only(found, "pickle-only").severity == "error"
    assert "weights-missing" not in found.codes()


@pytest.mark.parametrize("cut", [1, 1000, 10**9])
def test_a_file_that_was_cut_off(adapter: Path, cut: int) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[: max(4, len(whole) - cut)])
    code = "file-cut-off" if cut < len(whole) else "weights-unreadable"
    assert only(examine(adapter), code).severity == "error"


def test_a_pointer_of_git_lfs(adapter: Path) -> None:
    (adapter / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in only(examine(adapter), "lfs-pointer").cure


def test_bytes_behind_the_tensors_and_gaps_between_them(adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole + b"\0" * 7)
    assert only(examine(adapter), "layout-broken").where
    header = header_of(whole)
    name = max(header, key=lambda each: header[each]["data_offsets"][1])
    header[name]["shape"][0] -= 1
    (adapter / WEIGHTS).write_bytes(with_header(whole, header))
    assert name in only(examine(adapter), "layout-broken").where[0]


def header_of(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header


def with_header(content: bytes, header: dict[str, Any]) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize(
    "entry",
    [{}, {"dtype": "F32"}, {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, None, [], 7],
)
def test_a_header_that_makes_no_sense(adapter: Path, entry: Any) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    header = header_of(whole)
    header[key(0, "q_proj", "A")] = entry
    (adapter / WEIGHTS).write_bytes(with_header(whole, header))
    found = examine(adapter)
    assert only(found, "weights-unreadable").where
    assert "check-failed" not in found.codes()


def test_two_adapters_in_one_file(adapter: Path) -> None:
    parts = plain()
    names = list(parts.tensors)
    tensors = {
        n.replace(".weight", f".{a}.weight"): parts.tensors[n].clone() for n in names for a in "xy"
    }
    save_file(tensors, adapter / WEIGHTS)
    assert len(only(examine(adapter), "names-collide").where) == len(names)


# --- shards --------------------------------------------------------------------------------------


def test_shards_are_read_as_one(adapter: Path) -> None:
    sharded(adapter)
    assert only(examine(adapter), "stale-shards").where[0] == INDEX
    (adapter / WEIGHTS).unlink()
    assert [f.code for f in examine(adapter).findings] == ["vllm-refuses"]
    assert examine(adapter, target="vllm").codes("error") == ["vllm-refuses"]


def break_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        table = json.loads((path / INDEX).read_text())["weight_map"]
        change(table)
        (path / INDEX).write_text(json.dumps({"weight_map": table}))

    return apply


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("shard-missing", lambda path: (path / SHARDS[1]).unlink()),
        ("shard-stray", lambda p: shutil.copy(p / SHARDS[1], p / SHARDS[1].replace("2-", "3-"))),
        ("index-broken", lambda path: (path / INDEX).write_text("{")),
        ("index-broken", break_index(lambda table: table.update(x="../../x.safetensors"))),
        ("index-contradicts", break_index(lambda t: t.update({min(t): SHARDS[1]}))),
        ("index-contradicts", break_index(lambda table: table.popitem())),
    ],
)
def test_an_index_that_lies(adapter: Path, code: str, change: Callable[[Path], object]) -> None:
    (adapter / WEIGHTS).unlink()
    sharded(adapter)
    change(adapter)
    assert only(examine(adapter), code).where


# --- the directory -------------------------------------------------------------------------------


def test_links_that_lead_nowhere_and_empty_files(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to("nowhere")
    assert only(examine(adapter), "link-broken").where == (WEIGHTS,)
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).touch()
    assert only(examine(adapter), "file-empty").where == (WEIGHTS,)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(adapter: Path) -> None:
    (adapter / WEIGHTS).chmod(0)
    assert "chmod" in only(examine(adapter), "file-unreadable").cure


def test_a_save_that_was_cut_off(adapter: Path) -> None:
    (adapter.parent / f".{adapter.name}.saving-99999999-0123456701234567").mkdir()
    assert only(examine(adapter), "save-cut-off").severity == "note"


def test_nothing_is_changed(adapter: Path) -> None:
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in adapter.iterdir()}
    examine(adapter)
    assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in adapter.iterdir()} == before


def test_no_directory_and_no_such_target(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no directory"):
        examine(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no target 'tgi'"):
        examine(adapter, target="tgi")


# --- anything at all -----------------------------------------------------------------------------

STRANGE = (None, True, -1, 0, 2.5, 10**400, "", "(", "x" * 9, [], [None], [[1]], {}, {"a": None})


@pytest.mark.parametrize("field", sorted(chain().config))
def test_any_value_of_any_field_leads_to_findings(field: str, tmp_path: Path) -> None:
    for position, value in enumerate(STRANGE):
        parts = chain()
        parts.config[field] = value
        found = examine(parts.write(tmp_path / str(position)))
        json.dumps(found.to_dict(), allow_nan=False)
        assert "check-failed" not in found.codes()


def test_more_patterns_than_can_be_looked_up(adapter: Path) -> None:
    parts = plain()
    parts.config["rank_pattern"] = {f".*layer{i}": 4 for i in range(100_000)}
    found = examine(parts.write(adapter))
    assert only(found, "patterns-too-many").severity == "error"


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_lead_to_findings(seed: int, adapter: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    content = bytearray((adapter / WEIGHTS).read_bytes())
    for _ in range(3):
        place = int(torch.randint(0, 2500, (1,), generator=generator))
        content[place] = int(torch.randint(0, 256, (1,), generator=generator))
    (adapter / WEIGHTS).write_bytes(content)
    json.dumps(examine(adapter).to_dict(), allow_nan=False)
