"""What an export, or the question whether there can be one, comes to."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.checkpoint.export.contents import Finding
from lamina.checkpoint.probe import ProbeComparison


@dataclass(frozen=True)
class ExportCheck:
    """What a program would say to an adapter.

    Attributes:
        source: the adapter.
        target: what it is for.
        program: what would open it.
        faults: why it can't be written; none if it can.
        notes: what to know.
    """

    source: str
    target: str
    program: str
    faults: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether it can be written."""
        return not self.faults


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the directory.
        target: what it is for.
        modules: how many modules are in it.
        rank: the smallest and the largest rank that was written.
        dtype: of the factors in the file.
        files: name -> bytes.
        notes: what to know.
        compression: `‖ΔW - ΔW_r‖_F / ‖ΔW‖_F` over all modules, where ranks were left out; None
            where none were.
        difference: the largest `‖ΔW - ΔW_file‖_F / ‖ΔW‖_F` of a module, the file's being what the
            program computes from it; of the compressed update where ranks were left out.
        module: the module in which it is; None where there is no difference at all.
        probe: what base and exported adapter answer, compared with base and original; None without
            a base to ask.
    """

    path: str
    target: str
    modules: int
    rank: tuple[int, int]
    dtype: str
    files: dict[str, int]
    notes: tuple[Finding, ...]
    compression: float | None
    difference: float
    module: str | None
    probe: ProbeComparison | None
