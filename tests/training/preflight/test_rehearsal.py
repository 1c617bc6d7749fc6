"""What a stage or its trainer would refuse in the middle of a run is told before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lamina.interop.peft import installed
from lamina.training.plan import open_plan
from lamina.training.preflight import check_plan
from tests import models
from tests.ecosystem import texts
from tests.training.run import plans

FIRST = {"name": "a", "method": "pt"}
Stage = dict[str, Any]


def on_it(method: str = "pt", mode: str = "stack", **more: Any) -> Stage:
    return {"name": "b", "method": method, "mode": mode, **more}


def first(method: str = "pt", **more: Any) -> Stage:
    return {**FIRST, "method": method, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rehearsal")
    plans.write_base(made / "base")
    models.tiny_gpt2().save_pretrained(made / "gpt2")
    texts.tokenizer().save_pretrained(made / "gpt2")
    (made / "rewards.py").write_text("def one(**columns):\n    raise SystemExit('called')\n")
    return made


def faults(folder: Path, stages: Iterable[Stage], *changes: str) -> tuple[str, ...]:
    path = plans.write_plan(folder, stages, base=folder / "base")
    opened = open_plan(path, changes)
    return check_plan(opened.plan, document=opened.document).faults


HEAD = {"lora_target_modules": ["lm_head", "q_proj"]}
CASES: dict[str, tuple[list[Stage], str]] = {
    "rows of an adapted table": (
        [
            first(lora_target_modules=["embed_tokens"]),
            on_it(trainable_token_indices=[3]),
        ],
        "model.embed_tokens has rows of its own and a low-rank update",
    ),
    "rows of a table trained whole": (
        [first(modules_to_save=["embed_tokens"]), on_it(trainable_token_indices=[3])],
        "another adapter trains model.embed_tokens whole",
    ),
    "targets in what is trained whole": (
        [first(modules_to_save=["lm_head"]), on_it(**HEAD)],
        "lm_head would have no effect: another adapter trains lm_head whole",
    ),
    "biases of B folded": (
        [first(lora_bias=True), on_it(mode="merge")],
        "the base layer has no bias that could take up that of lora_B",
    ),
    "a head that a reward model lacks": (
        [first(modules_to_save=["lm_head"]), on_it("reward")],
        "lm_head of stage 'a' is not in the model that this stage trains",
    ),
    "a reward model without a head of its own": (
        [FIRST, on_it("reward", "continue")],
        "continue trains the parent's ranks on, which have no head",
    ),
    "the head of a language model in a reward model": (
        [first("reward", modules_to_save=["lm_head"])],
        "'lm_head' matched 0 modules",
    ),
    "an adapted head under a chunked loss": ([first(**HEAD)], "`lm_head` is not supported"),
    "an optimizer that is not installed": ([first(optim="lomo")], "pip install lomo-optim"),
    "a schedule without its numbers": (
        [first(lr_scheduler_type="cosine_with_min_lr")],
        "lr_scheduler_type: its schedule can't be made: One of min_lr or min_lr_rate",
    ),
    "a batch that kto can't compare": (
        [FIRST, on_it("kto", per_device_train_batch_size=1)],
        "batch size must be > 1",
    ),
    "a loss without its smoothing": (
        [FIRST, on_it("dpo", loss_type="exo_pair")],
        "Label smoothing must be greater than 0.0",
    ),
    "an evaluation of nothing": (
        [first(trainer_args={"eval_strategy": "steps"})],
        "didn't pass an `eval_dataset`",
    ),
    "a package that an argument needs": (
        [first(trainer_args={"deepspeed": "ds.json"})],
        "deepspeed",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_would_be_refused_later_is_told_first(case: str, folder: Path) -> None:
    stages, told = CASES[case]
    (fault,) = faults(folder, stages)
    assert fault.startswith("line ")
    assert told in fault


@pytest.mark.parametrize(
    "stages",
    [
        [first(modules_to_save=["lm_head"]), on_it(modules_to_save=["lm_head"])],
        [first(trainable_token_indices=[3, 4]), on_it(trainable_token_indices=[4, 5])],
        [first(trainable_token_indices=[3]), on_it(modules_to_save=["embed_tokens"])],
        [first(use_dora=True), on_it("sft", "continue")],
        [first("reward"), on_it("reward", "continue")],
        [FIRST, on_it("reward", "merge")],
        [first(init_lora_weights="pissa"), on_it("dpo", "merge", init_lora_weights="olora")],
        [
            FIRST,
            on_it(
                "grpo",
                reward_functions=["rewards:one"],
                num_generations=2,
                max_length=None,
                beta=0.1,
            ),
        ],
    ],
    ids=str,
)
def test_what_can_be_run_is_not_refused(stages: list[Stage], folder: Path) -> None:
    """Nothing of the user's is called, and peft stays what it was."""
    before = installed()
    assert faults(folder, stages) == ()
    assert installed() is before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["attn_implementation=nonsense"], "attn_implementation"),
        (["load_in_4bit=true", "init_lora_weights=pissa"], "which are quantised here"),
        (["model_name_or_path=rewards.py"], "model_name_or_path"),
    ],
)
def test_how_the_base_is_kept(changes: list[str], told: str, folder: Path) -> None:
    found = faults(folder, [FIRST], *changes)
    assert len(found) == 1
    assert told in found[0]
