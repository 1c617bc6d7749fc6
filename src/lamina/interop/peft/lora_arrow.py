"""Arrow under peft's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina.config import ArrowConfig
from lamina.engine.variants.arrow import Router
from lamina.interop.peft.facade import PeftModel
from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.standing import StandsFor
from lamina.model.arrow import (
    GENERAL_PREFIX,
    ROUTER,
    TASK_PREFIX,
    load_experts,
    router_targets,
    source_of,
)

TASK_ADAPTER_PREFIX = TASK_PREFIX
GKS_ADAPTER_PREFIX = GENERAL_PREFIX
_resolve_adapter_source = source_of


class ArrowLoraLinearLayer(metaclass=StandsFor):
    """What decides which experts a token goes to."""

    stands_for = Router


def create_arrow_model(
    base_model: Any,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """Load adapters as experts, and activate a router that sends each token to those that fit it.

    Args:
        base_model: the model.
        task_specific_adapter_paths: the experts: directories, or `owner/name[/subfolder]`.
        arrow_config: how many experts a token has, and how they are weighed.
        general_adapter_paths: with `use_gks`, the adapters whose mean is subtracted.
        adapter_kwargs: options of loading.

    Raises:
        RoutingError: the experts can't be mixed.
    """
    model = load_experts(
        PeftModel,
        base_model,
        list(task_specific_adapter_paths or ()),
        list(general_adapter_paths or ()),
        arrow_config,
        adapter_kwargs,
    )
    targets, r = router_targets(model)
    model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=r))
    model.set_adapter(ROUTER)
    return model
