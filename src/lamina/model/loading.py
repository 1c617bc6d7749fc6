"""How the facade loads: read, make room, fill; on an error the model is as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lamina.checkpoint.adapter import AdapterFile, read_adapter
from lamina.checkpoint.load import fill_adapter
from lamina.checkpoint.report import LoadReport
from lamina.config import PeftConfig
from lamina.engine.fold import give_back
from lamina.engine.inject import find_state, strip
from lamina.errors import ConfigError
from lamina.model.adapted import refuse_adapted
from lamina.model.vocabulary import grown
from lamina.storage.source import PathOrId

if TYPE_CHECKING:
    from lamina.model.facade import PeftModel

HUB_OPTIONS = (
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "allow_pickle",
)
_IGNORED = ("ephemeral_gpu_offload", "offload_dir", "offload_folder", "max_memory", "device_map")


@dataclass(frozen=True)
class How:
    """The options of a load that concern tensors."""

    strict: bool = True
    key_mapping: dict[str, str] | None = None
    ignore_mismatched_sizes: bool = False


def read(
    model_id: PathOrId, config: PeftConfig | None, options: dict[str, Any]
) -> tuple[AdapterFile, How]:
    """Read an adapter; `options` are the extra arguments of `from_pretrained`."""
    options = dict(options)
    hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    device = options.pop("torch_device", None) or "cpu"
    how = How(
        strict=options.pop("strict", True),
        key_mapping=options.pop("key_mapping", None),
        ignore_mismatched_sizes=options.pop("ignore_mismatched_sizes", False),
    )
    unknown = [name for name, value in options.items() if value and name not in _IGNORED]
    unsupported = [name for name in _IGNORED[:1] if options.get(name)]
    if unknown or unsupported:
        raise ConfigError(
            f"from_pretrained doesn't know {', '.join(map(repr, unknown + unsupported))}.",
            cure="leave it out",
        )
    return read_adapter(model_id, config=copy.deepcopy(config), device=device, **hub), how


def over(
    kind: type[PeftModel],
    model: nn.Module,
    file: AdapterFile,
    how: How,
    name: str,
    *,
    trainable: bool = False,
    upcast: bool = True,
) -> PeftModel:
    """A facade over `model` with the adapter of a file that has been read; all or nothing."""
    refuse_adapted(model)
    file.config.inference_mode = not trainable
    with grown(model, file), undone_on_error(model):
        facade = kind(
            model,
            file.config,
            name,
            upcast,
            low_cpu_mem_usage=True,
            trainable=trainable,
            strict=False,
        )
        fill(facade, name, file, how)
    return facade


def fill(model: PeftModel, name: str, file: AdapterFile, how: How) -> LoadReport:
    """Put the file's tensors into an adapter that has just been added."""
    report = fill_adapter(
        model,
        name,
        model.adapter_state,
        file.tensors,
        strict=how.strict,
        key_mapping=how.key_mapping,
        ignore_mismatched_sizes=how.ignore_mismatched_sizes,
        source=file.source,
    )
    if not report.complete:
        warnings.warn(f"{file.source}: {report}", stacklevel=4)
    elif report.replaced_keys and len(model.peft_config) > 1:
        warnings.warn(
            f"{file.source}: {report}; the other adapters lie over them from now on.",
            stacklevel=4,
        )
    elif report.count_B and len(report.zero_B) == report.count_B:
        warnings.warn(
            f"{file.source}: all {report.count_B} B matrices are zero, so this adapter changes "
            "nothing; it was saved before it was trained, or its gradients never arrived.",
            stacklevel=4,
        )
    return report


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If anything is raised inside, take all adapters out of the model again."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    except BaseException:
        state = find_state(model)
        if state is not None:
            state.biases.show(())
            give_back(model, state.configs)
        strip(model, keep_saved=False)
        if state is not None and state.replication is not None:
            state.replication.undo()
        for parameter, before in asked:
            parameter.requires_grad_(before)
        for module, mode in training:
            module.training = mode
        raise
