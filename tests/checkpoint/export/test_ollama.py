"""The Modelfile, and what only its user can know."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina.stages.export import check_export, export
from tests.checkpoint.export import made


def test_the_modelfile_lays_the_adapter_over_the_named_base(tmp_path: Path) -> None:
    base = made.base_config(tmp_path / "base")
    adapter = made.write(tmp_path / "a")
    report = export(
        adapter, tmp_path / "out", target="ollama", base=str(base), served_base="llama3.2:1b"
    )
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text == "FROM llama3.2:1b\nADAPTER ./adapter.gguf\n"
    assert "TEMPLATE" in report.notes[0].cure
    export(adapter, tmp_path / "gguf", target="gguf", base=str(base))
    one, other = (tmp_path / name / "adapter.gguf" for name in ("out", "gguf"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", [None, "", "  ", "a\nADAPTER /etc/passwd", "a\x00b"])
def test_a_base_is_never_made_up_nor_a_line_smuggled_in(tmp_path: Path, name: str | None) -> None:
    base = made.base_config(tmp_path / "base")
    checked = check_export(
        made.write(tmp_path / "a"), target="ollama", base=str(base), served_base=name
    )
    assert len(checked.faults) == 1
    assert "--from" in checked.faults[0].cure
