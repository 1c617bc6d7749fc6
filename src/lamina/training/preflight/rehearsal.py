"""Make the trainer of every stage on a stand-in of the base: what it would refuse, up front.

The stand-in is a language model of one small layer with the tokenizer's vocabulary. Nothing is
trained, and nothing of the user's is called.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from lamina.config import LoraConfig
from lamina.errors import LaminaError
from lamina.interop.peft import standing_in
from lamina.stages import begin_stage
from lamina.training.data import open_data, prepare
from lamina.training.plan import Plan
from lamina.training.plan.document import Document, Fault, Where
from lamina.training.plan.settings import Settings
from lamina.training.preflight.base import Base
from lamina.training.preflight.needs import dtype_of
from lamina.training.preflight.places import place_of
from lamina.training.preflight.targets import Adapter
from lamina.training.quiet import quiet
from lamina.training.reference import Reference
from lamina.training.trainers import METHODS, Job
from lamina.training.trainers.arguments import Precision, arguments_for

_ROWS, _STEPS, _WIDTH = 8, 10, 8
_WORD = re.compile(r"[a-z]\w*_\w+")


def faults_of_trainers(
    plan: Plan, document: Document, root: Path, base: Base, adapters: list[Adapter]
) -> Iterator[Fault]:
    """What trainers, optimizers and schedules of the stages refuse.

    Args:
        plan: the plan, with data of which nothing is wrong.
        document: its places.
        root: the folder of its file.
        base: of it, with its tokenizer.
        adapters: of its stages.
    """
    for place, adapter in enumerate(adapters):
        with _surroundings(), tempfile.TemporaryDirectory() as folder:
            try:
                _rehearse(plan, place, base, adapter, root, Path(folder))
            except LaminaError as error:
                said = error.what.partition("can't be trained as asked: ")[2] or error.what
                yield _place(document, place, said), " ".join([said, *error.faults])
            except _Refused as error:
                where = place_of(document, place, *error.setting)
                if where not in document.lines:
                    where = _place(document, place, str(error))
                yield where, f"its {error.what} can't be made: {error}"


class _Refused(Exception):
    """What something that was made says of its settings."""

    def __init__(self, what: str, setting: tuple[str, ...], error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines()]
        super().__init__(next(filter(None, lines), type(error).__name__))
        self.what, self.setting = what, setting


@contextmanager
def _making(what: str, *setting: str) -> Iterator[None]:
    try:
        yield
    except LaminaError:
        raise
    except Exception as error:
        # Trainers refuse with whatever they like.
        raise _Refused(what, setting, error) from error


def _place(document: Document, stage: int, told: str) -> Where:
    """The place of a setting that is named in what a trainer says, if the plan has it."""
    for word in _WORD.findall(told):
        for where in (
            place_of(document, stage, "trainer_args", word),
            place_of(document, stage, word),
        ):
            if where in document.lines:
                return where
    return ("stages", stage)


@contextmanager
def _surroundings() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(standing_in())
        stack.enter_context(quiet())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield


def _rehearse(plan: Plan, place: int, base: Base, adapter: Adapter, root: Path, work: Path) -> None:
    stage = plan.stages[place]
    settings = plan.settings_of(stage)
    method = METHODS[settings.method or "sft"]
    dtype = dtype_of(plan, base)
    evaluates = bool(settings.eval_datasets or settings.eval_fraction)
    arguments = arguments_for(
        plan,
        stage,
        work,
        precision=Precision(dtype),
        evaluates=evaluates,
        lora_dropout=adapter.config.lora_dropout,
    )
    arguments.report_to = []
    data = _sample(settings, base.tokenizer, root)
    model = begin_stage(
        _stand_in(base, method.head).to(dtype), name=stage.name, config=_config(base, adapter)
    )
    job = Job(
        model=model,
        arguments=arguments,
        settings=settings,
        # Trainers may change it.
        tokenizer=copy.deepcopy(base.tokenizer),
        train=data,
        held_out=data if evaluates else None,
        reference=Reference(model, ()) if method.has_reference else None,
        rewards=(_nothing,),
    )
    with _making("trainer"):
        trainer = method.trainer(job)
    with _making("optimizer", "optim"):
        trainer.create_optimizer()
    with _making("schedule", "lr_scheduler_type"):
        trainer.create_scheduler(settings.max_steps or _STEPS, trainer.optimizer)


def _sample(settings: Settings, tokenizer: Any, root: Path) -> Any:
    """A few of the examples; of a hub dataset without downloading the others."""
    entries = [
        each.model_copy(
            update={
                "max_samples": min(each.max_samples or _ROWS, _ROWS),
                "streaming": each.streaming or open_data(each, root).builder is not None,
            }
        )
        for each in settings.datasets or ()
    ]
    few = {"datasets": entries, "eval_datasets": None, "eval_fraction": None}
    return prepare(settings.model_copy(update=few), tokenizer=tokenizer, root=root).train


def _stand_in(base: Base, head: str) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=max(base.config.vocab_size, len(base.tokenizer)),
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=1,
        pad_token_id=getattr(base.config, "pad_token_id", None),
    )
    kinds = {
        "language": transformers.LlamaForCausalLM,
        "reward": transformers.LlamaForSequenceClassification,
    }
    return kinds[head](config)


def _config(base: Base, adapter: Adapter) -> LoraConfig:
    """An adapter of the stand-in that is like a stage's, as far as trainers look at it."""
    model: Any = base.model
    head = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is head]
    adapted = adapter.found is not None and any(k.name in paths for k in adapter.found.kinds)
    return LoraConfig(
        task_type=adapter.config.task_type,
        r=1,
        lora_dropout=adapter.config.lora_dropout,
        target_modules=["q_proj", *(["lm_head"] if adapted else [])],
    )


def _nothing(completions: Any, **columns: Any) -> list[float]:
    """In place of the user's reward functions."""
    return [0.0] * len(completions)
