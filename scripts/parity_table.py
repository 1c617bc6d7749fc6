"""Write docs/parity.md: every variant x layer x dtype x direction, compared with the real peft."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.parity.matrix import (  # noqa: E402
    CELLS,
    DELIBERATE,
    DIRECTIONS,
    DTYPES,
    LAYERS,
    TOLERANCE,
    VARIANTS,
    Cell,
    run,
)

TABLE = ROOT / "docs" / "parity.md"
_HEAD = """# Parity with peft

For each variant, layer and dtype the same random adapter is filled by one library, saved, and
opened by the other; then outputs and all gradients are compared. Written by
`python scripts/parity_table.py`; the same cells are tests (`tests/parity/test_matrix.py`).

- **equal**: outputs and gradients agree within {tolerances} of the largest number.
- **both refuse**: peft doesn't do it, nor does Lamina, which says so before it changes a model.
- **Lamina only**: peft refuses.
- **deliberate**: Lamina differs on purpose; the reasons are below.

"""


def table(verdicts: Mapping[Cell, str]) -> str:
    """The page for these verdicts."""
    tolerances = ", ".join(f"{limit:g} ({dtype})" for dtype, limit in TOLERANCE.items())
    lines = [_HEAD.format(tolerances=tolerances)]
    columns = [(dtype, direction) for dtype in DTYPES for direction in DIRECTIONS]
    names = " | ".join(f"{dtype}, {direction}" for dtype, direction in columns)
    lines.append(f"| variant | layer | {names} |")
    lines.append("|---" * (2 + len(columns)) + "|")
    for variant in VARIANTS:
        for layer in LAYERS:
            row = [verdicts[Cell(variant, layer, *column)] for column in columns]
            lines.append(f"| {variant} | {layer} | {' | '.join(row)} |")
    lines.append("\n## Deliberate differences\n")
    reasons: dict[str, list[str]] = {}
    for (variant, layer, dtype), reason in DELIBERATE.items():
        reasons.setdefault(reason, []).append(f"{variant} on {layer}, {dtype}")
    lines += [f"- {'; '.join(where)}: {reason}." for reason, where in reasons.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    verdicts = {}
    for cell in CELLS:
        with tempfile.TemporaryDirectory() as directory:
            verdicts[cell] = run(cell, Path(directory) / "adapter").verdict(cell)
    bad = {str(cell): verdict for cell, verdict in verdicts.items() if verdict.startswith("differ")}
    TABLE.write_text(table(verdicts), encoding="utf-8")
    print(f"{TABLE}: {len(verdicts)} cells, {len(bad)} that differ")
    sys.exit(f"{bad}" if bad else 0)


if __name__ == "__main__":
    main()
