"""Axolotl's YAML files, one for each stage.

Source: the configuration reference and examples of axolotl-ai-cloud/axolotl.
"""

from __future__ import annotations

from typing import Any

from lamina.training.plan.document import Document
from lamina.training.plan.importing.draft import TRAINER_ARGUMENTS, Draft, Keys, carry

_METHODS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "grpo": "grpo"}
_FORMATS = {"completion": "text", "alpaca": "alpaca", "sharegpt": "sharegpt"}
_DATA = {"path": "path", "name": "name", "split": "split", "revision": "revision"}
_NOT_NEEDED = ("a run does without it", "nothing to do")
_CURVES = ("only that curves go to wandb is carried over", "set WANDB_PROJECT and the like")
_ACCELERATE = ("sharding is accelerate's", "accelerate config, then accelerate launch")
_WEIGHT = ("TRL has it by another name", "trainer_args: {desirable_weight, undesirable_weight}")
_KEYS = Keys(
    top={
        "base_model": "model_name_or_path",
        "revision_of_model": "model_revision",
        "tokenizer_config": "tokenizer_name_or_path",
        "trust_remote_code": "trust_remote_code",
        "load_in_4bit": "load_in_4bit",
        "load_in_8bit": "load_in_8bit",
        "chat_template_jinja": "chat_template",
    },
    settings={
        name: name
        for name in (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "loraplus_lr_ratio",
            "learning_rate",
            "max_steps",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "seed",
            "early_stopping_patience",
            "neftune_noise_alpha",
        )
    }
    | {
        "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "num_epochs": "num_train_epochs",
        "sequence_len": "max_length",
        "sample_packing": "packing",
        "optimizer": "optim",
        "lr_scheduler": "lr_scheduler_type",
        "lora_modules_to_save": "modules_to_save",
        "lora_target_parameters": "lora_target_parameters",
        "peft_use_dora": "use_dora",
        "peft_use_rslora": "use_rslora",
        "peft_init_lora_weights": "init_lora_weights",
        "rl_beta": "beta",
        "dpo_beta": "beta",
        "orpo_alpha": "beta",
    },
    passed_on=TRAINER_ARGUMENTS,
    without={
        "model_type": ("the base's config says its class", "nothing to do"),
        "tokenizer_type": ("the tokenizer's files say its class", "nothing to do"),
        "dataset_prepared_path": _NOT_NEEDED,
        "strict": _NOT_NEEDED,
        "pad_to_sequence_len": ("batches are padded to their longest example", "nothing to do"),
        "eval_sample_packing": ("evaluation packs nothing", "nothing to do"),
        "evals_per_epoch": ("evaluations are counted in steps", "give eval_steps"),
        "saves_per_epoch": ("checkpoints are counted in steps", "give save_steps"),
        "special_tokens": ("a plan changes no tokenizer", "save one with these tokens; name it"),
        "tokens": ("a plan changes no tokenizer", "save one with these tokens; name it"),
        "deepspeed": _ACCELERATE,
        "fsdp": _ACCELERATE,
        "fsdp_config": _ACCELERATE,
        "hub_model_id": ("a run uploads nothing", "upload the last stage's directory"),
        "resume_from_checkpoint": ("a run goes on by itself", "nothing to do"),
        "wandb_entity": _CURVES,
        "wandb_name": _CURVES,
        "wandb_watch": _CURVES,
        "wandb_log_model": _CURVES,
        "kto_desirable_weight": _WEIGHT,
        "kto_undesirable_weight": (
            "it has another name",
            "trainer_args: {undesirable_weight: ...}",
        ),
    },
)


def is_axolotl(values: dict[str, Any]) -> bool:
    """Whether a file has the keys of Axolotl."""
    return "base_model" in values


def read_axolotl(document: Document) -> list[Draft]:
    """The stage of a file."""
    return [_Reader(document).draft]


class _Reader:
    def __init__(self, document: Document) -> None:
        self._document, self._values = document, document.values
        self.draft = Draft(document.source, settings={"method": "sft"})
        settings = self.draft.settings
        special = {
            "rl": self._method,
            "adapter": self._adapter,
            "lora_model_dir": lambda value: setattr(self.draft, "parent", str(value)),
            "lora_target_linear": lambda value: None,
            "output_dir": lambda value: setattr(self.draft, "output_dir", str(value)),
            "datasets": lambda value: self._data(value, "datasets"),
            "test_datasets": lambda value: self._data(value, "eval_datasets"),
            "pretraining_dataset": self._pretraining,
            "val_set_size": self._held_out,
            "warmup_ratio": lambda value: settings.setdefault("warmup_steps", value),
            "train_on_inputs": lambda value: None,
            "bf16": lambda value: self._dtype(value, "bfloat16"),
            "fp16": lambda value: self._dtype(value, "float16"),
            "flash_attention": lambda value: self._attention(value, "flash_attention_2"),
            "sdp_attention": lambda value: self._attention(value, "sdpa"),
            "eager_attention": lambda value: self._attention(value, "eager"),
            "attn_implementation": lambda value: self._attention(bool(value), str(value)),
            "chat_template": self._template,
            "wandb_project": self._wandb,
        }
        carry(self.draft, document, _KEYS, special)
        self._meanings()

    def _note(self, key: str, why: str, cure: str) -> None:
        self.draft.note(self._document.line_of((key,)), key, why, cure)

    def _method(self, value: Any) -> None:
        if value not in _METHODS:
            self.draft.settings.pop("method")
            self._note("rl", f"there is no method {value!r}", "choose a method")
            return
        self.draft.settings["method"] = _METHODS[value]
        if value == "ipo":
            self.draft.settings["loss_type"] = "ipo"

    def _adapter(self, value: Any) -> None:
        if value == "qlora":
            self.draft.top["load_in_4bit"] = True
        elif value != "lora":
            told = f"{value!r} was asked for, and every stage of a plan trains LoRA"
            self._note("adapter", told, "see whether lora_r is what you want")

    def _data(self, value: Any, own: str) -> None:
        found = [self._one(each) for each in value if isinstance(each, dict)]
        if found:
            self.draft.settings[own] = found
        if own == "datasets" and found and all(each.get("format") == "text" for each in found):
            self.draft.settings["method"] = "pt"

    def _one(self, entry: dict[str, Any]) -> dict[str, Any]:
        data = {own: entry[key] for key, own in _DATA.items() if entry.get(key)}
        files = entry.get("data_files")
        if isinstance(files, str) or (isinstance(files, list) and len(files) == 1):
            data["path"] = files if isinstance(files, str) else files[0]
        kind = str(entry.get("type", ""))
        columns: dict[str, str] = {}
        if kind in _FORMATS:
            data["format"] = _FORMATS[kind]
        elif kind.partition(".")[0] == "chat_template" and not self._values.get("rl"):
            data["format"] = self._talks(entry, columns)
        else:
            told = f"type {kind!r}: the layout is found out from the columns"
            self._note("datasets", told, "lamina preview shows what comes of it; else give format")
        if kind == "completion" and entry.get("field", "text") != "text":
            columns["text"] = entry["field"]
        columns |= self._of_pairs(entry)
        if columns:
            data["columns"] = columns
        known = {*_DATA, "type", "ds_type", "field", "roles", "message_property_mappings"}
        known |= {"field_messages", "field_chosen", "field_rejected"}
        for key in sorted(entry.keys() - known):
            if not (key == "data_files" and data.get("path") == entry[key]):
                told = f"{data.get('path')}: {key}={entry[key]!r} has no counterpart"
                self._note("datasets", told, "see whether it is needed")
        return data

    def _of_pairs(self, entry: dict[str, Any]) -> dict[str, str]:
        named = {"chosen": entry.get("field_chosen"), "rejected": entry.get("field_rejected")}
        if self._values.get("rl"):
            named["prompt"] = entry.get("field_messages")
        return {own: theirs for own, theirs in named.items() if theirs and theirs != own}

    def _talks(self, entry: dict[str, Any], columns: dict[str, str]) -> str:
        named = entry.get("message_property_mappings") or {}
        role, content = named.get("role", "role"), named.get("content", "content")
        field = entry.get("field_messages", "messages")
        if (role, content) == ("from", "value"):
            if field != "conversations":
                columns["conversations"] = field
            return "sharegpt"
        if (role, content) != ("role", "content"):
            told = f"turns have {role} and {content}"
            self._note("datasets", told, "rename them in the data: role and content")
        if field != "messages":
            columns["messages"] = field
        return "messages"

    def _pretraining(self, value: Any) -> None:
        listed = value if isinstance(value, list) else [value]
        found = [each if isinstance(each, dict) else {"path": each} for each in listed]
        self._data([{"type": "completion", **each} for each in found], "datasets")
        for data in self.draft.settings["datasets"]:
            data["streaming"] = True

    def _held_out(self, value: Any) -> None:
        if isinstance(value, float) and 0 < value < 1:
            self.draft.settings["eval_fraction"] = value
        elif value:
            self._note("val_set_size", f"{value!r} is no share", "eval_fraction: a share")

    def _dtype(self, value: Any, dtype: str) -> None:
        if value is True:
            self.draft.top["dtype"] = dtype
        elif value == "auto":
            self._note("bf16", "'auto' depends on the machine", "dtype: bfloat16, if it is to be")

    def _attention(self, value: Any, name: str) -> None:
        if value is True:
            self.draft.top["attn_implementation"] = name

    def _template(self, value: Any) -> None:
        if value not in ("tokenizer_default", "jinja"):
            told = f"{value!r} is a name in Axolotl only; the tokenizer's own template is taken"
            self._note("chat_template", told, "if that isn't it, give chat_template a Jinja file")

    def _wandb(self, value: Any) -> None:
        self.draft.top["report_to"] = ["wandb"]
        self._note("wandb_project", *_CURVES)

    def _meanings(self) -> None:
        """What holds there without being said."""
        values, settings = self._values, self.draft.settings
        if values.get("lora_target_linear") is True:
            settings["lora_target_modules"] = "all-linear"
        settings.setdefault("per_device_train_batch_size", 1)
        settings.setdefault("max_length", 512)
        for name in ("load_in_4bit", "load_in_8bit"):
            if self.draft.top.get(name) is False:
                del self.draft.top[name]
        method = settings.get("method")
        if method not in ("pt", "sft"):
            settings.pop("packing", None)
        if method in ("dpo", "kto", "grpo"):
            settings["reference"] = "base"
        formats = [data.get("format") for data in settings.get("datasets", ())]
        talks = any(each in ("messages", "sharegpt") for each in formats)
        if method == "sft" and talks and not values.get("train_on_inputs"):
            settings["assistant_only_loss"] = True
            told = "only answers are trained on there: assistant_only_loss: true"
            self.draft.note(None, "train_on_inputs", told, "take it out to train on all")
