"""Plans made of other tools' files: what they mean there, and a note for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina.errors import PlanError
from lamina.training.plan import Plan, read_plan
from lamina.training.plan.importing import Imported, import_plan

FACTORY_ONE = """\
### model
model_name_or_path: models/small
trust_remote_code: true
### method
stage: pt
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: manual
cutoff_len: 512
overwrite_cache: true
### output
output_dir: saves/small/domain
### train
per_device_train_batch_size: 1
learning_rate: 1.0e-4
warmup_ratio: 0.1
bf16: true
ddp_timeout: 1800
frobnicate: 3
"""
FACTORY_TWO = """\
model_name_or_path: models/small
adapter_name_or_path: saves/small/domain
create_new_adapter: true
stage: dpo
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
pref_beta: 0.2
pref_loss: ipo
dataset: pairs
template: llama3
output_dir: saves/small/pairs
"""
INFO = {
    "manual": {"file_name": "manual.jsonl", "columns": {"prompt": "body"}},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"},
    },
}
AXOLOTL_ONE = """\
base_model: models/small
load_in_8bit: false
datasets:
  - path: talks.jsonl
    type: chat_template
    field_messages: turns
val_set_size: 0.05
output_dir: ./outputs/chat
sequence_len: 256
sample_packing: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
flash_attention: true
special_tokens:
  pad_token: <pad>
"""
AXOLOTL_TWO = """\
base_model: models/small
rl: dpo
datasets:
  - {path: pairs.jsonl, type: chatml.intel}
output_dir: ./outputs/dpo
adapter: qlora
lora_model_dir: ./outputs/chat
lora_r: 32
lora_alpha: 8
lora_target_linear: true
learning_rate: 0.00001
"""
SCRIPT = """\
import os
from trl import SFTTrainer
BASE = "models/small"
raise SystemExit("this is never run")
model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
data = load_dataset("json", data_files="talks.jsonl", split="train").map(tidy)
lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
args = SFTConfig(output_dir="out/chat", learning_rate=3e-4, max_length=99, tf32=True,
                 seed=int(os.environ["SEED"]))
trainer = SFTTrainer(model=model, args=args, train_dataset=data, peft_config=lora)
trainer.train()
base = AutoModelForCausalLM.from_pretrained(BASE)
model = PeftModel.from_pretrained(base, "out/chat", is_trainable=True)
pairs = load_dataset("owner/pairs", split="train[:90%]")
second = DPOTrainer(model, args=DPOConfig(output_dir="out/dpo", beta=0.3), train_dataset=pairs)
"""


def imported(folder: Path, **files: str) -> tuple[Imported, Plan]:
    paths = []
    for name, text in files.items():
        paths.append(folder / name.replace("_", ".", 1))
        paths[-1].write_text(text)
    found = import_plan(paths)
    assert found.missing == (), found.text
    (folder / "plan.yaml").write_text(found.text)
    return found, read_plan(folder / "plan.yaml")


def noted(found: Imported) -> dict[str, str]:
    return {note.key: f"{note.why}; {note.cure}" for note in found.notes}


def test_two_files_of_llamafactory_are_a_chain_whatever_their_order(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    found, plan = imported(tmp_path, b_yaml=FACTORY_TWO, a_yaml=FACTORY_ONE)
    assert found.tools == ("LLaMA-Factory", "LLaMA-Factory")
    assert (plan.model_name_or_path, plan.output_dir) == ("models/small", "saves/small")
    assert (plan.trust_remote_code, plan.dtype) == (True, "bfloat16")
    assert [(s.name, s.mode, s.method) for s in plan.stages] == [
        ("domain", None, "pt"),
        ("pairs", "stack", "dpo"),
    ]
    domain, pairs = map(plan.settings_of, plan.stages)
    assert (domain.lora_r, domain.lora_alpha, domain.lora_target_modules) == (8, 16, "all-linear")
    assert (pairs.lora_r, pairs.lora_target_modules) == (4, ["q_proj", "v_proj"])
    assert (domain.warmup_steps, domain.max_length, domain.packing) == (0.1, 512, True)
    # What holds there without being said.
    assert (pairs.learning_rate, pairs.num_train_epochs, pairs.max_length) == (5e-5, 3.0, 2048)
    assert (pairs.lr_scheduler_type, pairs.per_device_train_batch_size) == ("linear", 8)
    assert (pairs.beta, pairs.loss_type, pairs.reference) == (0.2, "ipo", "parent")
    assert domain.trainer_args == {"ddp_timeout": 1800}
    (text,), (pair,) = domain.datasets or [], pairs.datasets or []
    assert text.path.endswith("manual.jsonl")
    assert (text.format, text.columns) == ("text", {"text": "body"})
    assert (pair.format, pair.columns) == ("preference", {"chosen": "good", "rejected": "bad"})
    notes = noted(found)
    assert set(notes) == {"do_train", "overwrite_cache", "frobnicate", "template"}
    assert "trainer_args" in notes["frobnicate"]
    assert next(n.line for n in found.notes if n.key == "frobnicate") == 22
    assert all(str(note) in found.text for note in found.notes)


def test_names_of_data_that_nobody_knows_are_told(tmp_path: Path) -> None:
    found, plan = imported(tmp_path, a_yaml=FACTORY_ONE)
    assert "is in no dataset_info.json" in noted(found)["dataset"]
    assert [data.path for data in plan.stages[0].datasets or ()] == ["manual"]


def test_files_of_axolotl_continue_their_adapter(tmp_path: Path) -> None:
    found, plan = imported(tmp_path, a_yml=AXOLOTL_ONE, b_yml=AXOLOTL_TWO)
    assert [(s.name, s.mode, s.method) for s in plan.stages] == [
        ("chat", None, "sft"),
        ("dpo", "continue", "dpo"),
    ]
    chat, dpo = map(plan.settings_of, plan.stages)
    assert (plan.load_in_4bit, plan.attn_implementation) == (True, "flash_attention_2")
    assert (chat.lora_r, chat.lora_alpha, chat.lora_target_modules) == (32, 16, "all-linear")
    assert (chat.max_length, chat.packing, chat.eval_fraction) == (256, True, 0.05)
    assert (chat.num_train_epochs, chat.optim) == (4, "adamw_bnb_8bit")
    assert chat.assistant_only_loss
    assert (dpo.reference, dpo.per_device_train_batch_size, dpo.max_length) == ("base", 1, 512)
    (data,) = chat.datasets or []
    assert (data.format, data.columns) == ("messages", {"messages": "turns"})
    notes = noted(found)
    assert "save one with these tokens" in notes["special_tokens"]
    assert "8 here, and 16 in the stage that it continues" in notes["lora_alpha"]
    assert "chatml.intel" in notes["datasets"]


def test_a_script_is_read_and_never_run(tmp_path: Path) -> None:
    found, plan = imported(tmp_path, train_py=SCRIPT)
    assert [(s.name, s.mode, s.method) for s in plan.stages] == [
        ("chat", None, "sft"),
        ("dpo", "continue", "dpo"),
    ]
    chat, dpo = map(plan.settings_of, plan.stages)
    assert (plan.model_name_or_path, plan.dtype, plan.output_dir) == (
        "models/small",
        "bfloat16",
        "out",
    )
    assert (chat.lora_r, chat.lora_alpha, chat.lora_target_modules) == (4, 8, ["q_proj"])
    assert (chat.learning_rate, chat.max_length, chat.num_train_epochs) == (3e-4, 99, 3.0)
    assert chat.trainer_args == {"tf32": True}
    assert (dpo.learning_rate, dpo.beta, dpo.reference) == (1e-6, 0.3, "parent")
    assert [(d.path, d.split) for s in (chat, dpo) for d in s.datasets or ()] == [
        ("talks.jsonl", "train"),
        ("owner/pairs", "train[:90%]"),
    ]
    notes = noted(found)
    assert "is computed, not written" in notes["SFTConfig(seed=)"]
    assert "base is what the old ones did" in notes["ref_model"]
    assert ".map(...) is the script's own" in notes["train_dataset"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model_name_or_path: x\nstage: ppo\ndataset: a\n")
    found = import_plan([file])
    assert any("output_dir: is missing" in fault for fault in found.missing)
    assert any("say what it does" in fault for fault in found.missing)
    assert "there is no method 'ppo'" in noted(found)["stage"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "x: 1\n", "of no tool that is known"),
        ("a.py", "x = (\n", "is not Python"),
        ("a.py", "x = 1\n", "makes no trainer"),
    ],
)
def test_files_of_nothing_that_is_known(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PlanError, match=told):
        import_plan([tmp_path / name])
