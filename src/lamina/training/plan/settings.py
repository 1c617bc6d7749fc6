"""Settings that a stage may have, and that `defaults` may give to all of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lamina.training.plan.explained import Said

Method = Literal["pt", "sft", "dpo", "kto", "orpo", "reward", "grpo"]
Mode = Literal["continue", "stack", "merge"]

FUNCTION_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
_FUNCTION = Said("package.module:function", "package.module:function")


def _no_switch(value: Any) -> Any:
    """A number that is none: YAML's `yes` and `true`, which Python counts as 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("no_number", "is a number")
    return value


def _in_list(value: Any) -> Any:
    """One of something where a list of it is meant."""
    return value if value is None or isinstance(value, list) else [value]


def _as_data(value: Any) -> Any:
    """A path alone is data without further settings."""
    value = _in_list(value)
    if not isinstance(value, list):
        return value
    return [{"path": each} if isinstance(each, str) else each for each in value]


def _as_share(value: Any) -> Any:
    """`5%` as 0.05; anything else as it is."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


_NUMBER = BeforeValidator(_no_switch)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _NUMBER]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _NUMBER]
Fraction = Annotated[float, Field(gt=0, lt=1), _NUMBER]
Probability = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Count = Annotated[int, Field(gt=0), _NUMBER]
Index = Annotated[int, Field(ge=0), _NUMBER]
# "5%" or 0.05.
Share = Annotated[
    float,
    Field(allow_inf_nan=False),
    BeforeValidator(_as_share, json_schema_input_type=float | str),
    _NUMBER,
    Said("a number or a percentage", "numbers or percentages"),
]
# `package.module:function`, which is imported and called.
Function = Annotated[
    str, StringConstraints(pattern=FUNCTION_PATTERN, strip_whitespace=True), _FUNCTION
]
Functions = Annotated[
    list[Function],
    Field(min_length=1),
    BeforeValidator(_in_list, json_schema_input_type=str | list[str]),
    Said("package.module:function, or a list of such", "lists of package.module:function"),
]
Texts = Annotated[
    list[str],
    BeforeValidator(_in_list, json_schema_input_type=str | list[str]),
    Said("a text or a list of texts", "lists of texts"),
]


class PlanPart(BaseModel):
    """A part of a plan: what it doesn't know, it refuses."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, values: Any) -> Any:
        # `defaults:` above settings that are all commented out says nothing, which is allowed.
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class Data(PlanPart):
    """Where examples come from.

    Attributes:
        path: a file (json, jsonl, ndjson, csv, tsv, parquet, arrow, txt or md, also as .gz, .bz2 or
            .xz), a pattern such as `data/*.jsonl`, a folder of files of one kind, or a hub name.
        name: the configuration of a hub dataset.
        split: which split, as `datasets` spells it: "train", "train[:90%]".
        revision: of a hub dataset.
        format: how an example is laid out; "auto" looks at the columns.
        columns: what is expected -> what the data calls it, such as {prompt: question}.
        weight: its share in a mixture, beside the weights of the others. Either every one has a
            weight, or none: then each example of all comes once per epoch.
        max_samples: the first so many examples.
        streaming: read while training, don't prepare it all first.
    """

    path: str = Field(min_length=1)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal[
        "auto",
        "text",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "preference",
        "unpaired_preference",
        "prompt_only",
    ] = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    weight: Positive | None = None
    max_samples: Count | None = None
    streaming: bool = False


Datasets = Annotated[
    list[Data],
    Field(min_length=1),
    BeforeValidator(_as_data, json_schema_input_type=str | Data | list[str | Data]),
    Said("a path, settings of data, or a list of such", "lists of data"),
]


class Gate(PlanPart):
    """What a stage may cost, and what happens if it costs more.

    Attributes:
        may_lose: eval -> the share by which it may get worse against the stage before, of the first
            stage against the base, such as 0.05 or "5%"; 0 means that it may not get worse at all,
            a negative share that it must get better by as much.
        on_failure: "stop" ends the run; "rollback" goes on from the parent as if the stage had not
            been; "retry" runs the stage again at a lower learning rate.
        retry_factor: what the learning rate is multiplied by in each retry.
        max_retries: after which the run stops.
    """

    may_lose: dict[str, Share] = Field(min_length=1)
    on_failure: Literal["stop", "rollback", "retry"] = "stop"
    retry_factor: Fraction = 0.5
    max_retries: Count = 1


class Settings(PlanPart):
    """How a stage trains. What is None is taken from `defaults`, then from the method.

    Attributes:
        method: "pt" (plain text), "sft", "dpo", "kto", "orpo", "reward" or "grpo".
        datasets: what it trains on; one path, or a list of paths or of settings, mixed by weight.
        eval_datasets: held-out data of this stage, for early stopping and curves.
        eval_fraction: a share of the training data to hold out instead.
        lora_r: the rank.
        lora_alpha: the scaling is lora_alpha / lora_r; twice the rank if not given.
        lora_dropout: applied to the input of A.
        lora_target_modules: "all-linear", names (ends of module names), or one regular expression.
        lora_exclude_modules: likewise, what is left alone.
        lora_target_parameters: ends of names of expert parameters.
        modules_to_save: modules trained whole and saved.
        trainable_token_indices: rows of embeddings that are trained, such as new tokens.
        use_rslora: the scaling is lora_alpha / sqrt(lora_r).
        use_dora: decompose weights into magnitude and direction.
        lora_bias: train a bias of B.
        bias: "none", "all" or "lora_only".
        rank_pattern: names or regular expressions -> ranks.
        alpha_pattern: likewise, alphas.
        init_lora_weights: how A and B begin, as in LoraConfig.
        learning_rate: of the optimizer; if not given, what is usual for the method.
        loraplus_lr_ratio: B learns this many times faster than A (LoRA+).
        num_train_epochs: passes over the data; ignored if max_steps is given.
        max_steps: optimizer steps.
        per_device_train_batch_size: examples per device and forward.
        per_device_eval_batch_size: likewise, in evaluation.
        gradient_accumulation_steps: forwards per optimizer step.
        max_length: tokens per example; longer ones are cut.
        packing: put several examples into one sequence.
        lr_scheduler_type: as transformers names them.
        warmup_steps: of the learning rate, which is 0 in the first of them: a number of steps, or
            below 1 a share of all.
        weight_decay: of the optimizer.
        max_grad_norm: gradients are clipped to it.
        optim: the optimizer, as transformers names them.
        neftune_noise_alpha: noise on embeddings in training.
        gradient_checkpointing: recompute activations to save memory.
        early_stopping_patience: evaluations without a better loss after which a stage ends.
        logging_steps: between lines of the log.
        eval_steps: between evaluations on `eval_datasets`.
        save_steps: between checkpoints.
        save_total_limit: checkpoints that are kept.
        seed: of data order, dropout and initialisation.
        assistant_only_loss: sft on messages: train on what the assistant says only.
        completion_only_loss: sft on prompts and completions: train on completions only.
        beta: dpo, kto, orpo, grpo: how closely the reference is followed.
        loss_type: of the method, as TRL names them.
        reference: dpo, kto, grpo: "parent" (the chain before this stage), "base", or a stage.
        reward_functions: grpo: `package.module:function` of each reward.
        num_generations: grpo: answers per prompt.
        max_completion_length: grpo: tokens per answer.
        temperature: grpo: of sampling.
        trainer_args: further arguments of the method's TRL config, by their names there.
        gate: what the stage may cost the evals.
    """

    method: Method | None = None
    datasets: Datasets | None = None
    eval_datasets: Datasets | None = None
    eval_fraction: Fraction | None = None

    lora_r: Count | None = None
    lora_alpha: Positive | None = None
    lora_dropout: Probability | None = None
    lora_target_modules: str | list[str] | None = None
    lora_exclude_modules: str | list[str] | None = None
    lora_target_parameters: Texts | None = None
    modules_to_save: Texts | None = None
    trainable_token_indices: list[Index] | dict[str, list[Index]] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, Positive] | None = None
    init_lora_weights: bool | str | None = None

    learning_rate: Positive | None = None
    loraplus_lr_ratio: Positive | None = None
    num_train_epochs: Positive | None = None
    max_steps: Count | None = None
    per_device_train_batch_size: Count | None = None
    per_device_eval_batch_size: Count | None = None
    gradient_accumulation_steps: Count | None = None
    max_length: Count | None = None
    packing: bool | None = None
    lr_scheduler_type: str | None = None
    warmup_steps: NotNegative | None = None
    weight_decay: NotNegative | None = None
    max_grad_norm: NotNegative | None = None
    optim: str | None = None
    neftune_noise_alpha: Positive | None = None
    gradient_checkpointing: bool | None = None
    early_stopping_patience: Count | None = None
    logging_steps: Count | None = None
    eval_steps: Count | None = None
    save_steps: Count | None = None
    save_total_limit: Count | None = None
    seed: Index | None = None

    assistant_only_loss: bool | None = None
    completion_only_loss: bool | None = None
    beta: NotNegative | None = None
    loss_type: str | None = None
    reference: str | None = None
    reward_functions: Functions | None = None
    num_generations: Annotated[int, Field(ge=2), _NUMBER] | None = None
    max_completion_length: Count | None = None
    temperature: Positive | None = None
    trainer_args: dict[str, Any] | None = None
    gate: Gate | None = None
