"""Every variant x layer x dtype gives what the real peft gives; files open both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lamina
from scripts.parity_table import TABLE, table
from tests import models
from tests.parity.matrix import CELLS, DELIBERATE, Attention, Cell, Outcome, run

pytestmark = [
    # What peft warns of is not what is tested.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell(cell: Cell, tmp_path: Path) -> None:
    outcome = run(cell, tmp_path / "adapter")
    assert outcome.verdict(cell) in ("equal", "both refuse", "Lamina only", "deliberate"), outcome


def test_the_table_in_the_docs_has_every_cell() -> None:
    """Its verdicts were made by the same code; what it lists has to be what is tested."""
    rows = Path(TABLE).read_text(encoding="utf-8").splitlines()
    made = table(dict.fromkeys(CELLS, "equal")).splitlines()
    heads = [row.split("|")[1:3] for row in rows if row.startswith("| ")]
    assert heads == [row.split("|")[1:3] for row in made if row.startswith("| ")]


def test_a_difference_would_be_seen() -> None:
    cell = CELLS[0]
    assert Outcome(None, None, 1e-7, 1e-7, 0.5).verdict(cell) == "equal"
    assert Outcome(None, None, 1e-3, 1e-7, 0.5).verdict(cell) == "differs"
    assert Outcome(None, None, 1e-7, 1e-3, 0.5).verdict(cell) == "differs"
    # An adapter that does nothing would be equal to anything.
    assert Outcome(None, None, 1e-7, 1e-7, 0.0).verdict(cell) == "differs"
    assert Outcome(None, "refused").verdict(cell) == "peft only"


def test_every_deliberate_difference_is_of_a_cell() -> None:
    cells = {(cell.variant, cell.layer, cell.dtype) for cell in CELLS}
    assert cells >= DELIBERATE.keys()


def test_the_gradients_of_an_attention_are_those_of_finite_differences() -> None:
    """Where peft's are half of it, and of all but the last adapter nothing."""
    with models.seeded(0):
        model = lamina.get_peft_model(
            nn.ModuleDict({"inner": Attention()})["inner"].double(),
            lamina.LoraConfig(target_modules=["attention"], r=2, init_lora_weights=False),
        )
        x = torch.randn(1, 3, 16, dtype=torch.float64)
    factors = [p.requires_grad_() for p in model.parameters() if p.requires_grad]
    assert len(factors) == 4
    assert torch.autograd.gradcheck(lambda *_: model(x), factors)
