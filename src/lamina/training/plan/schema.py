"""What a plan may say: the base, the stages, and what they are judged by."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from lamina.training.plan.explained import Said
from lamina.training.plan.settings import (
    Count,
    Datasets,
    Function,
    Index,
    Mode,
    PlanPart,
    Settings,
    Texts,
)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
# The name of an adapter in a model and of a directory.
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=64)]

# What is taken where neither a stage nor `defaults` says anything.
BUILT_IN: dict[str, Any] = {
    "lora_r": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length": 1024,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "logging_steps": 10,
    "save_total_limit": 2,
    "seed": 42,
}
LEARNING_RATES = {
    "pt": 2e-4,
    "sft": 2e-4,
    "dpo": 5e-6,
    "kto": 5e-6,
    "orpo": 1e-5,
    "reward": 1e-4,
    "grpo": 1e-5,
}

# Of each pair a stage has one.
ONE_OF = (("max_steps", "num_train_epochs"), ("eval_datasets", "eval_fraction"))


class Eval(PlanPart):
    """A held-out set that every stage is measured on.

    Attributes:
        datasets: the examples.
        metric: "loss" (and perplexity), "accuracy" (of preferences: the chosen answer is likelier),
            "exact_match" (generation), or `package.module:function`.
        max_samples: the first so many examples.
        higher_is_better: of a function's values; of the other metrics it is known.
        stage: whose task it is, for what later stages did to it; if not given, the stage in which
            it got better most. Losses count the tokens that it trains on.
        max_samples: the first so many examples, of lm_eval those of each task.
        max_length: tokens per example; longer ones are cut, and prompts of generation refused.
        max_new_tokens: of generation.
        lm_eval: tasks of the lm-eval harness, instead of data: names, or paths of YAML files.
        num_fewshot: examples that its tasks are shown; if not given, as many as a task says.
    """

    datasets: Datasets | None = None
    metric: Literal["loss", "accuracy", "exact_match"] | Function = "loss"
    higher_is_better: bool = True
    stage: Name | None = None
    max_samples: Count | None = None
    max_length: Count = 1024
    max_new_tokens: Count = 64
    lm_eval: Texts | None = None
    num_fewshot: Index | None = None


class Prompt(PlanPart):
    """A text that base and stages go on with.

    Attributes:
        text: what they are asked.
        chat: as a user's message, in the chat template; if not given, wherever there is a template.
        max_new_tokens: of the answer.
    """

    text: str = Field(min_length=1)
    chat: bool | None = None
    max_new_tokens: Count = 64


def _as_prompts(value: Any) -> Any:
    """A text alone is a prompt without further settings."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list):
        return value
    return [{"text": each} if isinstance(each, str) else each for each in value]


Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_as_prompts, json_schema_input_type=str | list[str | Prompt]),
    Said("a text, settings of a prompt, or a list of such", "lists of prompts"),
]


class StagePlan(Settings):
    """One stage.

    Attributes:
        name: of the stage; its directory is `output_dir/name`.
        mode: how it is begun on the stage before; the first stage has none.
    """

    name: Name
    mode: Mode | None = None

    def asked(self, defaults: Settings) -> Settings:
        """Its settings with those of `defaults`, and of Lamina, where it says nothing itself."""
        method = self.method or defaults.method or "sft"
        fallback = {**BUILT_IN, "method": method, "learning_rate": LEARNING_RATES[method]}
        if 1 in (self.max_steps, defaults.max_steps if self.max_steps is None else None):
            # The first step of a warmup has the rate 0: a stage of that alone would train nothing.
            fallback["warmup_steps"] = 0.0
        for pair in ONE_OF:
            # What a stage says itself is not overruled by the other of a pair in `defaults`.
            if any(getattr(self, name) is not None for name in pair):
                defaults = defaults.model_copy(update=dict.fromkeys(pair))
        chosen: dict[str, Any] = {}
        for name in Settings.model_fields:
            said = (getattr(self, name), getattr(defaults, name), fallback.get(name))
            chosen[name] = next((value for value in said if value is not None), None)
        if chosen["lora_alpha"] is None:
            chosen["lora_alpha"] = 2.0 * chosen["lora_r"]
        return Settings.model_construct(**chosen)


class Plan(PlanPart):
    """A base model taken through stages.

    Attributes:
        model_name_or_path: the base: a directory or a hub id.
        model_revision: of a hub repository.
        tokenizer_name_or_path: if it is not the base's own.
        chat_template: a file with a Jinja template, or the template itself.
        output_dir: where the stages' directories are made.
        dtype: of the base's weights: "auto" takes what they are saved in.
        load_in_4bit: quantise the base with bitsandbytes (nf4).
        load_in_8bit: likewise (int8).
        attn_implementation: as in transformers.
        trust_remote_code: run Python code that comes with the base. Nothing else turns it on.
        report_to: where curves go besides the log in `output_dir`: "tensorboard", "wandb" ...
        defaults: settings of all stages that don't say otherwise.
        evals: held-out sets by name, measured after every stage.
        prompts: texts that base and every stage are asked to go on with, for the report.
        stages: in their order.
    """

    model_name_or_path: str = Field(min_length=1)
    output_dir: str = Field(min_length=1)
    model_revision: str | None = None
    tokenizer_name_or_path: str | None = None
    chat_template: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    report_to: Texts = Field(default_factory=list)
    defaults: Settings = Field(default_factory=Settings)
    evals: dict[Name, Eval] = Field(default_factory=dict)
    prompts: Prompts = Field(default_factory=list)
    stages: list[StagePlan] = Field(min_length=1)

    def settings_of(self, stage: StagePlan) -> Settings:
        """What a stage is run with."""
        return stage.asked(self.defaults)
