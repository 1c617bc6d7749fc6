"""Begin a stage: fresh, or on a parent in one of three ways."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from lamina.checkpoint.adapter import read_adapter
from lamina.checkpoint.record import Base, Lamina, Mode, name_fault
from lamina.config import AdaLoraConfig, LoraConfig, PeftConfig
from lamina.engine.fold import check_foldable, fold, unfold
from lamina.engine.state import AdapterState
from lamina.engine.variants import variant_for
from lamina.errors import AdapterNameError, StageError, nearest
from lamina.model import PeftModel
from lamina.model.adapted import refuse_adapted
from lamina.model.loading import HUB_OPTIONS, undone_on_error
from lamina.model.vocabulary import grown
from lamina.stages.bases import base_faults, base_remarks, describe_base
from lamina.stages.checkpoints import StageCheckpoints
from lamina.stages.context import StageContext
from lamina.stages.lamination import WITHOUT_STAGES, Chain, take_apart
from lamina.stages.likeness import base_likeness, tell, updates_in
from lamina.stages.one_file import check_biases_apart, check_one_file
from lamina.stages.original import split_off_taken, take_again
from lamina.stages.restore import base_weight_faults, restore_part
from lamina.stages.rows import rows_asked, take_over
from lamina.stages.tokenizers import (
    describe_tokenizer,
    tokenizer_faults,
    tokenizer_remarks,
    with_tokenizer,
)

MODES = tuple(mode for mode in get_args(Mode) if mode != "fresh")
# What a config says of its surroundings rather than of the ranks.
_NOT_COMPARED = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "task_type",
}


def begin_stage(
    base: nn.Module,
    *,
    name: str,
    parent: str | Path | None = None,
    mode: str | None = None,
    config: PeftConfig | None = None,
    allow_base_mismatch: bool = False,
    keep_unfolded: bool = True,
    tokenizer: Any = None,
    **where: Any,
) -> PeftModel:
    """Adapt a base model for a new stage of training.

    - no parent: a fresh adapter with `config`.
    - "continue": the parent's newest ranks train on, with their config; older ones are frozen.
    - "stack": a new adapter with `config` trains; all of the parent is frozen and contributes.
    - "merge": like "stack", with the parent folded into the base's dense weights in memory
      (summed in fp32, rounded once), so that steps are faster.

    Args:
        base: the base model, without adapters.
        name: of the stage; unique in its chain, and the name of the adapter that trains.
        parent: the directory (or hub id) of the stage, or plain adapter, to build on.
        mode: "continue", "stack" or "merge"; required with a parent.
        config: of the new adapter; for "continue" None, or the same as the parent's.
        allow_base_mismatch: go on although the base's weights, or the tokenizer, are not those on
            record. The same base in another folder, or in another dtype, is no mismatch.
        keep_unfolded: with "merge", keep the unfolded weights, so that `disable_adapter()` gives
            the base bit-exactly; False saves their memory.
        tokenizer: the one that the stage is trained with: compared with the parent's, and recorded.
        where: `subfolder`, `revision`, `token` ... of a parent on the hub.

    Raises:
        StageError: with everything that is wrong; nothing has been changed.
        AlreadyAdaptedError: the base has adapters.
        FoldError: "merge" on a base that can't be written; nothing has been changed.

    Warns:
        MismatchWarning: the base is the recorded one but for its head or what a quantiser rounds
            away, or the chat template is another one.
    """
    _check_words(base, name, parent, mode, config, where)
    refuse_adapted(base)
    file = None if parent is None else read_adapter(parent, **where)
    with nullcontext() if file is None else grown(base, file):
        return _begun(
            base,
            None if file is None else take_apart(file),
            name=name,
            mode=mode,
            config=config,
            allow_base_mismatch=allow_base_mismatch,
            keep_unfolded=keep_unfolded,
            tokenizer=tokenizer,
        )


def _begun(
    base: nn.Module,
    chain: Chain | None,
    *,
    name: str,
    mode: str | None,
    config: PeftConfig | None,
    allow_base_mismatch: bool,
    keep_unfolded: bool,
    tokenizer: Any,
) -> PeftModel:
    """`begin_stage` on a chain that was read, over a base that has all its rows."""
    described = describe_base(base)
    if tokenizer is not None:
        described = described.model_copy(update=describe_tokenizer(tokenizer))
    remarks: list[str] = []
    if chain is not None:
        faults = _chain_faults(chain, name, mode, config)
        if not allow_base_mismatch:
            told, remarks = _mismatches(chain, base, described, tokenizer, _new_heads(config))
            faults += [f"base: {each}" for each in told or base_weight_faults(base, chain)]
        if faults:
            raise StageError(
                f"Stage {name!r} can't be begun on {chain.source}.",
                faults=faults,
                cure=_cure(faults),
            )
    kind_config = config or (chain.parts[-1].config if chain else None)
    kind = PeftModel.for_task(kind_config.task_type if kind_config else None)
    with undone_on_error(base):
        model = kind(base, None)
        try:
            older = _build(model, chain, name, mode, config)
            check_one_file(model)
            if mode == "merge":
                frozen = [adapter for adapter, _ in older]
                check_biases_apart(model, frozen)
                check_foldable(base, frozen)
                fold(base, model.adapter_state, frozen, keep_unfolded=keep_unfolded)
        except BaseException:
            unfold(base)
            raise
    tell(f"Stage {name!r} on {chain.source if chain else base}", remarks, stacklevel=3)
    trained = chain.parts[-1].lamina.config if chain and mode == "continue" else None
    model.stage = StageContext(
        name=name,
        mode=cast(Mode, mode or "fresh"),
        base=described,
        parent=chain.record if chain else None,
        older=tuple(older),
        config=trained or model.peft_config[name].to_dict(),
        continued=chain.parts[-1].lamina if chain and mode == "continue" else None,
        checkpoints=StageCheckpoints(),
    )
    return model


def _new_heads(config: PeftConfig | None) -> set[str]:
    """Modules that a new adapter trains whole: the head of its task, and what it names."""
    if config is None:
        return set()
    named = getattr(config, "modules_to_save", None) or ()
    return {*PeftModel.for_task(config.task_type).task_heads, *named}


def _mismatches(
    chain: Chain, base: nn.Module, described: Base, tokenizer: Any, heads: set[str]
) -> tuple[list[str], list[str]]:
    """What is not as on record: where that is wrong, and where it may be meant."""
    likeness = base_likeness(chain.record, base, lambda: updates_in(chain), heads=heads)
    before = with_tokenizer(chain.record)
    faults = base_faults(chain.record.newest.base, described, likeness)
    return (
        [*faults, *tokenizer_faults(before, tokenizer)],
        [*base_remarks(likeness), *tokenizer_remarks(before, tokenizer)],
    )


def _check_words(
    base: object,
    name: str,
    parent: object,
    mode: str | None,
    config: PeftConfig | None,
    where: dict[str, Any],
) -> None:
    """What is wrong with the arguments on their own."""
    faults = []
    if not isinstance(base, nn.Module):
        faults.append(f"base is a {type(base).__name__}, not a model: load it first")
    if mode is not None and mode not in MODES:
        close = nearest(str(mode), MODES)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        faults.append(f"mode={mode!r} is none of {', '.join(map(repr, MODES))}{hint}")
    if parent is None and mode in MODES:
        faults.append(f"mode={mode!r} needs a parent, the directory of the stage before")
    if parent is not None and mode is None:
        ways = " or ".join(map(repr, MODES))
        faults.append(f"with a parent, say how to build on it: mode={ways}")
    if config is None and (parent is None or mode in ("stack", "merge")):
        faults.append("config is missing: the new adapter needs a LoraConfig")
    elif config is not None and not isinstance(config, LoraConfig):
        faults.append(f"config is a {_kind(config)}, not a lamina.LoraConfig")
    elif isinstance(config, AdaLoraConfig):
        faults.append(f"config is an AdaLoraConfig: {WITHOUT_STAGES}")
    faults += [*_name_faults(name), *_where_faults(where, parent)]
    on_parent = parent is not None or mode is not None
    if faults:
        raise StageError(
            f"Stage {name!r} can't be begun as asked.",
            faults=faults,
            cure="lamina.begin_stage(base, "
            + (
                'name="chat", parent="runs/domain", mode="stack", '
                if on_parent
                else 'name="domain", '
            )
            + 'config=LoraConfig(r=16, target_modules="all-linear"))',
        )


def _kind(value: object) -> str:
    """The name of a value's class, with the library that it is from."""
    library = type(value).__module__.partition(".")[0]
    return type(value).__name__ if library == "builtins" else f"{library}.{type(value).__name__}"


def _where_faults(where: dict[str, Any], parent: object) -> list[str]:
    """Words that mean nothing here: a misspelt one must not begin another stage than asked."""
    faults = []
    for word, value in where.items():
        if word in HUB_OPTIONS:
            if parent is None and value is not None:
                faults.append(f"{word} says where the parent is, and there is no parent")
            continue
        close = nearest(word, {*inspect.signature(begin_stage).parameters, *HUB_OPTIONS})
        hint = f"; did you mean {close[0]!r}?" if close else ""
        faults.append(f"{word!r} is no argument of begin_stage{hint}")
    return faults


def _name_faults(name: object) -> list[str]:
    if not isinstance(name, str):
        return [f"name={name!r} is not a string"]
    fault = name_fault(name)
    if fault:
        return [f"name={name!r} can't be used: it {fault}"]
    try:
        AdapterState().check_new_name(name)
    except AdapterNameError as error:
        return [f"name={name!r} can't be used: {error.cure}"]
    return []


def _chain_faults(
    chain: Chain, name: str, mode: str | None, config: PeftConfig | None
) -> list[str]:
    """What is wrong with this stage on this parent, the base left aside."""
    names = [stage.name for stage in chain.record.stages]
    faults = []
    if name in names:
        faults.append(f"name: the chain {' -> '.join(names)} already has a stage {name!r}")
    if mode == "continue" and config is not None:
        faults += _config_faults(cast(LoraConfig, config), chain.parts[-1].config)
    if mode in ("stack", "merge"):
        faults += _sum_faults(chain, name, cast(LoraConfig, config))
    return faults


def _sum_faults(chain: Chain, name: str, config: LoraConfig) -> list[str]:
    """Stages that one file can't hold with others: their update is no sum of ranks."""
    configs = {**{part.lamina.stage: part.config for part in chain.parts}, name: config}
    return [
        f"update: stage {stage!r} is {type(variant_for(each)).__name__}, whose update is no sum of "
        "ranks that others can be laid beside"
        for stage, each in configs.items()
        if not variant_for(each).is_sum
    ]


def _config_faults(asked: LoraConfig, had: LoraConfig) -> list[str]:
    theirs, ours = had.to_dict(), asked.to_dict()
    for values, config in ((theirs, had), (ours, asked)):
        # The heads of a task are trained along whether the config names them or not.
        heads = PeftModel.for_task(config.task_type).task_heads
        values["modules_to_save"] = sorted({*(config.modules_to_save or ())} - {*heads})
    return [
        f"config: continue trains the parent's ranks on, so {key} stays {theirs[key]!r}, "
        f"not {ours[key]!r}"
        for key in theirs
        if key not in _NOT_COMPARED and theirs[key] != ours[key]
    ]


def _cure(faults: list[str]) -> str:
    ways = {
        "name": "choose a name that is not in the chain",
        "config": 'leave config out, or use mode="stack" for an adapter with another config',
        "base": "load the base that the parent was trained on, or pass allow_base_mismatch=True to "
        "go on with this one",
        "update": "`lamina merge PARENT -o MERGED` folds the parent into its base; begin a fresh "
        "stage on that (aLoRA can't be folded: continue it)",
    }
    return "; ".join(
        way for what, way in ways.items() if any(fault.startswith(what) for fault in faults)
    )


def _build(
    model: PeftModel,
    chain: Chain | None,
    name: str,
    mode: str | None,
    config: PeftConfig | None,
) -> list[tuple[str, Lamina]]:
    """Put all adapters of the stage into the model; returns those that don't train."""
    parts = chain.parts if chain else ()
    older = parts[:-1] if mode == "continue" else parts
    rows = rows_asked(model.get_base_model(), None if mode == "continue" else config)
    for part in older:
        stage = part.lamina.stage
        restore_part(model, cast(Chain, chain), part, stage, drop_out=False, taken=rows)
    if mode == "continue":
        newest, taken = split_off_taken(model.get_base_model(), parts[-1])
        restore_part(model, cast(Chain, chain), newest, name, drop_out=True)
        take_again(model.get_base_model(), name, taken)
    else:
        own = model._own_config(model.get_base_model(), copy.deepcopy(cast(PeftConfig, config)))
        own.inference_mode = False
        model.base_model.add(name, own, trainable=True)
        if chain is not None:
            take_over(model.get_base_model(), name, chain.rows, chain.others)
    adapters = [part.lamina.stage for part in older]
    model.set_adapter([*adapters, name], train=[name])
    return [(part.lamina.stage, part.lamina) for part in older]
