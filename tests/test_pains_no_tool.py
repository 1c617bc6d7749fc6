"""What no tool does today, and where it is shown that a run does it.

- one file that runs all stages:
  test_pains_no_tool.test_every_way_to_begin_a_stage_in_one_file
- with resume: torture/test_run_kills.test_killed_once,
  training/run/test_interrupted.test_a_method_goes_on_bit_for_bit
- the way a stage begins is checked up front and never changed:
  test_pains_no_tool.test_a_way_that_cannot_be_gone_is_refused_before_anything_begins,
  test_pains_no_tool.test_every_way_to_begin_a_stage_in_one_file
- lineage: cli/test_lineage.test_every_stage_grows_out_of_the_one_before
- a base check that refuses: stages/test_likeness.test_a_base_with_the_adapter_folded_in,
  stages/test_verify_causes.test_another_base_of_the_same_shape
- exact flattening: stages/test_flatten.test_four_stages_as_one
- logits compared after load: stages/test_verify.test_an_honest_stage_is_proved,
  after merge: stages/test_merged.test_a_model_that_answers_otherwise_leaves_nothing,
  after export: stages/test_export.test_a_chain_answers_the_same_after_every_export
- what each stage did to every task, with a gate:
  training/evaluate/test_matrix.test_the_plan_says_whose_task_an_eval_is,
  training/run/test_gates.test_a_stage_that_costs_too_much_ends_the_run
- a chain merged shard by shard: checkpoint/stream/test_same_bits.test_both_ways_give_the_same_bits
- drift of each stage: training/evaluate/test_drift.test_it_is_what_dense_matrices_say
- the same losses as by hand: benchmarks/test_by_hand.test_by_hand_and_as_a_plan
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import LaminaError
from tests.training.run import plans

HERE = Path(__file__).parent
FIRST: dict[str, Any] = {"name": "first", "method": "pt"}
SECOND: dict[str, Any] = {"name": "second", "method": "sft", "mode": "stack"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    plans.write_base(folder)
    return folder


@pytest.mark.slow
def test_every_way_to_begin_a_stage_in_one_file(base: Path, tmp_path: Path) -> None:
    """What is asked for is what is done, whatever the method: the file shows it."""
    stages = [
        {"name": "a", "method": "pt"},
        {"name": "b", "method": "sft", "mode": "stack", "lora_r": 2},
        {"name": "c", "method": "dpo", "mode": "merge", "lora_r": 3},
        {"name": "d", "method": "kto", "mode": "continue"},
        {"name": "e", "method": "orpo", "mode": "stack", "lora_r": 1},
    ]
    path = plans.write_plan(tmp_path, stages, base=base)
    result = plans.run(path, "defaults.max_steps=2", "defaults.learning_rate=0.05")
    record = lamina.lineage(result.path)
    assert [each.mode for each in record.stages] == ["fresh", "stack", "merge", "continue", "stack"]
    older: dict[str, torch.Tensor] = {}
    # Rank of the file after each stage, and how much of it the stage leaves as it was.
    for name, rank, kept in (("a", 4, 0), ("b", 6, 4), ("c", 9, 6), ("d", 9, 6), ("e", 10, 9)):
        tensors = plans.tensors(tmp_path / "out" / name)
        for key, tensor in tensors.items():
            if "lora_A" in key:
                assert len(tensor) == rank, (name, key)
                if kept:
                    assert torch.equal(tensor[:kept], older[key][:kept]), (name, key)
                    changed = tensor[kept : len(older[key])]
                    assert changed.numel() == 0 or not torch.equal(changed, older[key][kept:])
        older = tensors


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ((), ""),
        (("stages.first.mode=stack",), "the first stage has no parent"),
        (("stages.second.mode=contine",), "did you mean 'continue'"),
        (("stages.second.mode=merge", "load_in_4bit=true"), "stack computes the same"),
        (("stages.second.mode=continue", "stages.second.lora_r=8"), "with their settings"),
        (("stages.first.use_dora=true",), "no sum of ranks"),
    ],
)
def test_a_way_that_cannot_be_gone_is_refused_before_anything_begins(
    changes: tuple[str, ...], told: str, base: Path, tmp_path: Path
) -> None:
    path = plans.write_plan(tmp_path, [FIRST, SECOND], base=base)
    if not told:
        # Without a word there is none that is chosen for you.
        path.write_text(path.read_text().replace("  mode: stack\n", ""))
        told = "say how this stage is begun on the one before"
    with pytest.raises(LaminaError) as caught:
        plans.run(path, *changes)
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["test_pains_no_tool.py", "test_pains_training.py"])
def test_the_tests_that_a_file_names_are_there(file: str) -> None:
    named = re.findall(
        r"((?:\w+/)*test_\w+)\.(test_\w+)",
        ast.get_docstring(ast.parse((HERE / file).read_text())) or "",
    )
    assert len(named) > 5
    for other, test in named:
        body = ast.parse((HERE / f"{other}.py").read_text()).body
        assert test in {each.name for each in body if isinstance(each, ast.FunctionDef)}, other
