"""Mutators of stage records and of indices of shards."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.torture.fuzz_bytes import Mutator, weights_in
from tests.torture.fuzz_headers import parts, put
from tests.torture.fuzz_json import dumps, rewritten, strange

Record = dict[str, Any]
HOSTILE_NAMES = [
    "",
    ".",
    "..",
    "../../up",
    "/etc/cron.d/x",
    "a/b",
    "a\\b",
    "C:\\x",
    "a.b",
    "\0",
    "a\0b",
    "\ud800",
    "x" * 100_000,
    "\x1b[31m",
    "\u202e",
    "train",
    "__base__",
    "__class__",
    "default",
    "CON",
    "e\u0301",
    " ",
    "a\nb",
]


def _edit(rng: random.Random, path: Path, edit: Callable[[Record], str]) -> str | None:
    for file in weights_in(path):
        header, data = parts(file)
        told = header.get("__metadata__", {}).get("lamina")
        if told is not None:
            record = json.loads(told)
            done = edit(record)
            header["__metadata__"]["lamina"] = json.dumps(record)
            put(file, dumps(header), data)
            return done
    return None


def _places(value: Any, parent: Any = None, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a record."""
    if parent is not None:
        yield parent, key
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for inner, item in items:
        yield from _places(item, value, inner)


def record_value(rng: random.Random, path: Path) -> str | None:
    def edit(record: Record) -> str:
        container, key = rng.choice([*_places(record)])
        container[key] = strange(rng)
        return f"record: {key!r} is {str(container[key])[:50]!r}"

    return _edit(rng, path, edit)


def record_without(rng: random.Random, path: Path) -> str | None:
    def edit(record: Record) -> str:
        container, key = rng.choice([*_places(record)])
        container.pop(key)
        return f"record without {key!r}"

    return _edit(rng, path, edit)


def record_version(rng: random.Random, path: Path) -> str | None:
    def edit(record: Record) -> str:
        versions = [0, -1, 2, 99, 10**30, 1.0, 99.0, 1.5, "1", "99", True, None, [1], "2.0"]
        record["format_version"] = rng.choice(versions)
        return f"format_version {record['format_version']!r}"

    return _edit(rng, path, edit)


def record_ranks(rng: random.Random, path: Path) -> str | None:
    def edit(record: Record) -> str:
        lamina = rng.choice(record["laminae"])
        module = rng.choice(sorted(lamina["ranks"]))
        rank = rng.choice([0, -1, 1, 3, 5, 10**12, 10**30, 2.0, 2.5, "4", True, None])
        if rng.random() < 0.3:
            del lamina["ranks"][module]
            return f"no rank of {module}"
        lamina["ranks"][rng.choice([module, "x", "../x", ""])] = rank
        return f"rank of {module}: {rank!r}"

    return _edit(rng, path, edit)


def record_order(rng: random.Random, path: Path) -> str | None:
    """Laminae or stages in another order, twice, or fewer."""

    def edit(record: Record) -> str:
        field = rng.choice(["laminae", "stages"])
        kind = rng.choice(["reversed", "twice", "none", "first only"])
        values = record[field]
        record[field] = {
            "reversed": values[::-1],
            "twice": values * 2,
            "none": [],
            "first only": values[:1],
        }[kind]
        return f"{field} {kind}"

    return _edit(rng, path, edit)


def record_names(rng: random.Random, path: Path) -> str | None:
    """Hostile names of stages, everywhere, so that the record agrees with itself."""

    def edit(record: Record) -> str:
        name = rng.choice(HOSTILE_NAMES)
        old = record["stages"][-1]["name"]
        record["stages"][-1]["name"] = name
        for lamina in record["laminae"]:
            lamina["stage"] = name if lamina["stage"] == old else lamina["stage"]
        for field in ("saved_modules", "biases"):
            owners = record[field]
            record[field] = {k: name if v == old else v for k, v in owners.items()}
        return f"a stage is called {name[:40]!r}"

    return _edit(rng, path, edit)


def record_many(rng: random.Random, path: Path) -> str | None:
    def edit(record: Record) -> str:
        count = rng.choice([*[100, 3_000] * 3, 30_000])
        kind = rng.choice(["stages", "laminae", "ranks", "saved", "tensors of a sketch", "tokens"])
        first = record["stages"][0]
        match kind:
            case "stages":
                more = [{"name": f"s{i}", "mode": "continue"} for i in range(count)]
                record["stages"] = [first, *more, *record["stages"][1:]]
            case "laminae":
                more = [{"stage": first["name"], "config": {}, "ranks": {}}] * count
                record["laminae"] = [*more, *record["laminae"]]
            case "ranks":
                record["laminae"][0]["ranks"].update({f"m{i}": 2**40 for i in range(count)})
            case "saved":
                record["saved_modules"] = {f"m{i}": first["name"] for i in range(count)}
            case "tensors of a sketch":
                first["base"]["sketch"] = {
                    "tensors": ["layers.{0-999999999}.x 9999999999x9999999999"] * count,
                    "samples": 10**12,
                    "values": "AAAA",
                }
            case "tokens":
                answers = {
                    "tokens": [[1]] * count,
                    "logits": [[1.0]],
                    "log_normaliser": [],
                    "digest": [],
                    "largest": 1.0,
                }
                first["probe"] = {
                    "tokens": [10**12] * count,
                    "outputs": 10**15,
                    "dtype": "float32",
                    "chain": answers,
                }
        return f"{count} {kind}"

    return _edit(rng, path, edit)


def record_evidence(rng: random.Random, path: Path) -> str | None:
    """Lies in what the record knows of the base's weights and of the answers."""

    def edit(record: Record) -> str:
        stage = rng.choice(record["stages"])
        found = [
            place
            for part in (stage["base"].get("sketch"), stage.get("probe"))
            if part
            for place in _places(part)
        ]
        if not found:
            stage["base"]["sketch"] = strange(rng)
            stage["probe"] = strange(rng)
            return "strange evidence"
        container, key = rng.choice(found)
        value = container[key]
        lies = [strange(rng)]
        if isinstance(value, list):
            lies += [value * 100, value[:-1], []]
        if isinstance(value, str):
            lies += [value[:-3], value * 2, "A" * 10_000_000, "not base64!"]
        if isinstance(value, int):
            lies += [value + 1, -value, 10**9, 10**18]
        container[key] = rng.choice(lies)
        return f"evidence: {key!r} is {str(container[key])[:40]!r}"

    return _edit(rng, path, edit)


def record_config(rng: random.Random, path: Path) -> str | None:
    """A config inside of the record that is no config."""

    def edit(record: Record) -> str:
        config = rng.choice(record["laminae"])["config"]
        name = rng.choice([*config, "peft_type", "target_modules", "r", "lora_alpha", "new"])
        config[name] = strange(rng)
        return f"config in the record: {name} = {str(config[name])[:40]!r}"

    return _edit(rng, path, edit)


def record_text(rng: random.Random, path: Path) -> str | None:
    for file in weights_in(path):
        header, data = parts(file)
        told = header.get("__metadata__", {}).get("lamina")
        if told is not None:
            done, text = rewritten(rng, told)
            header["__metadata__"]["lamina"] = text.decode("utf-8", errors="replace")
            put(file, dumps(header), data)
            return f"record: {done}"
    return None


def _index_in(path: Path) -> Path | None:
    return next(iter(sorted(path.glob("*.index.json"))), None)


def index_names(rng: random.Random, path: Path) -> str | None:
    file = _index_in(path)
    if file is None:
        return None
    index = json.loads(file.read_text())
    old = rng.choice(sorted(set(index["weight_map"].values())))
    shutil.copy(path / old, path.parent / "outside.safetensors")
    name = rng.choice(
        [
            "../outside.safetensors",
            str(path.parent / "outside.safetensors"),
            "sub/../../outside.safetensors",
            "..\\outside.safetensors",
            "C:\\outside.safetensors",
            "C:outside.safetensors",
            "\\\\server\\share\\x.safetensors",
            "//server/x.safetensors",
            "~/x.safetensors",
            "file:///x.safetensors",
            old.upper(),
            old + "\0",
            old + "\0.safetensors",
            "\ud800.safetensors",
            "x" * 5000 + ".safetensors",
            "adapter_model.bin",
            "adapter_model.safetensors.pkl",
            ".safetensors",
            "",
            "./" + old,
            "sub//" + old,
            "e\u0301.safetensors",
            7,
            None,
            [old],
            {"a": old},
        ]
    )
    weight_map = index["weight_map"]
    index["weight_map"] = {key: name if n == old else n for key, n in weight_map.items()}
    file.write_bytes(dumps(index))
    return f"a shard is called {str(name)[:60]!r}"


def index_entries(rng: random.Random, path: Path) -> str | None:
    file = _index_in(path)
    if file is None:
        return None
    index = json.loads(file.read_text())
    weight_map = index["weight_map"]
    key = rng.choice(sorted(weight_map))
    kind = rng.choice(["gone", "more", "moved", "strange", "only some", "many", "metadata"])
    match kind:
        case "gone":
            del weight_map[key]
        case "more":
            weight_map[key + "x"] = weight_map[key]
        case "moved":
            weight_map[key] = rng.choice(sorted(set(weight_map.values()) - {weight_map[key]}))
        case "strange":
            index["weight_map"] = strange(rng)
        case "only some":
            kept = weight_map[key]
            index["weight_map"] = {k: n for k, n in weight_map.items() if n == kept}
        case "many":
            weight_map.update({f"x{i}": f"x{i}.safetensors" for i in range(50_000)})
        case "metadata":
            index["metadata"] = strange(rng)
    file.write_bytes(dumps(index))
    return f"index: {kind}"


def index_text(rng: random.Random, path: Path) -> str | None:
    file = _index_in(path)
    if file is None:
        return None
    told, text = rewritten(rng, file.read_text())
    file.write_bytes(text)
    return f"index: {told}"


# The kinds that a mutator needs; others are drawn again.
WITH_RECORD: list[Mutator] = [
    record_value,
    record_value,
    record_without,
    record_version,
    record_ranks,
    record_order,
    record_names,
    record_many,
    record_evidence,
    record_config,
    record_text,
]
WITH_INDEX: list[Mutator] = [index_names, index_names, index_entries, index_text]
