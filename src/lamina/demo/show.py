"""What the demo shows: the stage x text matrix as a table and a plot, and sample text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

Matrix = Mapping[str, Mapping[str, float]]


def change(matrix: Matrix, row: str, column: str) -> float | None:
    """Relative change of the perplexity against the row before; None in the first row."""
    rows = list(matrix)
    index = rows.index(row)
    if index == 0:
        return None
    return matrix[row][column] / matrix[rows[index - 1]][column] - 1


def matrix_table(matrix: Matrix, columns: Sequence[str]) -> Table:
    """Held-out perplexity after each stage, with the change against the stage before."""
    table = Table(title="Held-out perplexity (lower is better), and its change")
    table.add_column("after stage", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row, values in matrix.items():
        cells = []
        for column in columns:
            cell = Text(f"{values[column]:6.1f}")
            moved = change(matrix, row, column)
            own = row.split(" ")[0] == column
            if moved is not None:
                style = "green" if moved < 0 else "red"
                cell.append(f" {moved:+5.0%}", style=f"bold {style}" if own else style)
            cells.append(cell)
        table.add_row(row, *cells)
    return table


def stage_summary(stage: str, matrix: Matrix) -> str:
    """One line on what the newest stage gained and what it cost the others."""
    row = list(matrix)[-1]
    moves = {column: change(matrix, row, column) or 0.0 for column in matrix[row]}
    others = ", ".join(f"{name} {moved:+.0%}" for name, moved in moves.items() if name != stage)
    return f"  perplexity on its own text {moves[stage]:+.0%}; on the others: {others}"


def samples_table(samples: Mapping[str, Mapping[str, str]]) -> Group:
    """What base and final model write after the same held-out words."""
    table = Table(title="The same prompts before and after", show_lines=True)
    for name in ("prompt (held out)", "base", "after all stages"):
        table.add_column(name, ratio=1, overflow="fold")
    for sample in samples.values():
        table.add_row(*(Text(sample[key].strip()) for key in ("prompt", "before", "after")))
    return Group(table)


def draw_matrix(matrix: Matrix, columns: Sequence[str], path: Path) -> None:
    """The matrix as a heat map, coloured by the change against the base, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(matrix)
    base = matrix[rows[0]]
    shares = [[100 * (matrix[row][c] / base[c] - 1) for c in columns] for row in rows]
    figure = Figure(figsize=(2.2 + 1.7 * len(columns), 1.6 + 0.75 * len(rows)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    limit = max(abs(share) for line in shares for share in line) or 1
    image = axes.imshow(shares, cmap="RdYlGn_r", vmin=-limit, vmax=limit, aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            own = row.split(" ")[0] == column
            axes.text(
                x,
                y,
                f"{matrix[row][column]:.1f}\n{shares[y][x]:+.0f}%",
                ha="center",
                va="center",
                fontsize=10,
                fontweight="bold" if own else "normal",
                color="white" if abs(shares[y][x]) > 0.7 * limit else "black",
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("held-out text")
    axes.set_ylabel("after stage")
    axes.set_title("Perplexity, and its change against the base")
    figure.colorbar(image, ax=axes, label="change against the base, %")
    figure.tight_layout()
    figure.savefig(path)
