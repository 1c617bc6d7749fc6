"""The one lamina that is the sum of several, and what it cost where ranks were left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.chain import makers_of
from lamina.checkpoint.record import Lamina, StageRecord
from lamina.config import LoraConfig
from lamina.engine.combine import Compressed, compress
from lamina.engine.compose import Factors
from lamina.engine.flat_config import flat_config_of_names
from lamina.stages.assembling import PLAIN, surroundings, tensors_of, with_biases
from lamina.stages.lamination import Chain, put_together
from lamina.stages.selection import Selection

Made = Mapping[str, Compressed]


@dataclass(frozen=True)
class Flat:
    """What is to be written, and what it cost.

    Attributes:
        file: config and tensors.
        record: the record of the one stage.
        made: plain module name -> its update.
        error: `‖ΔW - ΔW_r‖_F / ‖ΔW‖_F` over all modules; 0 where nothing was left out.
    """

    file: AdapterFile
    record: StageRecord
    made: Made
    error: float

    @property
    def energy(self) -> float:
        """The share of the squared singular values that is kept, over all modules."""
        whole = sum(each.norm**2 for each in self.made.values())
        kept = sum(each.energy * each.norm**2 for each in self.made.values())
        return kept / whole if whole else 1.0


def summed(selection: Selection, rank: int | None, energy: float | None) -> Made:
    """The sum of the chosen laminae in each module, of as many ranks as it may have.

    Scalings are made one; where they are already, factors aren't touched.
    """
    parts = [replace(part, extras={}) for part in selection.chain.parts]
    wholes = put_together(parts, _usual_scaling(parts[-1].factors))
    return {module: compress(whole, rank, energy) for module, whole in wholes.items()}


def _usual_scaling(factors: Mapping[str, Factors]) -> float:
    """The scaling of most modules, so that most are stored untouched."""
    counts = Counter(whole.scaling for whole in factors.values() if whole.scaling)
    return counts.most_common(1)[0][0] if counts else 1.0


def flat_of(file: AdapterFile, chain: Chain, selection: Selection, made: Made) -> Flat:
    """The adapter with these updates.

    Args:
        file: what the chain was read from.
        chain: the whole chain.
        selection: the laminae that are in the updates.
        made: plain module name -> its update; all with the same scaling.
    """
    chosen = selection.chain
    ranks = {module: each.factors.rank for module, each in made.items()}
    (scaling,) = {each.factors.scaling for each in made.values()}
    begun = replace(file.config, **PLAIN, **surroundings(file, chain, selection))
    config = flat_config_of_names(begun, [part.config for part in chosen.parts], ranks, scaling)
    config = with_biases(config, selection)
    bare = replace(chosen, parts=tuple(replace(part, extras={}) for part in chosen.parts))
    tensors = tensors_of(bare, {module: each.factors for module, each in made.items()})
    error = math.hypot(*(each.error for each in made.values()))
    norm = math.hypot(*(each.norm for each in made.values()))
    relative = error / norm if norm else 0.0
    return Flat(
        file=replace(file, config=config, tensors=tensors),
        record=_record(selection, config, ranks, relative),
        made=made,
        error=relative,
    )


def _record(
    selection: Selection, config: LoraConfig, ranks: Mapping[str, int], error: float
) -> StageRecord:
    record = selection.chain.record
    laminae = record.laminae
    made_of = laminae[0].made_of
    if len(laminae) > 1:
        makers = {name for names in makers_of(record) for name in names}
        made_of = tuple(stage.name for stage in record.stages if stage.name in makers)
    before = max((lamina.error or 0.0 for lamina in laminae), default=0.0)
    # What is left of what was left: singular directions that were kept stay what they were.
    total = math.sqrt(max(0.0, 1 - (1 - before**2) * (1 - error**2)))
    newest = record.newest
    if error:
        newest = newest.model_copy(update={"probe": None})
    whole = Lamina(
        stage=laminae[-1].stage,
        config=config.to_dict(),
        ranks=dict(ranks),
        made_of=made_of,
        error=total or None,
    )
    return record.model_copy(update={"stages": (*record.stages[:-1], newest), "laminae": (whole,)})
