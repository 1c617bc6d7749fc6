"""`PeftModel` as peft has it."""

from __future__ import annotations

from typing import Any

from lamina import model as native
from lamina.interop.peft.standing import StandsFor


class PeftModel(native.PeftModel, metaclass=StandsFor):
    """Lamina's `PeftModel`; natively built ones count as instances."""

    native: Any = native.PeftModel

    @classmethod
    def for_task(cls, task: str | None) -> type[native.PeftModel]:
        """The facade for a config's task; a class made for a task stays itself."""
        from lamina.interop.peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        if cls is not PeftModel or task is None:
            return cls
        facade: type[native.PeftModel] = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, cls)
        return facade
