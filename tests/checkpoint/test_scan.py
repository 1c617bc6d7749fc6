"""The scan by bits finds what torch finds by values, in every floating-point dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import lamina.checkpoint.scan as scan_module
from lamina.checkpoint.header import read_header
from lamina.checkpoint.scan import Question, Span, Suspect, scan

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)


def found(path: Path, tensor: torch.Tensor, question: Question) -> list[Suspect]:
    file = path / "x.safetensors"
    save_file({"t": tensor}, file)
    return scan(file, read_header(file)[0], [question])


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -2.5, 0.001, float("nan"), float("inf"), float("-inf")]),
        min_size=1,
        max_size=12,
    )
)
def test_agrees_with_torch(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, values: list[float]
) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)[:, None]
    wide = tensor.double()
    bad = int((~wide.isfinite()).sum())
    path = tmp_path_factory.mktemp("scan")
    suspects = found(path, tensor, Question("t", "m", "A"))
    if bad:
        assert [(s.kind, s.entries) for s in suspects] == [("not finite", bad)]
    elif not wide.any():
        assert [(s.kind, s.entries) for s in suspects] == [("zero", len(values))]
    else:
        assert suspects == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_the_smallest_numbers_are_as_good_as_any(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal
    for value in (limits.max, limits.min, smallest):
        tensor = torch.tensor([[value]], dtype=torch.float64).to(dtype)
        assert found(tmp_path, tensor, Question("t", "m", "A")) == []


def test_looks_at_each_stages_part_of_the_rank_dimension(tmp_path: Path) -> None:
    spans = [Span("one", 0, 2), Span("two", 2, 5)]
    b = torch.ones(4, 5)
    b[:, 2:] = 0
    assert found(tmp_path, b, Question("t", "m", "B", 1, spans)) == [
        Suspect("t", "m", "B", "two", "zero", 12)
    ]
    a = torch.ones(5, 4)
    a[0, 0] = float("nan")
    a[4] = 0
    assert found(tmp_path, a, Question("t", "m", "A", 0, spans)) == [
        Suspect("t", "m", "A", "one", "not finite", 1)
    ]


def test_zero_is_nothing_to_tell_of_other_tensors(tmp_path: Path) -> None:
    assert found(tmp_path, torch.zeros(3), Question("t", "m")) == []
    assert found(tmp_path, torch.tensor(float("nan")), Question("t", "m"))[0].entries == 1


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.int8), torch.zeros(0, 4)])
def test_integers_and_empty_tensors_are_passed_over(tmp_path: Path, tensor: torch.Tensor) -> None:
    assert found(tmp_path, tensor, Question("t", "m", "A")) == []


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_CHUNK", 8)
    tensor = torch.zeros(50, 3)
    assert found(tmp_path, tensor, Question("t", "m", "B", 1))[0].entries == 150
    tensor[[0, 20, 49], 1] = float("inf")
    assert found(tmp_path, tensor, Question("t", "m", "B", 1))[0].entries == 3
