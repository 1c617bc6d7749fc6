"""Load a stage for inference, finding its base if none is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lamina.checkpoint.adapter import AdapterFile, read_adapter
from lamina.checkpoint.record import StageRecord
from lamina.errors import StageError
from lamina.model import AutoPeftModel, PeftModel, loading
from lamina.model.heads import head_options
from lamina.model.vocabulary import grown
from lamina.stages.bases import base_faults, base_remarks, describe_base
from lamina.stages.configs import refuse_edited_config
from lamina.stages.likeness import base_likeness, tell, updates_in_file
from lamina.stages.tokenizers import tokenizer_faults, tokenizer_remarks, with_tokenizer
from lamina.stages.verify import contents_of, examine


def load(
    path: str | Path,
    base: nn.Module | str | None = None,
    *,
    allow_base_mismatch: bool = False,
    tokenizer: Any = None,
    verify: bool = False,
    **options: Any,
) -> PeftModel:
    """The base with the whole chain of a stage over it, frozen, in eval mode.

    Args:
        path: the stage's directory, or any plain PEFT adapter, or a hub id.
        base: the base model, or its path or hub id; None takes the one on record.
        allow_base_mismatch: go on although the base's weights, or the tokenizer, are not those on
            record. The same base in another folder, or in another dtype, is no mismatch.
        tokenizer: the one that it is to be used with, compared with the one on record.
        verify: replay what the model answered when the stage was saved, see `lamina.verify`.
        options: hub options of the adapter; all else goes to the base's `from_pretrained`
            (`dtype`, `device_map` ...) when it is loaded here.

    Returns:
        A model whose one adapter is named after the newest stage.

    Raises:
        StageError: the base is not the one that the stage was trained on, or options are given
            for a base that is loaded already.
        CheckpointError: files are missing or broken.
        RecordError: the record contradicts the tensors, or the config.
        VerificationError: it doesn't answer as when it was saved; why is in the message.

    Warns:
        MismatchWarning: the base is the recorded one but for its head or what a quantiser rounds
            away, or the chat template is another one.
    """
    hub = {name: options.pop(name) for name in loading.HUB_OPTIONS if name in options}
    file = read_adapter(path, **hub)
    record = file.record()
    if not verify:
        refuse_edited_config(file, record)
    name = record.newest.name
    if isinstance(base, nn.Module):
        _refuse_options(options)
        whole_base: nn.Module = base
    else:
        if base is not None:
            # The recorded revision is one of the recorded base.
            file.config.base_model_name_or_path, file.config.revision = str(base), None
        options = {**head_options(file.config, file.shapes), **options}
        whole_base = AutoPeftModel.load_base(file.config, source=str(path), **options)
    with grown(whole_base, file):
        if not allow_base_mismatch:
            check_base(record, whole_base, file, tokenizer)
        kind = PeftModel.for_task(file.config.task_type)
        model = loading.over(kind, whole_base, file, loading.How(), name).eval()
    if verify:
        # The base has been looked at.
        told = examine(contents_of(file), model, name, tokenizer=tokenizer, base=False)
        told.raise_if_failed()
    return model


def _refuse_options(options: dict[str, Any]) -> None:
    if options:
        raise StageError(
            "The base is loaded already, so nothing is left to take these options.",
            faults=[f"{name}={value!r}" for name, value in options.items()],
            cure="load the base with them, or give its path; to train a stage on, "
            'lamina.begin_stage(base, name="next", parent=path, mode="continue")',
        )


def check_base(
    record: StageRecord, base: nn.Module, file: AdapterFile, tokenizer: Any = None
) -> None:
    """Refuse a base, or a tokenizer, that an adapter was not trained on; warn of small differences.

    Raises:
        StageError: with all that differs.
    """
    likeness = base_likeness(record, base, lambda: updates_in_file(file))
    before = with_tokenizer(record)
    faults = [
        *base_faults(record.newest.base, describe_base(base), likeness),
        *tokenizer_faults(before, tokenizer),
    ]
    if faults:
        raise StageError(
            f"{file.source} was trained on another base.",
            faults=faults,
            cure="load it on its own base, or pass allow_base_mismatch=True to go on with this one",
        )
    remarks = [*base_remarks(likeness), *tokenizer_remarks(before, tokenizer)]
    tell(file.source, remarks, stacklevel=3)
