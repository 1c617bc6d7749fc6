"""Go through an adapter, its base and what both answer, and report on all of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.checkpoint.adapter import read_adapter
from lamina.checkpoint.probe import ask
from lamina.checkpoint.record import Probe
from lamina.errors import LaminaError, ProbeError, StageError
from lamina.model import PeftModel, loading
from lamina.model.adapted import refuse_adapted
from lamina.model.vocabulary import grown
from lamina.stages.laid_over import adapted
from lamina.stages.verify.conclusions import conclude
from lamina.stages.verify.contents import Contents, contents_of
from lamina.stages.verify.experiments import scaled_cause
from lamina.stages.verify.findings import Findings
from lamina.stages.verify.looking import look_at_base, look_at_file, look_at_tokenizer
from lamina.stages.verify.opening import open_base, open_tokenizer
from lamina.stages.verify.replay import Answered, Judgement, ask_both
from lamina.stages.verify.report import Cause, VerifyReport

_NOTHING = Judgement()
_PROBE_VERSION = 1


def verify(
    path: str | Path,
    base: nn.Module | str | None = None,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool | None = None,
    **options: Any,
) -> VerifyReport:
    """Whether an adapter on its base answers what it did when it was saved; if not, why not.

    Nothing that is found stops the search: the report has it all, likeliest cause first.

    Args:
        path: the adapter's directory or hub id.
        base: the base model, or its path or hub id; None takes the one on record. A model is given
            back without the adapter.
        tokenizer: the tokenizer, or where it is; None takes one that lies with the adapter or its
            base.
        dtype: to load the base in; None takes the one on record.
        load_in_4bit: whether to load the base through bitsandbytes; None does as on record.
        options: hub options of the adapter; all else goes to the base's `from_pretrained`.

    Raises:
        CheckpointError: the adapter or the base can't be read at all.
        AlreadyAdaptedError: the base has adapters.
    """
    hub = {name: options.pop(name) for name in loading.HUB_OPTIONS if name in options}
    contents = contents_of(read_adapter(path, **hub))
    if isinstance(base, nn.Module):
        told = {"dtype": dtype, "load_in_4bit": load_in_4bit, **options}
        _refuse_options({name: value for name, value in told.items() if value is not None})
        refuse_adapted(base)
        opened: Any = base
    else:
        opened = open_base(
            contents.file, contents.record, base, dtype=dtype, load_in_4bit=load_in_4bit, **options
        )
    name = str(getattr(opened, "name_or_path", "") or "")
    findings = Findings()
    look_at_file(findings, contents)
    found = open_tokenizer(tokenizer, [contents.file.source, name])
    beside = str(getattr(found, "name_or_path", "")) == contents.file.source
    look_at_tokenizer(findings, contents, found, own=tokenizer is not None or beside)
    judgement = _lay_over(findings, contents, opened)
    return _report(findings, contents, judgement, name)


def examine(
    contents: Contents, model: PeftModel, adapter: str, *, tokenizer: Any = None, base: bool = True
) -> VerifyReport:
    """The same for an adapter that lies over its base already.

    Args:
        contents: of the adapter's file.
        model: base and adapter.
        adapter: the adapter's name there.
        tokenizer: the tokenizer, if it is to be looked at.
        base: whether to compare the base's weights with those on record.
    """
    findings = Findings()
    look_at_file(findings, contents)
    look_at_tokenizer(findings, contents, tokenizer)
    root = model.get_base_model()
    if base:
        look_at_base(findings, contents, root)
    judgement = _replay(findings, contents, model, adapter)
    name = str(getattr(root, "name_or_path", "") or "")
    return _report(findings, contents, judgement, name)


def _refuse_options(options: dict[str, Any]) -> None:
    if options:
        raise StageError(
            "The base is loaded already, so nothing is left to take these options.",
            faults=[f"{name}={value!r}" for name, value in options.items()],
            cure="load the base with them, or give its path",
        )


def _lay_over(findings: Findings, contents: Contents, base: nn.Module) -> Judgement:
    """Look at the base, and replay the probe with the adapter over it."""
    if not contents.whole:
        look_at_base(findings, contents, base)
        return _replay_base(findings, contents, base)
    try:
        with grown(base, contents.file):
            look_at_base(findings, contents, base)
            with warnings.catch_warnings(record=True) as caught:
                # What loading warns of is told among the checks.
                warnings.simplefilter("always")
                with adapted(base, contents.file) as (model, adapter):
                    judgement = _replay(findings, contents, model, adapter)
            findings.notes += [str(each.message).splitlines()[0] for each in caught]
            return judgement
    except LaminaError as error:
        findings.failed("loading", "; ".join([error.what, *error.faults[:4]]))
        findings.blame(
            Cause(
                "not loadable", f"it can't be laid over this base: {error.what}", error.cure or ""
            )
        )
        return _replay_base(findings, contents, base)


def _probe(findings: Findings, contents: Contents) -> Probe | None:
    probe = contents.record.newest.probe if contents.record else None
    if probe is None or probe.version == _PROBE_VERSION:
        return probe
    findings.notes.append("a newer Lamina made the probe on record; it can't be replayed with this")
    return None


def _replay(findings: Findings, contents: Contents, model: PeftModel, adapter: str) -> Judgement:
    probe = _probe(findings, contents)
    try:
        answered = ask_both(model, probe.tokens if probe else None)
    except ProbeError as error:
        return _unaskable(findings, probe, error)
    if answered.chain is None:
        findings.unchecked("answers", "the model doesn't take tokens: nothing can be replayed")
        return _NOTHING
    if probe is None:
        _unproved(findings, contents, answered)
        return _NOTHING
    return conclude(findings, contents, probe, answered, model, adapter)


def _replay_base(findings: Findings, contents: Contents, base: nn.Module) -> Judgement:
    """Replay the base alone, where the adapter can't be laid over it."""
    probe = _probe(findings, contents)
    findings.unchecked("answers", "the adapter can't be laid over this base")
    try:
        alone = ask(base, probe.tokens) if probe else None
    except ProbeError as error:
        return _unaskable(findings, probe, error)
    if probe is None or alone is None:
        return _NOTHING
    return conclude(findings, contents, probe, Answered(alone, None), None, "")


def _unaskable(findings: Findings, probe: Probe | None, error: ProbeError) -> Judgement:
    if probe is None:
        findings.unchecked("answers", error.what)
        return _NOTHING
    findings.failed("answers", error.what)
    findings.blame(
        Cause(
            "unknown", f"the model could be asked when it was saved: {error.what}", error.cure or ""
        )
    )
    return _NOTHING


def _unproved(findings: Findings, contents: Contents, answered: Answered) -> None:
    """Without recorded answers: whether the adapter changes anything."""
    base, chain = answered.base, answered.chain
    findings.unchecked(
        "answers",
        "none are on record that can be replayed; lamina.save_stage records them",
    )
    if chain is not None and not chain.is_finite:
        findings.failed("effect", "base and adapter answer NaN or infinity")
        findings.blame(
            Cause("not finite", "base and adapter answer NaN or infinity", "try --dtype float32")
        )
    elif base is not None and chain is not None:
        change = float((base.values - chain.values).abs().max())
        if change == 0:
            findings.failed("effect", "base and adapter answer exactly as the base alone")
            findings.blame(
                Cause(
                    "adapter not applied",
                    "the adapter changes nothing: base and adapter answer as the base alone",
                    "lamina inspect DIR shows whether its B matrices are all zero: then it was "
                    "saved before it was trained",
                )
            )
        else:
            findings.passed("effect", f"the adapter changes the answers, by up to {change:.2g}")
    if contents.scale not in (None, 1.0) and contents.record is not None:
        findings.failed("scaling", f"{contents.scale:g} times the one on record")
        findings.blame(scaled_cause(float(contents.scale or 0), contents))


def _report(
    findings: Findings, contents: Contents, judgement: Judgement, base: str
) -> VerifyReport:
    record = contents.record
    return VerifyReport(
        path=contents.file.source,
        stages=tuple(stage.name for stage in record.stages) if record else (),
        base=base or (record.newest.base.name_or_path if record else None),
        checks=tuple(findings.checks),
        answers=judgement.chain,
        base_answers=judgement.base,
        effect=judgement.effect,
        causes=findings.causes if any(c.verdict == "failed" for c in findings.checks) else (),
        notes=tuple(dict.fromkeys(findings.notes)),
    )
