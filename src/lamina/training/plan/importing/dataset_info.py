"""LLaMA-Factory's dataset_info.json: names of data sets -> where they are and how laid out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamina.errors import nearest

_NAME = "dataset_info.json"
# Its columns of examples with an instruction -> those that a plan expects.
_ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
}
_OTHER = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label", "tools": "tools"}
_KNOWN = {
    "file_name",
    "hf_hub_url",
    "subset",
    "split",
    "hf_revision",
    "num_samples",
    "formatting",
    "ranking",
    "columns",
    "tags",
    "ms_hub_url",
    "om_hub_url",
}


class DatasetInfo:
    """The file, if it is there.

    Args:
        source: the YAML file that names data sets.
        folder: its `dataset_dir`.
        note: takes (key, why, cure) of what can't be carried over.
    """

    def __init__(self, source: str, folder: Any, note: Callable[[str, str, str], None]) -> None:
        self._note = note
        self._folder = Path(str(folder))
        self._table: dict[str, Any] = {}
        beside = Path(source).resolve().parent
        for place in (self._folder, beside / self._folder, beside):
            file = place / _NAME
            if file.is_file():
                self._folder, self._table = place, self._read(file)
                break

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self._note("dataset_dir", f"{file} can't be read: {error}", "give paths of data")
            return {}
        return found if isinstance(found, dict) else {}

    def find(self, name: str, method: str | None, key: str) -> dict[str, Any]:
        """The data of a name, as a plan has it."""
        entry = self._table.get(name)
        if isinstance(entry, dict):
            return self._data(name, entry, method, key)
        close = nearest(name, self._table)
        hint = f" (nearest: {close[0]!r})" if close else ""
        told = f"{name!r} is in no {_NAME} that is here{hint}"
        self._note(key, told, f"put the path of its file in place of {name}")
        return {"path": name}

    def _data(
        self, name: str, entry: dict[str, Any], method: str | None, key: str
    ) -> dict[str, Any]:
        file, hub = entry.get("file_name"), entry.get("hf_hub_url")
        data: dict[str, Any] = {"path": str(self._folder / file) if file else hub or name}
        if not file and not hub:
            self._note(key, f"{name!r} has neither file_name nor hf_hub_url", "give its path")
        fields = {"subset": "name", "split": "split", "hf_revision": "revision"}
        for theirs, own in (fields | {"num_samples": "max_samples"}).items():
            if entry.get(theirs):
                data[own] = entry[theirs]
        for other in sorted(entry.keys() - _KNOWN):
            self._note(key, f"{name!r} has {other}={entry[other]!r}", "see whether it is needed")
        self._lay_out(name, entry, data, method, key)
        return data

    def _lay_out(
        self, name: str, entry: dict[str, Any], data: dict[str, Any], method: str | None, key: str
    ) -> None:
        columns: dict[str, str] = entry.get("columns") or {}
        talks = entry.get("formatting") == "sharegpt"
        names = dict(_OTHER)
        if method == "pt":
            data["format"] = "text"
            names["prompt"] = "text"
        elif entry.get("ranking"):
            data["format"] = "preference"
            names |= {"messages": "conversations", **_ALPACA}
        elif talks:
            data["format"] = self._format_of_talks(name, entry.get("tags") or {}, key)
            own = "messages" if data["format"] == "messages" else "conversations"
            names |= {"messages": own, "system": "system"}
        else:
            data["format"] = "alpaca"
            names |= _ALPACA
        if method == "kto" and not entry.get("ranking"):
            data["format"] = "unpaired_preference"
            names = {**_OTHER, "prompt": "prompt", "response": "completion"}
        renamed = {names[theirs]: own for theirs, own in columns.items() if theirs in names}
        data["columns"] = {own: theirs for own, theirs in renamed.items() if own != theirs}
        if not data["columns"]:
            del data["columns"]
        for theirs in sorted(columns.keys() - names.keys()):
            self._note(
                key, f"{name!r}: column {theirs} has no counterpart", "see whether it is needed"
            )

    def _format_of_talks(self, name: str, tags: dict[str, str], key: str) -> str:
        role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
        if (role, content) == ("role", "content"):
            return "messages"
        if (role, content) != ("from", "value"):
            told = f"{name!r}: turns have {role} and {content}"
            self._note(key, told, "rename them in the data: role and content")
        return "sharegpt"
