"""An adapter's description is what the engine and torch say of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lamina import LoraConfig, begin_stage, lineage, save_stage
from lamina.checkpoint.adapter import write_adapter
from lamina.checkpoint.describe import describe_adapter
from lamina.checkpoint.shapes import FactorShapes, find_factors, natural_order, scaling_in
from lamina.engine.layers import lora_layers
from lamina.errors import RecordError
from tests import adapters, models


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """domain (fresh), chat (stack, other targets, rank and scaling), prefs (continue)."""
    steps = (
        ("domain", "continue", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
        ("chat", "stack", LoraConfig(r=6, lora_alpha=6, target_modules=["q_proj", "down_proj"])),
        ("prefs", "continue", None),
    )
    parent = None
    for seed, (name, mode, config) in enumerate(steps):
        base = models.tiny_llama()
        model = begin_stage(
            base, name=name, parent=parent, config=config, **({"mode": mode} if parent else {})
        )
        adapters.fill(model, model.active_adapters[-1], seed=seed)
        parent = tmp_path / name
        save_stage(model, parent, metrics={"loss": 1.0 / (seed + 1)})
    assert parent is not None
    return parent


def test_agrees_with_lineage_and_the_file(chain: Path) -> None:
    found = describe_adapter(chain)
    record = lineage(chain)
    assert [(s.name, s.mode, s.metrics) for s in found.chain.stages] == [
        (s.name, s.mode, s.metrics) for s in record.stages
    ]
    assert [group.ranks for group in found.chain.groups] == [each.ranks for each in record.laminae]
    assert [group.begun_by for group in found.chain.groups] == ["domain", "chat"]
    assert found.chain.groups[1].continued_by == ("prefs",)
    assert [group.scaling for group in found.chain.groups] == [(2.0,), (1.0,)]
    assert found.scaling == (1.0,)
    assert found.base == record.newest.base
    assert found.faults == ()
    assert found.suspects == ()
    assert {kind.name: (kind.count, kind.rank, kind.ranks) for kind in found.modules} == {
        "down_proj": (2, (6, 6), ((0, 0), (6, 6))),
        "q_proj": (2, (10, 10), ((4, 4), (6, 6))),
        "v_proj": (2, (4, 4), ((4, 4), (0, 0))),
    }


def test_an_untrained_stage_is_told_by_its_name(chain: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = begin_stage(models.tiny_llama(), name="idle", parent=chain, mode="stack", config=config)
    save_stage(model, tmp_path / "idle")
    suspects = describe_adapter(tmp_path / "idle").suspects or ()
    assert {(s.stage, s.factor, s.kind) for s in suspects} == {("idle", "B", "zero")}
    assert len(suspects) == 2


def test_parameters_and_scalings_are_the_engines(tmp_path: Path) -> None:
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "embed_tokens"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {r"layers\.0.*q_proj": 12},
        "use_rslora": True,
    }
    model = adapters.llama_adapter(**config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = describe_adapter(tmp_path)
    layers = [layer for _, layer in lora_layers(model)]
    assert found.scaling == tuple(sorted({layer.scaling["default"] for layer in layers}))
    assert sum(kind.parameters for kind in found.modules) == sum(
        tensor.numel() for layer in layers for tensor in layer.tensors("default").values()
    )
    assert {kind.name: kind.rank for kind in found.modules} == {
        "embed_tokens": (4, 4),
        "q_proj": (2, 4),
    }


def test_a_newer_record_is_refused(chain: Path) -> None:
    record = json.loads(lineage(chain).model_dump_json()) | {"format_version": 99}
    tensors = {"base_model.model.m.lora_A.weight": torch.ones(1, 1)}
    config = LoraConfig(r=1, target_modules=["m"])
    write_adapter(chain, config, tensors, {"lamina": json.dumps(record)})
    with pytest.raises(RecordError, match="version 99"):
        describe_adapter(chain)


def test_half_a_module_is_a_fault(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.m.lora_A.weight": torch.ones(1, 1),
        "base_model.model.n.lora_B.weight": torch.ones(1, 1),
    }
    write_adapter(tmp_path, LoraConfig(r=1, target_modules=["m"]), tensors)
    assert describe_adapter(tmp_path).faults == ("m has no B", "n has no A")


def test_json_has_no_nan(chain: Path) -> None:
    found = dataclasses.replace(describe_adapter(chain), scaling=(float("nan"), float("inf"), 1.0))
    assert found.to_dict()["scaling"] == [None, None, 1.0]
    json.dumps(found.to_dict(), allow_nan=False)


def test_modules_in_a_list_are_named_with_what_holds_them() -> None:
    shapes = [("A", "B"), (2, 3, 1, 1), (4, 2, 1, 1)]
    layer = FactorShapes("net.blocks.0", *shapes)  # type: ignore[arg-type]
    assert layer.group == "blocks.0"
    assert layer.shape == "3 → 4, kernel 1x1"
    assert layer.parameters == 14


def test_layers_come_in_the_order_of_their_numbers() -> None:
    header = {
        f"m.{index}.q.lora_{side}.weight": {"shape": [1, 1]} for index in (10, 9) for side in "AB"
    }
    assert [each.module for each in find_factors(header)[0]] == ["m.9.q", "m.10.q"]
    assert natural_order("a.9") < natural_order("a.10") < natural_order("b")


def test_the_first_pattern_that_matches_a_whole_name_decides() -> None:
    config = {"lora_alpha": 8, "alpha_pattern": {"proj": 1, "q_proj": 2, ".*proj": 3}}
    assert scaling_in(config, "a.q_proj", 4) == 0.5
    assert scaling_in(config, "a.proj", 4) == 0.25
    assert scaling_in(config, "a.fc", 4) == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", 7),
        ("modules_to_save", 0.5),
        ("base_model_name_or_path", ["x"]),
        ("auto_mapping", "x"),
        ("lora_alpha", "loud"),
        ("lora_alpha", 10**400),
        ("r", {}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"(?<=a+)b": 1}),
        ("alpha_pattern", {"m": "x"}),
        ("use_rslora", "yes"),
        ("peft_type", {}),
        ("peft_type", ["LORA"]),
    ],
)
def test_a_config_of_strange_values_is_described_with_its_faults(
    tmp_path: Path, field: str, value: object
) -> None:
    tensors = {f"base_model.model.m.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    write_adapter(tmp_path, LoraConfig(r=1, target_modules=["m"]), tensors)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, field: value}))
    found = describe_adapter(tmp_path)
    assert any("config can't be honoured" in fault for fault in found.faults)
    numbers = {"lora_alpha", "r", "rank_pattern", "alpha_pattern", "use_rslora"}
    assert found.scaling == (() if field in numbers else (8.0,))
    json.dumps(found.to_dict(), allow_nan=False)


def test_factors_that_do_not_go_together_are_a_fault(tmp_path: Path) -> None:
    prefix = "base_model.model"
    tensors = {
        f"{prefix}.m.lora_A.weight": torch.ones(3, 4),
        f"{prefix}.m.lora_B.weight": torch.ones(4, 2),
        f"{prefix}.n.lora_A.weight": torch.ones(2, 4),
        f"{prefix}.n.lora_B.weight": torch.ones(4, 0),
        f"{prefix}.lost.lora_A.weight": torch.ones(0, 4),
        f"{prefix}.lost.lora_B.weight": torch.ones(4, 0),
    }
    write_adapter(tmp_path, LoraConfig(r=1, target_modules=["m"]), tensors)
    assert describe_adapter(tmp_path).faults == (
        "m has factors of the shapes (3, 4) and (4, 2)",
        "n has factors of the shapes (2, 4) and (4, 0)",
    )


def test_numbers_in_names_that_are_none_of_layers() -> None:
    names = ["a.\u00b2.b", f"a.{'9' * 5_000}.b", "a.10.b", "a.9.b"]
    assert sorted(names, key=natural_order)[-2:] == ["a.9.b", "a.10.b"]
