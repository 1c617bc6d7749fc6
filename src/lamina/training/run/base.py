"""The base model of a plan and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lamina.errors import PlanError
from lamina.extras import require
from lamina.training.data import read_template
from lamina.training.plan import Plan
from lamina.training.trainers.arguments import Precision


def load_tokenizer(plan: Plan, root: Path) -> Any:
    """The tokenizer, with the plan's chat template.

    Raises:
        PlanError: it can't be loaded.
    """
    from transformers import AutoTokenizer

    name = plan.tokenizer_name_or_path or plan.model_name_or_path
    revision = None if plan.tokenizer_name_or_path else plan.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=plan.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise PlanError(
            f"The tokenizer {name} can't be loaded: {_first(error)}",
            cure="tokenizer_name_or_path: a directory or hub id that has one",
        ) from error
    if plan.chat_template:
        tokenizer.chat_template = read_template(plan.chat_template, root)
    return tokenizer


def load_base(plan: Plan, head: str) -> Any:
    """The model, as the plan wants it kept; "reward" has one number as its output.

    Raises:
        PlanError: it can't be loaded.
    """
    import transformers

    kind = {
        "language": transformers.AutoModelForCausalLM,
        "reward": transformers.AutoModelForSequenceClassification,
    }[head]
    options: dict[str, Any] = {"dtype": plan.dtype, "trust_remote_code": plan.trust_remote_code}
    if plan.model_revision:
        options["revision"] = plan.model_revision
    if plan.attn_implementation:
        options["attn_implementation"] = plan.attn_implementation
    if head == "reward":
        options["num_labels"] = 1
    if plan.load_in_4bit or plan.load_in_8bit:
        options["quantization_config"] = _quantised(plan)
        if torch.cuda.is_available():
            options["device_map"] = {"": torch.cuda.current_device()}
    try:
        return _unpacked(kind.from_pretrained(plan.model_name_or_path, **options))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"The base {plan.model_name_or_path} can't be loaded: {_first(error)}",
            cure="model_name_or_path: a directory with a model, or a hub id",
        ) from error


def _unpacked(model: Any) -> Any:
    """Keep bitsandbytes from packing codes for inference on a CPU, in place, in an evaluation.

    Nothing can be trained over them any more then.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def precision_of(plan: Plan, model: Any) -> Precision:
    """What a forward computes in: what the base is kept in, or with codes what they stand for."""
    if plan.load_in_4bit or plan.load_in_8bit:
        return Precision(_computing(plan))
    return Precision(model.dtype)


def _quantised(plan: Plan) -> Any:
    from transformers import BitsAndBytesConfig

    require("bitsandbytes", "quant")
    if plan.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_computing(plan),
    )


def _computing(plan: Plan) -> torch.dtype:
    if plan.dtype != "auto":
        dtype: torch.dtype = getattr(torch, plan.dtype)
        return dtype
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
