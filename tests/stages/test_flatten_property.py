"""Any chain: flattened, in part or compressed, and split, by arithmetic on dense matrices."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.checkpoint.adapter import write_adapter
from lamina.checkpoint.record import Lamina, Stage, StageRecord
from lamina.config import LoraConfig
from lamina.engine.compose import Factors, concatenate
from lamina.stages import drop_last_stage, flatten, lineage, split
from tests.stages.chains import deltas_in

OUT, IN = 9, 7
MODULES = ("a", "b.x", "b.y")


@st.composite
def chains(draw: st.DrawFn) -> list[tuple[LoraConfig, list[str]]]:
    """For each stage its config, and the modules that it adapts."""
    stages = []
    for _ in range(draw(st.integers(1, 4))):
        modules = sorted(draw(st.sets(st.sampled_from(MODULES), min_size=1)))
        config = LoraConfig(
            r=draw(st.integers(1, 4)),
            lora_alpha=draw(st.sampled_from([1, 2, 7, 0.3])),
            use_rslora=draw(st.booleans()),
            target_modules=list(modules),
        )
        stages.append((config, modules))
    return stages


def scaling(config: LoraConfig) -> float:
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def write(folder: Path, chain: list[tuple[LoraConfig, list[str]]]) -> list[dict[str, np.ndarray]]:
    """Write a chain as a file of the newest scaling; the dense updates of each stage."""
    generator = torch.Generator().manual_seed(1)
    last = scaling(chain[-1][0])
    parts: list[dict[str, Factors]] = []
    for config, modules in chain:
        parts.append(
            {
                module: Factors(
                    torch.randn(config.r, IN, generator=generator),
                    torch.randn(OUT, config.r, generator=generator),
                    scaling(config),
                )
                for module in modules
            }
        )
    tensors, ranks = {}, {}
    for module in sorted({module for part in parts for module in part}):
        whole = concatenate([part[module] for part in parts if module in part], last)
        tensors[f"base_model.model.{module}.lora_A.weight"] = whole.A
        tensors[f"base_model.model.{module}.lora_B.weight"] = whole.B
        ranks[module] = whole.rank
    top = max(ranks.values())
    config = LoraConfig(
        r=top,
        lora_alpha=last * top,
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern={module: last * rank for module, rank in ranks.items()},
    )
    record = StageRecord(
        stages=tuple(
            Stage(name=f"s{i}", mode="stack" if i else "fresh") for i in range(len(chain))
        ),
        laminae=tuple(
            Lamina(stage=f"s{i}", config=c.to_dict(), ranks=dict.fromkeys(modules, c.r))
            for i, (c, modules) in enumerate(chain)
        ),
    )
    write_adapter(folder, config, tensors, record.to_metadata())
    return [
        {m: f.scaling * (f.B.double() @ f.A.double()).numpy() for m, f in part.items()}
        for part in parts
    ]


def summed(updates: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    modules = sorted({module for each in updates for module in each})
    return {m: sum(each[m] for each in updates if m in each) for m in modules}


def check_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for module, dense in wanted.items():
        np.testing.assert_allclose(found[module], dense, atol=1e-5 * (1 + abs(dense).max()))


@settings(max_examples=20, deadline=None)
@given(chain=chains(), data=st.data())
def test_any_stages_are_their_sum(
    chain: list[tuple[LoraConfig, list[str]]], data: st.DataObject
) -> None:
    chosen = data.draw(st.sets(st.integers(0, len(chain) - 1), min_size=1))
    with tempfile.TemporaryDirectory() as folder:
        updates = write(Path(folder) / "chain", chain)
        names = [f"s{i}" for i in sorted(chosen)]
        report = flatten(Path(folder) / "chain", Path(folder) / "flat", stages=names)
        wanted = summed([updates[i] for i in sorted(chosen)])
        check_same(deltas_in(Path(folder) / "flat"), wanted)
        assert report.exact
        assert [stage.name for stage in lineage(Path(folder) / "flat").stages] == names


@settings(max_examples=20, deadline=None)
@given(chain=chains(), rank=st.integers(1, 8))
def test_fewer_ranks_are_as_far_off_as_is_told(
    chain: list[tuple[LoraConfig, list[str]]], rank: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wanted = summed(write(Path(folder) / "chain", chain))
        report = flatten(Path(folder) / "chain", Path(folder) / "flat", rank=rank)
        found = deltas_in(Path(folder) / "flat")
        errors, norms = [], []
        for module, dense in wanted.items():
            values = np.linalg.svd(dense, compute_uv=False)
            tail = math.sqrt((values[rank:] ** 2).sum())
            errors.append(float(np.linalg.norm(found[module] - dense)))
            norms.append(float(np.linalg.norm(dense)))
            assert errors[-1] == pytest.approx(tail, rel=1e-4, abs=1e-5 * norms[-1])
            told = report.modules[module].relative_error
            assert told == pytest.approx(tail / norms[-1], rel=1e-4, abs=1e-5)
        total = math.hypot(*errors) / math.hypot(*norms)
        assert report.relative_error == pytest.approx(total, rel=1e-4, abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(chain=chains())
def test_the_parts_are_the_stages(chain: list[tuple[LoraConfig, list[str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        updates = write(Path(folder) / "chain", chain)
        report = split(Path(folder) / "chain", Path(folder) / "parts")
        for i, update in enumerate(updates):
            found = Path(folder) / "parts" / f"s{i}"
            check_scaled(found, chain[i][0], update)
            assert report.parts[i].left_out == tuple(f"s{j}" for j in range(i))


def check_scaled(path: Path, config: LoraConfig, wanted: dict[str, np.ndarray]) -> None:
    ratio = scaling(config) / (config.lora_alpha / config.r)
    check_same({m: dense * ratio for m, dense in deltas_in(path).items()}, wanted)


@settings(max_examples=15, deadline=None)
@given(chain=chains())
def test_without_the_last_stage(chain: list[tuple[LoraConfig, list[str]]]) -> None:
    if len(chain) == 1:
        return
    with tempfile.TemporaryDirectory() as folder:
        updates = write(Path(folder) / "chain", chain)
        drop_last_stage(Path(folder) / "chain")
        check_same(deltas_in(Path(folder) / "chain"), summed(updates[:-1]))
