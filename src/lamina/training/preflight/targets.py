"""What the adapters of a plan would adapt in the base, and whether one file can hold them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lamina.config import LoraConfig
from lamina.engine.init import changes_base
from lamina.engine.variants import variant_for
from lamina.errors import LaminaError
from lamina.model.dry_run import DryRun, dry_run_on
from lamina.training.plan import Plan, adapter_config
from lamina.training.plan.adapters import setting_in, settings_of_ranks
from lamina.training.plan.document import Document, Fault, Where
from lamina.training.preflight.base import Base
from lamina.training.preflight.places import place_in, place_of

_QUOTED = re.compile(r"'([^']+)'")


@dataclass(frozen=True)
class Adapter:
    """The adapter of a stage, as it would be.

    Attributes:
        stage: the number of the stage that begins it.
        config: of the adapter.
        found: what it hits; None if its targets are at fault.
        trainable: parameters that it trains, modules trained whole and rows among them.
    """

    stage: int
    config: LoraConfig
    found: DryRun | None
    trainable: int | None


def look_at_adapters(
    plan: Plan, document: Document, base: Base
) -> tuple[list[Adapter], list[Fault]]:
    """A dry run for every stage; those that continue have their parent's adapter."""
    adapters: list[Adapter] = []
    faults: list[Fault] = []
    for place, stage in enumerate(plan.stages):
        if stage.mode == "continue" and place:
            adapters.append(adapters[-1])
            continue
        config = adapter_config(settings_of_ranks(plan, place))
        found = None
        try:
            found = _dry_run(plan, base, config)
        except LaminaError as error:
            for told in error.faults or (error.what,):
                faults.append(placed(document, place, told))
        trainable = None if found is None else found.parameters + _whole(base, config)
        adapters.append(Adapter(place, config, found, trainable))
    return adapters, faults


def faults_of_one_file(
    plan: Plan, document: Document, base: Base, adapters: list[Adapter]
) -> list[Fault]:
    """Stages that can't lie beside one another in one adapter, and parents that can't be folded."""
    faults: list[Fault] = []
    own = {each.stage: each for each in adapters}.values()
    for adapter in own:
        faults += _alone(document, adapter, others=len(own) > 1)
    biased = [each for each in own if each.config.lora_bias]
    embedded = [each for each in own if each.found and _embedding(each.found)]
    if biased and embedded:
        told = "can't be saved in one file with an adapted embedding, whose adapter has no bias"
        faults.append((place_of(document, biased[0].stage, "lora_bias"), told))
    if base.quantised or plan.load_in_4bit or plan.load_in_8bit:
        faults += _of_codes(document, own)
    for place, stage in enumerate(plan.stages):
        if stage.mode == "merge" and base.quantised:
            told = f"merge folds the parent into dense weights; the base's are {base.quantised}"
            faults.append((("stages", place, "mode"), f"{told}; stack computes the same"))
    return faults


def _alone(document: Document, adapter: Adapter, *, others: bool) -> list[Fault]:
    config, stage = adapter.config, adapter.stage
    faults: list[Fault] = []
    variant = variant_for(config)
    if others and not variant.is_sum:
        where: Where = ("stages", stage)
        if config.use_dora:
            where = place_of(document, stage, "use_dora")
        elif isinstance(config.init_lora_weights, str):
            where = place_of(document, stage, "init_lora_weights")
        told = f"{type(variant).__name__} is no sum of ranks that other stages can be laid beside"
        faults.append((where, f"{told}: merge it into its base and begin another plan on that"))
    if config.target_parameters:
        told = "adapters of parameters can't be laid beside other stages in one file yet"
        faults.append((place_of(document, stage, "lora_target_parameters"), told))
    if config.trainable_token_indices and adapter.found and _embedding(adapter.found):
        told = "the embedding has a low-rank update too, and a file holds one of the two"
        faults.append((place_of(document, stage, "trainable_token_indices"), told))
    return faults


def _of_codes(document: Document, adapters: Iterable[Adapter]) -> Iterator[Fault]:
    """Beginnings that take a part out of the weights, which codes don't give exactly."""
    for adapter in adapters:
        begin = adapter.config.init_lora_weights
        if changes_base(begin):
            told = f"{begin!r} takes a part out of the base's weights, which are quantised here"
            yield place_of(document, adapter.stage, "init_lora_weights"), told


def _embedding(found: DryRun) -> bool:
    return any(kind.layer == "Embedding" for kind in found.kinds)


def _dry_run(plan: Plan, base: Base, config: LoraConfig) -> DryRun:
    if config.task_type != "SEQ_CLS":
        return dry_run_on(base.empty("language"), config, name=plan.model_name_or_path)
    # The head is trained along whether the config names it or not.
    saved = sorted({"score", *(config.modules_to_save or ())})
    config = dataclasses.replace(config, modules_to_save=saved)
    return dry_run_on(base.empty("reward"), config, name=plan.model_name_or_path)


def _whole(base: Base, config: LoraConfig) -> int:
    """Entries of what is trained beside ranks: whole modules, and rows of embeddings."""
    asked = config.trainable_token_indices
    rows = sum(map(len, asked.values())) if isinstance(asked, dict) else len(asked or ())
    width: int = base.config.hidden_size
    head = width if config.task_type == "SEQ_CLS" else 0
    return base.matching(config.modules_to_save or []) + rows * width + head


def placed(document: Document, stage: int, told: str) -> Fault:
    """A fault of the engine at the setting, and in it at the pattern, that it is about."""
    setting = setting_in(told)
    where = place_of(document, stage, *setting)
    quoted = _QUOTED.search(told)
    if setting and quoted:
        where = place_in(document, where, quoted[1])
        told = told.partition(": ")[2] or told
    return where, told
