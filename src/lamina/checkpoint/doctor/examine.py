"""`examine`: read what can be read, run all checks, and tell what they find."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

# Importing them registers their checks.
from lamina.checkpoint.doctor import (  # noqa: F401
    against_base,
    chain,
    files,
    names,
    serving,
    settings,
    values,
)
from lamina.checkpoint.doctor.base import read_base
from lamina.checkpoint.doctor.evidence import Evidence
from lamina.checkpoint.doctor.findings import Examination, Finding, by_severity
from lamina.checkpoint.doctor.measure import Measures, measure
from lamina.checkpoint.doctor.read import adapter_directory, read_evidence
from lamina.checkpoint.doctor.registry import run_checks
from lamina.errors import ConfigError
from lamina.storage.source import PathOrId

TARGETS = ("vllm",)


def examine(
    path: PathOrId,
    *,
    base: str | Path | None = None,
    target: str | None = None,
    read_values: bool = True,
    trust_remote_code: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> Examination:
    """Look for everything that can be wrong with an adapter.

    What can't be read is a finding, and the rest is looked at all the same. Nothing is written or
    unpickled; without a base, no torch is imported.

    Args:
        path: the adapter's directory, or a hub id.
        base: the base model's directory or hub id; its config and the headers of its files are
            read, and its structure is built without weights.
        target: "vllm" makes what vLLM refuses an error; it is a note otherwise.
        read_values: False reads headers only.
        trust_remote_code: run the base's own Python code, where transformers doesn't know it.
        subfolder: a folder in it that holds the adapter.
        revision: of the adapter's hub repository.
        hub: `token`, `cache_dir` and more; see `lamina.storage.source.find_adapter`.

    Raises:
        CheckpointError: there is no such directory.
        ConfigError: the target is unknown.
    """
    if target is not None and target not in TARGETS:
        raise ConfigError(f"There is no target {target!r}.", cure=f"one of {', '.join(TARGETS)}")
    directory = adapter_directory(path, subfolder, revision=revision, **hub)
    evidence, findings = read_evidence(directory)
    evidence = dataclasses.replace(evidence, target=target or "")
    if read_values:
        measures, found = _measures(evidence)
        findings += found
        evidence = dataclasses.replace(evidence, measures=measures)
    if base is not None:
        model, found = read_base(str(base), None, trust_remote_code)
        findings += found
        evidence = dataclasses.replace(evidence, base=model)
    found, unchecked = run_checks(evidence)
    return Examination(
        path=str(directory),
        base=None if base is None else str(base),
        findings=by_severity(findings + found),
        unchecked=tuple(unchecked),
    )


def _measures(evidence: Evidence) -> tuple[Measures | None, list[Finding]]:
    if evidence.tensors is None:
        return None, []
    try:
        return measure(evidence.tensors, evidence.contents), []
    except Exception as error:
        what = f"The values can't be read: {type(error).__name__}: {error}"
        cure = "copy, download or save the file again"
        return None, [Finding("error", "file-unreadable", what, (), cure)]
