"""Examples as tokens, cut and masked by TRL's own code: what a stage's trainer learns from.

TRL prepares data inside its trainers, which can't be made without a model. Here their methods that
do it are called on trainers that were never set up, with nothing but what these methods read.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lamina.extras import require
from lamina.training.data.chat import is_conversation
from lamina.training.data.examples import quiet
from lamina.training.plan.settings import Settings
from lamina.training.quiet import errors_only

# Longer than any example.
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Tokens:
    """A sequence of tokens.

    Attributes:
        ids: of the tokenizer.
        trained: whether each of them is a label.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


# One example: the name of a part ("" where there is one only, else "chosen", "rejected") -> tokens.
Sequences = dict[str, Tokens]


def tokenize(
    dataset: Any, settings: Settings, tokenizer: Any, *, max_length: int | None
) -> list[Sequences]:
    """What the trainer of a stage makes of examples; without those that it leaves out.

    Args:
        dataset: a `Dataset` in the columns of the method.
        settings: of the stage; `trainer_args` may say how long examples are cut.
        tokenizer: of the stage.
        max_length: tokens per example; None doesn't cut.
    """
    asked = settings.trainer_args or {}
    if asked.get("eos_token"):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = asked["eos_token"]
    prepare = {
        "pt": _supervised,
        "sft": _supervised,
        "dpo": _pairs,
        "kto": _judged,
        "orpo": _odds,
        "reward": _scored,
        "grpo": _prompts,
    }[settings.method or "sft"]
    # What TRL notes of single examples is counted instead.
    with quiet(always=True), errors_only(logging.getLogger("trl")):
        return prepare(dataset, settings, tokenizer, max_length)


def _arguments(config: type, settings: Settings, max_length: int | None) -> SimpleNamespace:
    """What TRL's config says where nobody says otherwise, without making one."""
    fields = config.__dataclass_fields__  # type: ignore[attr-defined]
    given = {
        key: getattr(settings, key)
        for key in ("assistant_only_loss", "completion_only_loss")
        if getattr(settings, key) is not None
    }
    told = {key: field.default for key, field in fields.items()}
    told |= {**(settings.trainer_args or {}), **given}
    told |= {"max_length": max_length, "dataset_num_proc": None, "shuffle_dataset": False}
    return SimpleNamespace(**told)


def _unmade(trainer: type, **attributes: Any) -> Any:
    """A trainer that has no model, but the methods that prepare data."""
    made: Any = object.__new__(trainer)
    vars(made).update(attributes)
    return made


def _supervised(
    dataset: Any, settings: Settings, tokenizer: Any, max_length: int | None
) -> list[Sequences]:
    trl = require("trl", "train")
    templates = require("trl.chat_template_utils", "train")
    args = _arguments(trl.SFTConfig, settings, max_length)
    marked = not args.assistant_only_loss or templates.has_generation_markers(
        tokenizer.chat_template
    )
    completions = {"prompt", "completion"} <= set(dataset.column_names)
    told = args.completion_only_loss
    trainer = _unmade(
        trl.SFTTrainer,
        _tokenizer=tokenizer,
        chat_template=None if marked else templates.get_training_chat_template(tokenizer),
        completion_only_loss=completions if told is None else told,
    )
    rows = trainer._prepare_dataset(dataset, tokenizer, args, False, None, "preview")
    return [{"": _labelled(row["input_ids"], row["labels"])} for row in rows]


def _pairs(
    dataset: Any, settings: Settings, tokenizer: Any, max_length: int | None
) -> list[Sequences]:
    trl = require("trl", "train")
    module = require("trl.trainer.dpo_trainer", "train")
    args = _arguments(trl.DPOConfig, settings, max_length)
    trainer = _unmade(trl.DPOTrainer, _tokenizer=tokenizer)
    rows = trainer._prepare_dataset(dataset, tokenizer, args, "preview")
    collate = module.DataCollatorForPreference(0, max_length, args.truncation_mode)
    return [_collated(collate([row]), ("chosen", "rejected")) for row in rows]


def _judged(
    dataset: Any, settings: Settings, tokenizer: Any, max_length: int | None
) -> list[Sequences]:
    trl = require("trl", "train")
    module = require("trl.trainer.kto_trainer", "train")
    args = _arguments(trl.KTOConfig, settings, max_length)
    # The other answers of a batch, of which KTO estimates a divergence, are not looked at.
    trainer = _unmade(trl.KTOTrainer, _tokenizer=tokenizer, calculate_KL=False)
    rows = trainer._prepare_dataset(dataset, tokenizer, args, "preview")
    collate = module.DataCollatorForUnpairedPreference(0, max_length)
    names = ("unwanted", "wanted")
    return [_collated(collate([row]), (names[bool(row["label"])],)) for row in rows]


def _odds(
    dataset: Any, settings: Settings, tokenizer: Any, max_length: int | None
) -> list[Sequences]:
    with warnings.catch_warnings():
        # TRL calls it experimental when it is imported.
        warnings.simplefilter("ignore")
        module = require("trl.experimental.orpo", "train")
    limit = _NO_LIMIT if max_length is None else max_length
    trainer = _unmade(
        module.ORPOTrainer,
        processing_class=tokenizer,
        is_encoder_decoder=False,
        max_length=limit,
    )
    render = require("trl", "train").maybe_apply_chat_template
    made = [trainer.tokenize_row(render(row, tokenizer)) for row in dataset]
    return [
        {
            name: _labelled(row[f"{name}_input_ids"], row[f"{name}_labels"])
            for name in ("chosen", "rejected")
        }
        for row in made
    ]


def _scored(
    dataset: Any, settings: Settings, tokenizer: Any, max_length: int | None
) -> list[Sequences]:
    trl = require("trl", "train")
    args = _arguments(trl.RewardConfig, settings, max_length)
    rows = _unmade(trl.RewardTrainer)._prepare_dataset(dataset, tokenizer, args, "preview")
    return [
        {name: _labelled(row[f"{name}_ids"], row[f"{name}_ids"]) for name in ("chosen", "rejected")}
        for row in rows
    ]


def _prompts(
    dataset: Any, settings: Settings, tokenizer: Any, max_length: int | None
) -> list[Sequences]:
    return [{"": each} for each in tokenize_prompts(dataset, settings, tokenizer)]


def tokenize_prompts(dataset: Any, settings: Settings, tokenizer: Any) -> list[Tokens]:
    """Prompts as they are given to generation: nothing of them is cut, nothing is a label."""
    made = []
    extra = (settings.trainer_args or {}).get("chat_template_kwargs") or {}
    for row in dataset:
        if is_conversation(row):
            tools = row.get("tools")
            ids = tokenizer.apply_chat_template(
                row["prompt"],
                tools=json.loads(tools) if isinstance(tools, str) else None,
                add_generation_prompt=True,
                return_dict=True,
                **extra,
            )["input_ids"]
        else:
            ids = tokenizer(text=row["prompt"])["input_ids"]
        made.append(Tokens(tuple(ids), (False,) * len(ids)))
    return made


def _labelled(ids: Sequence[int], labels: Sequence[int]) -> Tokens:
    return Tokens(tuple(ids), tuple(label != -100 for label in labels))


def _collated(batch: Mapping[str, Any], names: Sequence[str]) -> Sequences:
    """The rows of a batch without their padding."""
    made = {}
    for number, name in enumerate(names):
        size = int(batch["attention_mask"][number].sum())
        ids = batch["input_ids"][number][:size].tolist()
        mask = batch["completion_mask"][number][:size].tolist()
        made[name] = Tokens(tuple(ids), tuple(map(bool, mask)))
    return made
