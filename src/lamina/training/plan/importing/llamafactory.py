"""LLaMA-Factory's YAML files, one for each stage.

Source: the arguments of hiyouga/LLaMA-Factory (src/llamafactory/hparams) and its examples.
"""

from __future__ import annotations

from typing import Any

from lamina.training.plan.document import Document
from lamina.training.plan.importing.dataset_info import DatasetInfo
from lamina.training.plan.importing.draft import TRAINER_ARGUMENTS, Draft, Keys, carry, words

_METHODS = {"pt": "pt", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}
_ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
# What it takes where its file says nothing and a plan would take something else.
_DEFAULTS: dict[str, Any] = {
    "lora_r": 8,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "max_length": 2048,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "gradient_checkpointing": True,
}
_NOT_NEEDED = ("a run does without it", "nothing to do")
_KEYS = Keys(
    top={
        "model_name_or_path": "model_name_or_path",
        "model_revision": "model_revision",
        "trust_remote_code": "trust_remote_code",
    },
    settings={
        name: name
        for name in (
            "lora_alpha",
            "lora_dropout",
            "use_dora",
            "use_rslora",
            "loraplus_lr_ratio",
            "learning_rate",
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "lr_scheduler_type",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "optim",
            "neftune_noise_alpha",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "seed",
            "packing",
            "gradient_checkpointing",
        )
    }
    | {"lora_rank": "lora_r", "cutoff_len": "max_length", "pref_beta": "beta"},
    passed_on=TRAINER_ARGUMENTS,
    without={
        "do_train": _NOT_NEEDED,
        "overwrite_cache": _NOT_NEEDED,
        "overwrite_output_dir": ("a run goes on where it stopped", "choose another output_dir"),
        "preprocessing_num_workers": _NOT_NEEDED,
        "plot_loss": ("every run has a report with curves", "nothing to do"),
        "eval_strategy": ("eval_steps alone says when", "give eval_steps"),
        "save_strategy": ("save_steps alone says when", "give save_steps"),
        "save_only_model": ("checkpoints are for going on after a kill", "nothing to do"),
        "resume_from_checkpoint": ("a run goes on by itself", "nothing to do"),
        "deepspeed": ("sharding is accelerate's", "accelerate config, then accelerate launch"),
        "fsdp": ("sharding is accelerate's", "accelerate config, then accelerate launch"),
        "template": (
            "templates have names in LLaMA-Factory only; the tokenizer's own is taken",
            "if that isn't it, give chat_template a Jinja file",
        ),
        "pissa_convert": ("stages are saved as LoRA", "nothing to do"),
        "mask_history": ("all answers are trained on", "split the conversations"),
        "ref_model": ("the reference is the chain itself", "reference: parent, base or a stage"),
        "ref_model_adapters": (
            "the reference is the chain itself",
            "reference: parent, base or a stage",
        ),
        "pissa_iter": ("it belongs to pissa_init", "nothing to do"),
    },
)


def is_llamafactory(values: dict[str, Any]) -> bool:
    """Whether a file has the keys of LLaMA-Factory."""
    return "model_name_or_path" in values and bool(
        {"stage", "finetuning_type", "dataset_dir"} & values.keys()
    )


def read_llamafactory(document: Document) -> list[Draft]:
    """The stage of a file."""
    return [_Reader(document).draft]


class _Reader:
    _OF_DATA = (
        "dataset",
        "eval_dataset",
        "dataset_dir",
        "max_samples",
        "streaming",
        "interleave_probs",
        "mix_strategy",
        "train_on_prompt",
        "neat_packing",
    )

    def __init__(self, document: Document) -> None:
        self._document, self._values = document, document.values
        self.draft = Draft(document.source, settings={"method": "sft"})
        settings = self.draft.settings
        settings["lora_target_modules"] = "all-linear"
        special = {
            "stage": self._stage,
            "finetuning_type": self._kind,
            "lora_target": self._targets,
            "additional_target": lambda value: settings.update(modules_to_save=words(value)),
            "adapter_name_or_path": self._parent,
            "create_new_adapter": lambda value: None,
            "output_dir": lambda value: setattr(self.draft, "output_dir", str(value)),
            "warmup_ratio": lambda value: settings.setdefault("warmup_steps", value),
            "val_size": self._held_out,
            "bf16": lambda value: self._dtype(value, "bfloat16"),
            "pure_bf16": lambda value: self._dtype(value, "bfloat16"),
            "fp16": lambda value: self._dtype(value, "float16"),
            "quantization_bit": self._bits,
            "flash_attn": self._attention,
            "pissa_init": self._pissa,
            "pref_loss": self._loss,
            "report_to": self._reporting,
            "disable_gradient_checkpointing": lambda value: settings.update(
                gradient_checkpointing=not value
            ),
            **dict.fromkeys(self._OF_DATA, lambda value: None),
        }
        carry(self.draft, document, _KEYS, special)
        for name, value in _DEFAULTS.items():
            settings.setdefault(name, value)
        if "max_steps" in settings:
            settings.pop("num_train_epochs")
        self._data()
        self._meanings()

    def _note(self, key: str, why: str, cure: str) -> None:
        self.draft.note(self._document.line_of((key,)), key, why, cure)

    def _stage(self, value: Any) -> None:
        if value in _METHODS:
            self.draft.settings["method"] = _METHODS[value]
        else:
            self.draft.settings.pop("method")
            self._note("stage", f"there is no method {value!r}", "choose a method")

    def _kind(self, value: Any) -> None:
        if value != "lora":
            told = f"{value!r} was asked for, and every stage of a plan trains LoRA"
            self._note("finetuning_type", told, "see whether lora_r is what you want")

    def _targets(self, value: Any) -> None:
        names = words(value)
        self.draft.settings["lora_target_modules"] = "all-linear" if names == ["all"] else names

    def _parent(self, value: Any) -> None:
        adapters = words(value)
        self.draft.parent = adapters[-1]
        self.draft.new_adapter = self._values.get("create_new_adapter") is True
        if len(adapters) > 1:
            told = f"{len(adapters)} adapters are merged there; a plan's stages hold them all"
            self._note("adapter_name_or_path", told, "import the files that made them too")

    def _held_out(self, value: Any) -> None:
        if isinstance(value, float) and 0 < value < 1:
            self.draft.settings["eval_fraction"] = value
        elif value:
            self._note("val_size", f"{value!r} is a number of examples", "eval_fraction: a share")

    def _dtype(self, value: Any, dtype: str) -> None:
        if value is True:
            self.draft.top["dtype"] = dtype

    def _bits(self, value: Any) -> None:
        if value in (4, 8):
            self.draft.top[f"load_in_{value}bit"] = True
        else:
            self._note("quantization_bit", f"{value!r} bits aren't loaded", "load_in_4bit: true")

    def _attention(self, value: Any) -> None:
        if value in _ATTENTION:
            self.draft.top["attn_implementation"] = _ATTENTION[value]
        elif value != "auto":
            self._note("flash_attn", f"{value!r} is unknown", "attn_implementation")

    def _pissa(self, value: Any) -> None:
        if value is True:
            steps = self._values.get("pissa_iter", 16)
            name = "pissa" if steps == -1 else f"pissa_niter_{steps}"
            self.draft.settings["init_lora_weights"] = name

    def _loss(self, value: Any) -> None:
        if value == "orpo":
            self.draft.settings["method"] = "orpo"
        elif value in ("sigmoid", "hinge", "ipo"):
            self.draft.settings["loss_type"] = value
        else:
            self._note("pref_loss", f"{value!r} is none of dpo's in a plan", "choose a loss_type")

    def _reporting(self, value: Any) -> None:
        names = [name for name in words(value) if name != "none"]
        if names:
            self.draft.top["report_to"] = names

    def _data(self) -> None:
        values, settings = self._values, self.draft.settings
        info = DatasetInfo(self._document.source, values.get("dataset_dir", "data"), self._note)
        for key, own in (("dataset", "datasets"), ("eval_dataset", "eval_datasets")):
            names = words(values.get(key) or "")
            found = [info.find(name, settings.get("method"), key) for name in names]
            if found:
                settings[own] = found
        if not values.get("dataset"):
            self.draft.note(None, "dataset", "the file names none", "give datasets")
        for data in settings.get("datasets", ()):
            if values.get("max_samples"):
                data["max_samples"] = values["max_samples"]
            if values.get("streaming"):
                data["streaming"] = True
        shares = words(values.get("interleave_probs") or "")
        if shares and len(shares) == len(settings.get("datasets", ())):
            for data, share in zip(settings["datasets"], shares, strict=True):
                data["weight"] = float(share)
            told = f"{values.get('mix_strategy')!r}: a plan mixes by weight in its own way"
            self._note("interleave_probs", told, "lamina preview shows the mixture")

    def _meanings(self) -> None:
        """What holds there without being said."""
        values, settings = self._values, self.draft.settings
        method = settings.get("method")
        if values.get("neat_packing"):
            settings["packing"] = True
        if method == "pt":
            settings.setdefault("packing", True)
        elif method != "sft":
            settings.pop("packing", None)
        formats = [data.get("format") for data in settings.get("datasets", ())]
        # Of an instruction with an output, TRL trains on the output alone by itself.
        talks = any(each != "alpaca" for each in formats)
        if method == "sft" and talks and not values.get("train_on_prompt"):
            settings["assistant_only_loss"] = True
            told = "only answers are trained on there: assistant_only_loss: true"
            self.draft.note(None, "train_on_prompt", told, "take it out to train on all")
        if method in ("dpo", "kto"):
            # Without a ref_model the reference is what is left when the adapter is switched off.
            on_parent = self.draft.parent is not None and self.draft.new_adapter
            settings["reference"] = "parent" if on_parent else "base"
        if method not in ("dpo", "kto", "orpo"):
            settings.pop("beta", None)
