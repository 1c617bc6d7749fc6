"""Say what a directory or repository without an adapter at its top is, and where adapters are.

Works on names alone, so that it serves a local directory and a hub listing alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from lamina.errors import CheckpointError, MissingFileError, nearest

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PICKLE_NAME = "adapter_model.bin"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SHOWN = 8


def no_config(place: str, names: Collection[str], call: Callable[[str], str]) -> CheckpointError:
    """The error for a `place` that has no `adapter_config.json`.

    Args:
        place: the directory or repository as the user knows it.
        names: its files and its folders' files, as `file` and `folder/file`; folders end in `/`.
        call: folder -> the call that opens the adapter in it.
    """
    folders = sorted({name.split("/")[0] for name in names if "/" in name})
    checkpoints = sorted((folder for folder in folders if _CHECKPOINT.fullmatch(folder)), key=_step)
    adapters = [folder for folder in folders if f"{folder}/{CONFIG_NAME}" in names]
    named = [folder for folder in adapters if folder not in checkpoints]
    if named or checkpoints:
        return _inside(place, named, checkpoints, adapters, call)
    if "config.json" in names:
        return MissingFileError(
            f"'{place}' is a full model (it has config.json), not an adapter.",
            cure=f"AutoModelForCausalLM.from_pretrained('{place}')",
        )
    return MissingFileError(
        f"'{place}' has no {CONFIG_NAME}, so it is not an adapter.",
        faults=_found(names),
        cure="give the directory that save_pretrained or save_stage wrote",
    )


def no_weights(place: str, names: Collection[str]) -> MissingFileError:
    """The error for a `place` with a config and no weights that can be read."""
    shards = [name for name in names if re.fullmatch(r"adapter_model-.*\.safetensors", name)]
    if shards:
        return MissingFileError(
            f"'{place}' has shards of an adapter but not their index {INDEX_NAME}.",
            faults=_found(shards),
            cure=f"copy {INDEX_NAME} from where the shards came from",
        )
    return MissingFileError(
        f"'{place}' has {CONFIG_NAME} but no weights: neither {SAFETENSORS_NAME} nor {INDEX_NAME}.",
        faults=_found(names),
        cure="copy the weights there, or save the adapter again",
    )


def only_pickle(place: str) -> CheckpointError:
    """The error for a `place` whose only weights are a pickle, unless that was asked for."""
    return CheckpointError(
        f"'{place}' has its weights only as {PICKLE_NAME}, a pickle, and opening a pickle can run "
        "any code that its author put in.",
        cure="if you trust the author, pass allow_pickle=True (it is read with weights_only=True), "
        f"and save again to get {SAFETENSORS_NAME}",
    )


def _inside(
    place: str,
    named: list[str],
    checkpoints: list[str],
    adapters: list[str],
    call: Callable[[str], str],
) -> CheckpointError:
    faults = [f"adapter in subfolder '{folder}'" for folder in named]
    faults += [
        f"{'adapter' if folder in adapters else 'no adapter at the top'} in '{folder}'"
        for folder in checkpoints
    ]
    if named:
        return MissingFileError(
            f"'{place}' has no {CONFIG_NAME} itself, but its subfolders have: did you mean "
            f"subfolder='{named[0]}'?",
            faults=faults,
            cure=call(named[0]),
        )
    usable = [folder for folder in checkpoints if folder in adapters] or checkpoints
    return MissingFileError(
        f"'{place}' is the output of a training run: it has no {CONFIG_NAME} itself, only "
        "checkpoints. The last one is the one to take unless you know better.",
        faults=faults,
        cure=call(usable[-1]),
    )


def _found(names: Collection[str]) -> list[str]:
    here = sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in names})
    if not here:
        return ["it is empty"]
    more = [f"and {len(here) - _SHOWN} more"] if len(here) > _SHOWN else []
    others = {*here} - {CONFIG_NAME, SAFETENSORS_NAME, INDEX_NAME, PICKLE_NAME}
    close = [f"'{name}' is spelled almost like it" for name in nearest(CONFIG_NAME, others)]
    return [f"it has {', '.join([*here[:_SHOWN], *more])}", *close]


def _step(folder: str) -> int:
    match = _CHECKPOINT.fullmatch(folder)
    return int(match[1]) if match else -1
