"""Checks against the base: do names, shapes and weights belong together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lamina.checkpoint.doctor.base import BaseModel
from lamina.checkpoint.doctor.evidence import StoredTensor
from lamina.checkpoint.doctor.findings import Finding
from lamina.checkpoint.doctor.patterns import plain_module
from lamina.checkpoint.doctor.registry import check
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.origin import PREFIX
from lamina.checkpoint.record import StageRecord
from lamina.checkpoint.sketch import Over, compare
from lamina.config import LoraConfig
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from torch import nn

    from lamina.checkpoint.load import Matching

_ADAPTER = "examined"
_ALIKE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@check
def fit(
    base: BaseModel, settings: LoraConfig, tensors: Mapping[str, StoredTensor], contents: Contents
) -> Iterator[Finding]:
    """Whether every tensor has a place in the base, and every place a tensor."""
    if base.model is None:
        yield from _fit_names(base, contents)
        return
    model = copy.deepcopy(base.model)
    yield from _silent_patterns(model, settings)
    yield from _grown(model, contents, settings)
    try:
        found = _matching(model, settings, tensors)
    except LaminaError as error:
        what = f"The config doesn't fit the base: {error.what}"
        yield Finding("error", "config-unfit", what, error.faults, error.cure or "")
        return
    yield from _unfit(found, tensors, base.name)


def _matching(
    model: nn.Module, settings: LoraConfig, tensors: Mapping[str, StoredTensor]
) -> Matching:
    """What loading would match, on an empty model."""
    import torch

    from lamina.checkpoint.load import match_tensors
    from lamina.engine.inject import inject
    from lamina.engine.state import AdapterState

    config = _as_loaded(settings)
    state = AdapterState()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject(model, _ADAPTER, config, state, initialise=False, strict=False)
    empty = {t.key: torch.empty(t.shape, device="meta") for t in tensors.values()}
    return match_tensors(model, _ADAPTER, state, empty)


def _as_loaded(settings: LoraConfig) -> LoraConfig:
    config = copy.deepcopy(settings)
    # A beginning that changes the base would want its weights.
    config.init_lora_weights = True
    return config


def _silent_patterns(model: nn.Module, settings: LoraConfig) -> Iterator[Finding]:
    """Patterns of the config that mean nothing in the base."""
    from lamina.engine.targets import make_plan

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_plan(model, _as_loaded(settings), strict=False)
            make_plan(model, _as_loaded(settings), strict=True)
    except LaminaError as error:
        heads = ("modules_to_save: 'classifier'", "modules_to_save: 'score'")
        lines = tuple(f for f in error.faults if "matched 0 modules" in f or "no effect" in f)
        # Those that are there are adapted already, or left out by another field.
        lines = tuple(n for n in lines if not n.startswith(heads) and "of that name" not in n)
        if lines:
            what = "Patterns of the config match nothing in the base"
            cure = "take them out of adapter_config.json, or give the base that it was trained on"
            yield Finding("warning", "pattern-matches-nothing", what, lines, cure)


def _unfit(found: Matching, tensors: Mapping[str, StoredTensor], base: str) -> Iterator[Finding]:
    from lamina.checkpoint.keys import suggest_mapping

    hit = len(found.matched) + len(found.mismatched)
    mapping = suggest_mapping(found.unexpected_keys, found.missing_keys)
    cure = "give the base that it was trained on; PEFT would drop these tensors in silence"
    if mapping:
        cure = f"if it is the same model under other names: load it with key_mapping={mapping!r}, "
        cure += "and save it again"
    if found.unexpected_keys:
        count = len(found.unexpected_keys)
        what = f"{count} of {len(tensors)} tensors have no place in {base}"
        if not hit:
            what = f"No tensor of the file has a place in {base}: the adapter would do nothing"
        yield Finding("error", "keys-match-nothing", what, tuple(found.unexpected_keys), cure)
    if found.missing_keys:
        what = f"The config asks for weights in {base} that the file lacks"
        cure = "narrow target_modules to what was trained, or take the file that has all tensors"
        yield Finding("error", "keys-missing", what, tuple(found.missing_keys), cure)
    if found.mismatched:
        lines = tuple(
            f"{key}: {_spoken(theirs)} instead of {_spoken(ours)}"
            for key, theirs, ours in found.mismatched
        )
        what = f"The shapes of tensors don't fit {base}"
        cure = "give the base that it was trained on (same sizes), or correct r in the config"
        yield Finding("error", "shapes-dont-fit", what, lines, cure)


def _spoken(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _fit_names(base: BaseModel, contents: Contents) -> Iterator[Finding]:
    """The same by the names in the base's files, where its structure is unknown."""
    known = base.modules
    lost = [plain_module(each.module) for each in contents.factors]
    lost = [name for name in lost if name not in known and f"{name}.weight" not in known]
    if lost:
        what = f"{base.name} has no weights by the names of adapted modules"
        cure = (
            "fine if transformers gives the model other names than its files have; else give the "
        )
        yield Finding("warning", "keys-match-nothing", what, tuple(lost), f"{cure}right base")


# --- the vocabulary ------------------------------------------------------------------------------


def _grown(model: Any, contents: Contents, settings: LoraConfig) -> Iterator[Finding]:
    """Rows that the adapter has and the base lacks; the model gets them, to compare the rest."""
    table = _table(model, "get_input_embeddings")
    rows = None if table is None else int(table.weight.shape[0])
    wanted = max(_rows_in(contents, settings), default=0)
    if rows is None or wanted <= rows or not hasattr(model, "resize_token_embeddings"):
        return
    whole = any(_is_table(name) for names in contents.wholes.values() for name in names)
    brought = bool(contents.rows) or whole or bool(contents.base_weights)
    what = f"It was trained with a vocabulary of at least {wanted}; the base has {rows} rows"
    cure = f"model.resize_token_embeddings({wanted}) before loading"
    cure += ", though Lamina does it itself" if brought else ", with the new rows of training"
    severity = "note" if brought else "error"
    where = ("trainable_token_indices",) if contents.rows else ()
    yield Finding(severity, "vocabulary-grown", what, where, cure)  # type: ignore[arg-type]
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _rows_in(contents: Contents, settings: LoraConfig) -> Iterator[int]:
    for each in contents.factors:
        if contents.is_embedding(each):
            yield each.shape_A[1]
    names = [name for owned in contents.wholes.values() for name in owned]
    for name in [*names, *contents.base_weights]:
        shape = contents.shapes.get(name) or contents.shapes.get(PREFIX + name)
        if shape and _is_table(name):
            yield shape[0]
    indices = settings.trainable_token_indices or {}
    lists = indices.values() if isinstance(indices, dict) else [indices]
    yield from (max(rows) + 1 for rows in lists if rows)


def _is_table(name: str) -> bool:
    return any(part in ("embed_tokens", "lm_head", "wte") for part in name.split("."))


def _table(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


@check
def ties(base: BaseModel, settings: LoraConfig, contents: Contents) -> Iterator[Finding]:
    """Whether tied weights come apart."""
    if base.model is None or settings.ensure_weight_tying:
        return
    from lamina.engine.names import places
    from lamina.engine.ties import tied_to_embedding

    tied = tied_to_embedding(base.model, places(base.model))
    touched = {plain_module(each.module) for each in contents.factors} | {*contents.wholes}
    hit = [name for name in tied if name in touched]
    if hit:
        what = f"{' and '.join(tied)} share one weight in the base, and the adapter changes "
        what += "each by itself" if len(hit) == len(tied) else f"{' and '.join(hit)} alone"
        cure = "merge_and_unload(untie=True) gives each a weight of its own; to train them as "
        cure += "one, set ensure_weight_tying=True"
        yield Finding("warning", "tied-weights", what, tuple(hit), cure)


# --- values --------------------------------------------------------------------------------------


@check
def weights_on_record(
    base: BaseModel, record: StageRecord, contents: Contents, settings: LoraConfig
) -> Iterator[Finding]:
    """Whether the base is the one on record, by its weights."""
    told = record.newest.base
    kind = type(base.model).__name__ if base.model is not None else None
    if kind and told.model_class and kind != told.model_class:
        what = f"It was trained on a {told.model_class}; the base is a {kind}"
        cure = "load the base by the class of the record, or give the base that it was trained on"
        yield Finding("warning", "base-class-differs", what, (base.name,), cure)
    if told.sketch is None or base.weights is None:
        return
    over = Over(
        targets={plain_module(each.module) for each in contents.factors},
        replaced={*contents.wholes},
    )
    likeness = compare(told.sketch, base.weights, over, name=told.name_or_path, here=base.name)
    if not likeness.ok:
        severe = likeness.verdict in ("other", "merged")
        cure = (
            "give the base that it was trained on; `lamina verify DIR --base BASE` compares answers"
        )
        yield Finding(
            "error" if severe else "warning",
            "base-differs",
            f"The base is not the one on record: {likeness.sentence}",
            likeness.differing,
            cure,
        )


@check
def copied_tables(
    base: BaseModel, tensors: Mapping[str, StoredTensor], contents: Contents
) -> Iterator[Finding]:
    """Weights of the base that are saved along for nothing."""
    if base.weights is None:
        return
    from lamina.checkpoint.doctor.sameness import same_values

    named = [name for names in contents.wholes.values() for name in names]
    same = []
    for name in [*named, *contents.base_weights]:
        stored = tensors.get(name) or tensors.get(PREFIX + name)
        original = plain_module(name.removeprefix(PREFIX))
        if stored is not None and same_values(stored, base.weights, original):
            same.append(stored)
    if same:
        size = sum(each.size for each in same) / 2**20
        what = f"Tensors are the base's own, unchanged: {size:.1f} MiB for nothing"
        cure = "take them out of modules_to_save, or save with Lamina, which leaves tables out"
        yield Finding("note", "base-weights-copied", what, tuple(e.key for e in same), cure)


@check
def dtype_of_base(
    base: BaseModel, tensors: Mapping[str, StoredTensor], contents: Contents
) -> Iterator[Finding]:
    """The dtypes of adapter and base."""
    factors = {key for each in contents.factors for key in each.keys}
    have = {_ALIKE.get(tensors[key].dtype, tensors[key].dtype) for key in factors}
    if base.dtype is None or not have or have == {base.dtype}:
        return
    said = " and ".join(sorted(have))
    what = f"The adapter is stored in {said}, the base in {base.dtype}"
    cure = "nothing has to be done: sums are made in float32 and rounded once; servers cast it to "
    yield Finding("note", "dtype-unlike-base", what, (), f"{cure}the base's dtype")
