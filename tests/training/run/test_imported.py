"""What other tools' files ask for, imported, is really run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.training.plan import read_plan
from lamina.training.plan.importing import import_plan
from lamina.training.preflight import check_plan
from lamina.training.run import RunResult, run_plan
from tests.ecosystem import texts
from tests.training.plan.test_importing import AXOLOTL_ONE, AXOLOTL_TWO
from tests.training.run import plans

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
FACTORY_SFT = """\
model_name_or_path: models/small
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.1
lora_target: q_proj,v_proj
dataset: talks
template: llama3
cutoff_len: 48
overwrite_output_dir: true
output_dir: saves/small/chat
logging_steps: 1
save_steps: 500
plot_loss: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-2
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.25
eval_strategy: steps
eval_steps: 1
"""
FACTORY_DPO = """\
model_name_or_path: models/small
adapter_name_or_path: saves/small/chat
create_new_adapter: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
dataset: pairs
template: llama3
cutoff_len: 48
output_dir: saves/small/pairs
per_device_train_batch_size: 2
learning_rate: 5.0e-3
num_train_epochs: 1.0
bf16: true
"""
INFO = {
    "talks": {"file_name": "talks.json"},
    "pairs": {"file_name": "pairs.json", "ranking": True},
}
SCRIPT = """\
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained("models/small")
model = AutoModelForCausalLM.from_pretrained("models/small")
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="out/chat", learning_rate=1e-2, max_steps=3, max_length=40),
    train_dataset=load_dataset("json", data_files="chat.jsonl", split="train"),
    peft_config=lora,
).train()
base = AutoModelForCausalLM.from_pretrained("models/small")
model = PeftModel.from_pretrained(base, "out/chat", is_trainable=True)
DPOTrainer(
    model=model,
    args=DPOConfig(output_dir="out/dpo", beta=0.3, learning_rate=1e-3, max_steps=2),
    train_dataset=load_dataset("json", data_files="prefs.jsonl", split="train"),
).train()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as these tools' users have it, with the base of all files."""
    plans.write_base(tmp_path / "models" / "small")
    alpaca = [
        {"instruction": texts.sentence(row), "input": "", "output": texts.sentence(row + 6)}
        for row in range(8)
    ]
    ranked = [
        {**row, "chosen": row["output"], "rejected": texts.sentence(number + 9, step=3)}
        for number, row in enumerate(alpaca)
    ]
    for row in ranked:
        del row["output"]
    (tmp_path / "talks.json").write_text(json.dumps(alpaca))
    (tmp_path / "pairs.json").write_text(json.dumps(ranked))
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    plans.write_rows(tmp_path / "prefs.jsonl", texts.preferences())
    talk = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"})
    plans.write_rows(tmp_path / "chat.jsonl", [{"messages": talk}] * 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(folder: Path, *changes: str, **files: str) -> tuple[RunResult, dict[str, Any]]:
    """Import, check and run; the result, and the state of the run's stages."""
    paths = []
    for name, text in files.items():
        paths.append(folder / name.replace("_", ".", 1))
        paths[-1].write_text(text)
    found = import_plan(paths)
    assert found.missing == ()
    (folder / "plan.yaml").write_text(found.text)
    plan = read_plan(folder / "plan.yaml", changes)
    report = check_plan(plan, root=folder)
    assert report.faults == ()
    result = run_plan(plan, root=folder)
    lamina.verify(result.path, folder / "models" / "small").raise_if_failed()
    state = json.loads((Path(plan.output_dir) / "run.json").read_text())
    return result, state["stages"]


def test_a_pair_of_llamafactory_is_run_as_a_stack(folder: Path) -> None:
    result, state = imported(folder, a_yaml=FACTORY_SFT, b_yaml=FACTORY_DPO)
    # 6 of 8 examples in batches of 2 * 2, and 8 pairs in batches of 2 * 1.
    assert [(each.name, each.steps) for each in result.stages] == [("chat", 2), ("pairs", 4)]
    record = lamina.lineage(result.path)
    assert [(each.name, each.mode) for each in record.stages] == [
        ("chat", "fresh"),
        ("pairs", "stack"),
    ]
    assert record.newest.base.dtype == "bfloat16"
    assert [lamina.config["r"] for lamina in record.laminae] == [8, 4]
    assert "eval_loss" in state["chat"]["metrics"]


def test_files_of_axolotl_are_run_over_codes(folder: Path) -> None:
    talks = [
        {
            "turns": [
                {"role": "user", "content": texts.sentence(row)},
                {"role": "assistant", "content": texts.sentence(row + 6)},
            ]
        }
        for row in range(40)
    ]
    plans.write_rows(folder / "talks.jsonl", talks)
    ranked = [
        {
            "system": "",
            "question": texts.sentence(row),
            "chosen": texts.sentence(row + 6),
            "rejected": texts.sentence(row + 9, step=3),
        }
        for row in range(8)
    ]
    plans.write_rows(folder / "pairs.jsonl", ranked)
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} "
        "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    (folder / "chat.jinja").write_text(template)
    result, _ = imported(
        folder,
        "stages.chat.max_steps=2",
        "stages.dpo.max_steps=2",
        "stages.chat.max_length=32",
        # What this machine has not got.
        "attn_implementation=eager",
        "chat_template=chat.jinja",
        "stages.dpo.datasets=[{path: pairs.jsonl, columns: {prompt: question}}]",
        a_yml=AXOLOTL_ONE,
        b_yml=AXOLOTL_TWO,
    )
    assert [each.status for each in result.stages] == ["trained", "trained"]
    record = lamina.lineage(result.path)
    assert [each.mode for each in record.stages] == ["fresh", "continue"]
    assert len(record.laminae) == 1
    assert record.newest.base.quantization == "bitsandbytes nf4, double quantisation"


def test_a_script_of_two_stages_is_run(folder: Path) -> None:
    result, state = imported(folder, train_py=SCRIPT)
    assert [(each.name, each.steps) for each in result.stages] == [("chat", 3), ("dpo", 2)]
    assert state["dpo"]["metrics"]["train_loss"] == pytest.approx(0.693, abs=0.05)
    record = lamina.lineage(result.path)
    assert [each.mode for each in record.stages] == ["fresh", "continue"]
