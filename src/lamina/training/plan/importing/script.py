"""Python scripts that train in stages with peft and TRL: read as syntax, never run."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from lamina.errors import PlanError
from lamina.training.plan.adapters import FIELDS
from lamina.training.plan.importing.calls import Calls, Unknown
from lamina.training.plan.importing.draft import Draft
from lamina.training.plan.settings import Settings

_TRAINERS = {
    "SFTTrainer": "sft",
    "DPOTrainer": "dpo",
    "KTOTrainer": "kto",
    "ORPOTrainer": "orpo",
    "RewardTrainer": "reward",
    "GRPOTrainer": "grpo",
}
_LORA = {field: setting for setting, field in FIELDS.items()}
# What TRL's configs and LoraConfig take where a script says nothing and a plan would differ.
_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "reward": 1e-4, "grpo": 1e-6}
_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "gradient_checkpointing": True,
}
_RENAMED = {"max_seq_length": "max_length", "warmup_ratio": "warmup_steps"}
_IGNORED = {
    "task_type": None,
    "output_dir": None,
    "overwrite_output_dir": ("a run goes on where it stopped", "choose another output_dir"),
    "bf16": None,
    "fp16": None,
    "report_to": None,
    "push_to_hub": ("a run uploads nothing", "upload the last stage's directory"),
    "eval_strategy": ("eval_steps alone says when", "give eval_steps"),
    "save_strategy": ("save_steps alone says when", "give save_steps"),
    "dataset_text_field": ("columns says it: {text: name}", "give columns, unless it is text"),
}


def read_script(file: Path) -> list[Draft]:
    """A stage for each trainer that a script makes, in their order.

    Raises:
        PlanError: it can't be read, is no Python, or makes no trainer.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"'{file}' can't be read: {error}.", cure="name another file") from error
    except (SyntaxError, ValueError, RecursionError) as error:
        raise PlanError(f"'{file}' is not Python: {error}.", cure="mend it first") from error
    calls = Calls(tree)
    found = [each for each in calls.all if each.name in _TRAINERS]
    if not found:
        raise PlanError(
            f"'{file}' makes no trainer of TRL.",
            faults=[f"looked for {', '.join(_TRAINERS)}"],
            cure="name the script that calls SFTTrainer(...) and the like",
        )
    drafts: list[Draft] = []
    for trainer in found:
        drafts.append(_Stage(calls, str(file), trainer, place=len(drafts)).draft)
    return drafts


class _Stage:
    """What one trainer is made from."""

    def __init__(self, calls: Calls, source: str, trainer: Any, place: int) -> None:
        self._calls = calls
        self.draft = Draft(source, follows=place > 0)
        method = _TRAINERS[trainer.name]
        self.draft.settings["method"] = method
        self._line = trainer.line
        self._arguments(calls.call_at(trainer.node("args", 1)))
        self._model(trainer)
        for key, own in (("train_dataset", "datasets"), ("eval_dataset", "eval_datasets")):
            node = trainer.node(key)
            if node is not None:
                self._data(key, own, node)
        self._reference(trainer, method)
        for name in trainer.keywords() - _OF_TRAINER:
            self._note(trainer.line, name, "an object of the script", "see whether it is needed")
        for key, value in {**_DEFAULTS, "learning_rate": _RATES[method]}.items():
            self.draft.settings.setdefault(key, value)
        if "max_steps" in self.draft.settings:
            self.draft.settings.pop("num_train_epochs")

    def _note(self, line: int | None, key: str, why: str, cure: str) -> None:
        self.draft.note(line, key, why, cure)

    def _arguments(self, config: Any) -> None:
        """Of SFTConfig(...) and the like."""
        if config is None:
            told = "the trainer's args are made where this can't be read"
            self._note(self._line, "args", told, "give learning_rate, max_length ...")
            return
        for name, value in config.values(self.draft):
            own = _RENAMED.get(name, name)
            if name in ("bf16", "fp16") and value is True:
                self.draft.top["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[name]
            elif name == "output_dir":
                self.draft.output_dir = str(value)
            elif name == "report_to" and value not in ("none", None):
                self.draft.top["report_to"] = value
            elif name in _IGNORED:
                why = _IGNORED[name]
                if why is not None and value:
                    self._note(config.line, name, *why)
            elif own in Settings.model_fields and own not in FIELDS:
                self.draft.settings[own] = value
            else:
                self.draft.passed_on(name, value)

    def _model(self, trainer: Any) -> None:
        """The base, and the adapter that trains: of peft_config, or made before the trainer."""
        node = trainer.node("model", 0)
        lora = self._calls.call_at(trainer.node("peft_config"))
        text = self._calls.literal(node)
        if isinstance(text, str):
            self.draft.top["model_name_or_path"] = text
        for call in self._calls.behind(node, before=trainer.line):
            if call.name == "get_peft_model":
                lora = lora or self._calls.call_at(call.node("peft_config", 1))
            elif call.owner in ("PeftModel", "AutoPeftModelForCausalLM"):
                place = 1 if call.owner == "PeftModel" else 0
                self._parent(call, self._calls.literal(call.node("model_id", place)))
            elif call.name == "from_pretrained":
                self._base(call)
        if lora is not None:
            self.draft.new_adapter = True
            self._lora(lora)
        elif self.draft.parent is None and not self.draft.follows:
            told = "no LoraConfig leads to this trainer"
            self._note(self._line, "peft_config", told, "give lora_r and the like")

    def _parent(self, call: Any, name: Any) -> None:
        if isinstance(name, str):
            self.draft.parent = name
        else:
            self._note(call.line, "from_pretrained", "the adapter's name is computed", "see modes")

    def _base(self, call: Any) -> None:
        name = self._calls.literal(call.node("pretrained_model_name_or_path", 0))
        if isinstance(name, str):
            self.draft.top.setdefault("model_name_or_path", name)
        else:
            told = "the model's name is computed, not written"
            self._note(call.line, "from_pretrained", told, "give model_name_or_path")
        known = {
            "attn_implementation": "attn_implementation",
            "trust_remote_code": "trust_remote_code",
            "revision": "model_revision",
            "load_in_4bit": "load_in_4bit",
            "load_in_8bit": "load_in_8bit",
        }
        bits = self._calls.call_at(call.node("quantization_config"))
        for part in filter(None, (call, bits)):
            for name in part.keywords() - {"pretrained_model_name_or_path", "quantization_config"}:
                value = self._calls.literal(part.node(name))
                if name in ("dtype", "torch_dtype"):
                    self._dtype(part, name)
                elif name in known and not isinstance(value, Unknown):
                    self.draft.top[known[name]] = value
                else:
                    self._note(part.line, name, "it has no counterpart", "see whether it is needed")

    def _dtype(self, call: Any, name: str) -> None:
        node = call.node(name)
        value = node.attr if isinstance(node, ast.Attribute) else self._calls.literal(node)
        if value in ("auto", "float32", "bfloat16", "float16"):
            self.draft.top["dtype"] = value
        else:
            self._note(call.line, name, "it is computed, not written", "give dtype")

    def _lora(self, config: Any) -> None:
        settings = self.draft.settings
        # LoraConfig's own defaults, which differ from a plan's.
        settings |= {"lora_r": 8, "lora_alpha": 8}
        for name, value in config.values(self.draft):
            if name in _LORA:
                settings[_LORA[name]] = value
            elif name not in _IGNORED and value not in (None, False):
                self._note(config.line, name, "a plan has no such setting", "see if it is needed")
        if "lora_target_modules" not in settings and "lora_target_parameters" not in settings:
            told = "without target_modules peft takes what is usual for the architecture"
            self._note(config.line, "target_modules", told, "all-linear is taken; or name them")

    def _data(self, key: str, own: str, node: ast.expr) -> None:
        calls = self._calls.behind(node, before=self._line)
        loads = [call for call in calls if call.name == "load_dataset"]
        for call in calls:
            if call.name in ("map", "filter", "select", "shuffle", "train_test_split"):
                told = f".{call.name}(...) is the script's own"
                self._note(call.line, key, told, "do it to the file, or see columns and format")
        if not loads:
            told = "the data is made where this can't be read"
            self._note(self._line, key, told, f"give {own}")
            return
        data: dict[str, Any] = {}
        for name, value in loads[0].values(self.draft, positional=("path", "name")):
            if name == "data_files" and isinstance(value, str):
                data["path"] = value
                data.pop("name", None)
            elif name in ("path", "name", "split", "revision", "streaming"):
                data.setdefault(name, value)
            else:
                told = f"load_dataset: {name}={value!r} has no counterpart"
                self._note(loads[0].line, key, told, "see whether it is needed")
        if "path" in data:
            self.draft.settings[own] = [data]

    def _reference(self, trainer: Any, method: str) -> None:
        if method not in ("dpo", "kto"):
            return
        node = trainer.node("ref_model")
        if node is None or self._calls.literal(node) is None:
            self.draft.settings["reference"] = "parent"
            if not self.draft.new_adapter and (self.draft.parent or self.draft.follows):
                told = "TRL compares with the adapter as it was loaded, and its old releases with "
                cure = "reference: parent was put; base is what the old ones did"
                self._note(self._line, "ref_model", f"{told}the base alone", cure)
        else:
            told = "the reference is an object of the script"
            self._note(self._line, "ref_model", told, "reference: parent, base or a stage")


_OF_TRAINER = {
    "model",
    "args",
    "train_dataset",
    "eval_dataset",
    "peft_config",
    "processing_class",
    "tokenizer",
    "ref_model",
}
