"""What a trainer writes and reads again while a stage is trained: stage directories."""

from __future__ import annotations

from pathlib import Path

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.record import KEY
from lamina.checkpoint.report import LoadReport
from lamina.errors import StageError
from lamina.model import PeftModel
from lamina.model.replacing import config_faults
from lamina.stages.context import context_of
from lamina.stages.lamination import Chain, take_apart
from lamina.stages.restore import fill_part
from lamina.stages.save import save_stage


class StageCheckpoints:
    """How `save_pretrained` and `load_adapter` treat a model on which a stage was begun."""

    def save(self, model: PeftModel, directory: Path) -> None:
        """Write the whole chain, so that the checkpoint answers as the model does."""
        save_stage(model, directory)

    def wrote(self, file: AdapterFile) -> bool:
        """Whether a file is a stage, and no adapter by itself."""
        return KEY in file.metadata

    def restore(self, model: PeftModel, file: AdapterFile) -> LoadReport:
        """Put the newest ranks of a checkpoint into the stage that trains.

        Older ranks came with the parent, and are the same.

        Raises:
            StageError: the checkpoint is of another stage, or its config differs.
        """
        chain = take_apart(file)
        faults = _faults(model, chain)
        if faults:
            raise StageError(
                f"{file.source} is no checkpoint of this stage.",
                faults=faults,
                cure="begin the stage as the run did that wrote the checkpoint",
            )
        return fill_part(model, chain, chain.parts[-1], context_of(model).name)


def _faults(model: PeftModel, chain: Chain) -> list[str]:
    context = context_of(model)
    older = context.parent.stages if context.parent else ()
    ours = " -> ".join([*(stage.name for stage in older), context.name])
    theirs = " -> ".join(stage.name for stage in chain.record.stages)
    if theirs != ours:
        return [f"stages: {theirs} in the checkpoint, {ours} in the model"]
    return config_faults(chain.record.laminae[-1].config, context.config, "the checkpoint")
