"""Three stages by hand with peft and TRL: what a careful person writes who has no Lamina.

    python -m benchmarks.by_hand.with_peft FOLDER

Nothing of Lamina's is imported. The losses are written to FOLDER/by_hand.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl

from benchmarks.by_hand.task import STAGES, Task

assert "lamina" not in sys.modules
assert peft.PeftModel.__module__ == "peft.peft_model"


class ByHand:
    """The stages, each from what the one before has saved."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.task = folder, Task.read(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.task.model)

    def base(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.task.model)

    def config(self, rank: int) -> peft.LoraConfig:
        return peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=self.task.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

    def arguments(self, name: str) -> dict[str, Any]:
        task = self.task
        return {
            "output_dir": str(self.folder / "by_hand" / f"{name}.trainer"),
            "learning_rate": task.learning_rates[STAGES.index(name)],
            "max_steps": task.steps,
            "per_device_train_batch_size": task.batch,
            "max_length": task.length,
            "lr_scheduler_type": task.scheduler,
            "warmup_steps": task.warmup_steps,
            "max_grad_norm": task.max_grad_norm,
            "optim": "adamw_torch",
            "seed": task.seed,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": task.steps,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": False,
            "bf16": False,
            # What TRL turns on by default, and a plan of Lamina's only when asked.
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }

    def given(self, name: str, model: Any) -> dict[str, Any]:
        return {
            "model": model,
            "train_dataset": self.rows(f"{name}.jsonl"),
            "eval_dataset": self.rows(f"{name}.held_out.jsonl"),
            "processing_class": self.tokenizer,
        }

    def rows(self, file: str) -> Any:
        return datasets.load_dataset(
            "json",
            data_files=str(self.folder / file),
            split="train",
            cache_dir=str(self.folder / "cache"),
        )

    def saved(self, name: str) -> str:
        return str(self.folder / "by_hand" / name)

    # Plain text: a first adapter.

    def domain(self) -> Any:
        base = self.base()
        # Right before the adapter is drawn.
        transformers.set_seed(self.task.seed)
        model = peft.get_peft_model(base, self.config(self.task.ranks[0]))
        arguments = trl.SFTConfig(**self.arguments("domain"), completion_only_loss=False)
        trainer = trl.SFTTrainer(args=arguments, **self.given("domain", model))
        trainer.train()
        model.save_pretrained(self.saved("domain"))
        return trainer

    # Prompts and answers: a second adapter on the first.

    def chat(self) -> Any:
        model = self.stacked() if self.task.mode == "stack" else self.over_merged()
        arguments = trl.SFTConfig(**self.arguments("chat"))
        trainer = trl.SFTTrainer(args=arguments, **self.given("chat", model))
        trainer.train()
        model.save_pretrained(self.saved("chat"), selected_adapters=["chat"])
        return trainer

    def stacked(self) -> Any:
        model = peft.PeftModel.from_pretrained(
            self.base(), self.saved("domain"), adapter_name="domain"
        )
        # Reading the first one has drawn numbers, too.
        transformers.set_seed(self.task.seed)
        model.add_adapter("chat", self.config(self.task.ranks[1]))
        return self.both(model)

    def both(self, model: Any) -> Any:
        """Both take part, the second one trains."""
        # `model.set_adapter` takes one name. This one takes two, and unfreezes both.
        model.base_model.set_adapter(["domain", "chat"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".chat." in name)
        # In train mode the first one's inputs would be dropped out, too.
        for name, module in model.named_modules():
            if name.endswith("lora_dropout.domain"):
                module.p = 0.0
        return model

    def over_merged(self) -> Any:
        base = self.merged_domain()
        transformers.set_seed(self.task.seed)
        return peft.get_peft_model(base, self.config(self.task.ranks[1]), adapter_name="chat")

    def merged_domain(self) -> Any:
        return peft.PeftModel.from_pretrained(self.base(), self.saved("domain")).merge_and_unload()

    # Preferences: the second adapter goes on; what it was is the reference.

    def taste(self) -> Any:
        arguments = trl.DPOConfig(
            **self.arguments("taste"), beta=self.task.beta, disable_dropout=not self.task.dropout
        )
        trainer = trl.DPOTrainer(
            args=arguments,
            ref_model=self.reference(),
            **self.given("taste", self.continued(trainable=True)),
        )
        trainer.train()
        trainer.model.save_pretrained(self.saved("taste"), selected_adapters=["chat"])
        return trainer

    def continued(self, *, trainable: bool) -> Any:
        chat = str(Path(self.saved("chat"), "chat"))
        if self.task.mode == "merge":
            # Over the same merged base again; over the plain one it would be another model.
            return peft.PeftModel.from_pretrained(
                self.merged_domain(), chat, adapter_name="chat", is_trainable=trainable
            )
        model = peft.PeftModel.from_pretrained(
            self.base(), self.saved("domain"), adapter_name="domain"
        )
        model.load_adapter(chat, "chat", is_trainable=trainable)
        return self.both(model)

    def reference(self) -> Any:
        # Without a model of its own TRL asks for an adapter named "default"; a PeftModel's forward
        # it can't patch, but that of the model with the layers in it.
        model = self.continued(trainable=False).eval().requires_grad_(False)
        return model.get_base_model()


def main() -> None:
    folder = Path(sys.argv[1])
    by_hand = ByHand(folder)
    told = {name: getattr(by_hand, name)().state.log_history for name in STAGES}
    (folder / "by_hand.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
