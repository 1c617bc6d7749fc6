"""The benchmarks run to their end, with both libraries, and say where."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch

import lamina
from benchmarks.__main__ import main
from benchmarks.cases import adapted
from benchmarks.measure import Case, measure
from benchmarks.memory import peak_mib
from benchmarks.models import TINY


def test_everything_is_measured_on_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--tiny", "--json", str(tmp_path / "benchmark.json")])
    told = json.loads((tmp_path / "benchmark.json").read_text())
    assert told["machine"]["torch"] == torch.__version__
    assert told["machine"]["cpu"]
    rows = {row["name"]: row for row in told["rows"]}
    assert len(rows) == 19
    for row in rows.values():
        assert row["peft"] > 0
        assert row["lamina"] > 0
        assert row["ratio"] == pytest.approx(row["peft"] / row["lamina"], rel=0.01)
    out = capsys.readouterr().out
    assert "from_pretrained" in out
    assert "Took" in out
    assert gc.get_freeze_count() == 0


def test_the_sides_alternate_and_the_first_round_does_not_count() -> None:
    calls = []

    def prepare(library: ModuleType) -> object:
        def side() -> float:
            calls.append(library.__name__)
            return float(len(calls))

        return side

    case = Case("count", "calls", prepare, repeats=3)
    result = measure(case, {"peft": peft, "lamina": lamina})
    assert calls == ["lamina", "peft", "peft", "lamina", "lamina", "peft", "peft", "lamina"]
    assert result.samples == {"peft": [3, 6, 7], "lamina": [4, 5, 8]}
    assert result.ratio == 6 / 5


def test_memory_is_what_was_held_at_once() -> None:
    def prepare() -> object:
        before = torch.zeros(2**20)

        def call() -> None:
            # 8 MiB are held, then 4 given back, then 12 held with what is new.
            first, second = torch.zeros(2**20), torch.zeros(2**20)
            del first
            third = torch.zeros(2**21)
            del second, third, before_again[0]
            torch.zeros(2**20)

        before_again = [before]
        del before
        return call

    assert peak_mib(prepare) == pytest.approx(12, abs=0.01)


@pytest.mark.parametrize("library", [peft, lamina], ids=["peft", "lamina"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_have_the_adapters_that_are_announced(library: ModuleType) -> None:
    model = adapted(library, TINY, 3)
    assert list(model.peft_config) == ["0", "1", "2"]
    assert model.active_adapters == ["0"]
    wrapped = [m for m in model.modules() if hasattr(m, "base_layer")]
    assert len(wrapped) == TINY.linears
