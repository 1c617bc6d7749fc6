"""Random chains: the file computes what the stages' own factors add up to, whoever opens it."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lamina.config import LoraConfig
from lamina.stages import begin_stage, lineage, load, save_stage
from tests import models
from tests.stages.chains import (
    answer,
    deltas_in,
    distance,
    fill_trainable,
    open_with_peft,
    own_factors,
)

LLAMA = ["q_proj", "k_proj", "o_proj", "1.self_attn.v_proj", "0.mlp.up_proj", "down_proj"]
BLOCKS = ["blocks.0.att", "blocks.1.att", "att", "blocks.0.inner.att", "out"]
ALPHAS = [1, 2, 3.5, 4, 7, 8, 16, -5]


class Block(nn.Module):
    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        if nested:
            self.inner = Block(nested=False)
        self.att = nn.Linear(16, 16)

    def forward(self, x: Any) -> Any:
        x = self.inner(x) if hasattr(self, "inner") else x
        return x + self.att(x).tanh()


class Blocks(models.Perceptron):
    """Names that end in each other: `att`, `blocks.0.att` ...; sorted, the widest comes first."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList([Block(nested=True), Block(nested=False)])
        self.att = nn.Linear(16, 16)
        self.out = nn.Linear(16, 8, bias=False)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.out(self.att(x))


def blocks() -> Blocks:
    with models.seeded(0):
        return Blocks().eval()


@st.composite
def configs(draw: st.DrawFn, targets: list[str], patterns: list[str]) -> LoraConfig:
    rank = st.integers(1, 6)
    names = draw(st.sets(st.sampled_from(targets), min_size=1))
    # A pattern that matches nothing, or too late, would be refused.
    pattern = draw(st.sampled_from([p for p in patterns if p in names] or [None]))
    rank_pattern = {pattern: draw(rank)} if pattern and draw(st.booleans()) else {}
    alpha_pattern = {}
    if pattern and draw(st.booleans()):
        alpha_pattern[pattern] = draw(st.sampled_from(ALPHAS))
    return LoraConfig(
        r=draw(rank),
        lora_alpha=draw(st.sampled_from(ALPHAS)),
        use_rslora=draw(st.booleans()),
        target_modules=names,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


@st.composite
def chains(draw: st.DrawFn, targets: list[str], patterns: list[str]) -> list[Any]:
    modes = ["fresh", *draw(st.lists(st.sampled_from(["continue", "stack", "merge"]), max_size=3))]
    config = configs(targets, patterns)
    return [(mode, None if mode == "continue" else draw(config)) for mode in modes]


def numbers(config: LoraConfig, module: str) -> tuple[int, float]:
    """(rank, scaling) in a module: the test's own reading of a config."""

    def lookup(table: dict[str, Any], default: Any) -> Any:
        return next((v for k, v in table.items() if f".{module}".endswith(f".{k}")), default)

    r = lookup(config.rank_pattern, config.r)
    alpha = lookup(config.alpha_pattern, config.lora_alpha)
    return r, alpha / (math.sqrt(r) if config.use_rslora else r)


def check_chain(build: Any, stages: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _check_chain(build, stages, Path(folder))


def _check_chain(build: Any, stages: list[Any], folder: Path) -> None:
    groups: list[tuple[str, LoraConfig]] = []
    parent: Path | None = None
    for index, (mode, config) in enumerate(stages):
        name = f"s{index}"
        where = {} if parent is None else {"parent": parent, "mode": mode}
        model = begin_stage(build(), name=name, config=config, **where).eval()
        fill_trainable(model, seed=index)
        save_stage(model, folder / name)
        parent = folder / name
        if mode == "continue":
            groups[-1] = (name, groups[-1][1])
        else:
            groups.append((name, config))
    assert parent is not None

    expected = answer(model)
    assert distance(answer(load(parent, build())), expected) < 1e-5
    assert distance(answer(open_with_peft(parent, build)), expected) < 1e-5

    record = lineage(parent)
    assert [(s.name, s.mode) for s in record.stages] == [
        (f"s{index}", mode) for index, (mode, _) in enumerate(stages)
    ]
    assert [lamina.stage for lamina in record.laminae] == [name for name, _ in groups]

    sums: dict[str, Any] = {}
    for lamina, (name, config) in zip(record.laminae, groups, strict=True):
        factors = own_factors(model, name)
        assert set(lamina.ranks) == set(factors)
        for module, (a, b) in factors.items():
            r, scaling = numbers(config, module)
            assert lamina.ranks[module] == r == len(a)
            delta = scaling * (b.double().numpy() @ a.double().numpy())
            sums[module] = sums.get(module, 0) + delta
    stored = deltas_in(parent)
    assert stored.keys() == sums.keys()
    for module, total in sums.items():
        np.testing.assert_allclose(stored[module], total, rtol=0, atol=1e-6 * abs(total).max())


@settings(max_examples=40)
@given(chains(LLAMA, LLAMA))
def test_random_chains_on_a_llama(stages: list[Any]) -> None:
    check_chain(models.tiny_llama, stages)


@settings(max_examples=40)
@given(chains(BLOCKS, ["blocks.0.att", "blocks.1.att", "blocks.0.inner.att", "out"]))
def test_random_chains_where_names_end_in_each_other(stages: list[Any]) -> None:
    check_chain(blocks, stages)
