"""Indexes of shards."""

from __future__ import annotations

import json
from pathlib import Path

from lamina.storage.shards import weight_map


def test_a_file_has_one_name(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    table = {"a": "./one.safetensors", "b": "one.safetensors", "c": "in//two.safetensors"}
    index.write_text(json.dumps({"weight_map": table}))
    assert weight_map(index, "index") == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "in/two.safetensors",
    }
