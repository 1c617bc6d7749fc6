"""The stage record: whose ranks are whose, in the header of the adapter's safetensors file.

An adapter with a record is laminated: its rank dimension is divided among laminae, the groups of
ranks that one stage began and that later ones may have continued. A tool that drops the record
leaves a plain adapter that computes the same.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from lamina.errors import RecordError
from lamina.storage.untrusted import parse_json

KEY = "lamina"
FORMAT_VERSION = 1
_MOST_TOKENS, _LONGEST_PROBE = 2**31, 4096

# A chain is walked stage by stage, and shown as a tree.
_MOST_STAGES = 1_000
_LONGEST_NAME = 200
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

Mode = Literal["fresh", "continue", "stack", "merge"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _leave_out_empty(values: dict[str, Any], *optional: str) -> dict[str, Any]:
    """What a part is written as: optional entries that are empty are left out."""
    return {k: v for k, v in values.items() if v or k not in optional}


class Sketch(_Part):
    """What a base model's weights look like: enough to tell them from others, in a few KB.

    Attributes:
        version: of the rule that chooses what is sampled.
        tensors: `NAME SHAPE` of each tensor in the order of the samples; runs of numbers are
            folded, as in `layers.{0-31}.mlp.up_proj.weight 14336x4096`.
            After the shape, "quantised" says that the values were read through a quantiser,
            "passed" that it is quantised and wasn't looked at, "unread" that it couldn't be.
        samples: number of values per tensor: half of them are the first in a window, the other
            half the smallest.
        values: the values rounded to bfloat16, tensor by tensor: their bits, little-endian, in
            base64.
        offsets: where in its window the smallest value is, a byte each, in base64.
        dtype: what most of the dense weights had when they were sampled; "float16" if any had it.
        quantization: the quantiser they were read through, as in `Base`; None if they were dense.
        whole: whether these are all tensors of the model; files may have some in other forms.
    """

    version: int = 1
    tensors: tuple[str, ...]
    samples: int
    values: str
    offsets: str
    dtype: str | None = None
    quantization: str | None = None
    whole: bool = True

    @model_validator(mode="after")
    def _can_be_read(self) -> Sketch:
        # Here, because most records are read for something else, and numpy takes a while.
        from lamina.checkpoint.sketch.stored import VERSION, check

        if self.version == VERSION:
            check(self)
        return self


class Answers(_Part):
    """What a model answers to the tokens of a probe, position by position.

    Attributes:
        tokens: the ids of its largest logits, largest first.
        logits: those logits.
        log_normaliser: log of the sum of exp of all logits, so that `logits - log_normaliser`
            are log-probabilities.
        digest: of all logits together: their mean, and projections on fixed random signs.
        largest: the largest magnitude of a logit at any position.
    """

    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[float, ...], ...]
    log_normaliser: tuple[float, ...]
    digest: tuple[tuple[float, ...], ...]
    largest: float

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="after")
    def _rectangular(self) -> Answers:
        rows = len(self.digest)
        if {len(self.tokens), len(self.logits), len(self.log_normaliser)} not in ({0}, {rows}):
            raise ValueError("its parts are of different numbers of positions")
        widths = [{len(row) for row in part} for part in (self.digest, self.tokens, self.logits)]
        if rows == 0 or any(len(each) > 1 or 0 in each for each in widths):
            raise ValueError("its rows are of different lengths, or empty")
        if widths[1] != widths[2]:
            raise ValueError("there are not as many logits as tokens")
        if not all(0 <= token < _MOST_TOKENS for row in self.tokens for token in row):
            raise ValueError("a token id is out of bounds")
        return self


class Probe(_Part):
    """What a model should answer.

    Attributes:
        version: of the rule that makes the digest.
        tokens: the sequence of token ids that was asked.
        outputs: number of logits per position.
        dtype: that the model computed in.
        quantization: of its base, as in `Base`.
        chain: what base and all stages up to this one answered together.
        base: what the base alone answered; None if that wasn't to be had.
    """

    version: int = 1
    tokens: tuple[int, ...]
    outputs: int
    dtype: str
    quantization: str | None = None
    chain: Answers
    base: Answers | None = None

    @field_validator("tokens")
    @classmethod
    def _few(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if not 0 < len(tokens) <= _LONGEST_PROBE:
            raise ValueError(f"a probe asks 1 to {_LONGEST_PROBE} tokens")
        return tokens


class Base(_Part):
    """The base model.

    Attributes:
        name_or_path: what it was loaded from; None if it was built in memory.
        revision: of the hub repository.
        model_class: the class of the model, e.g. "LlamaForCausalLM".
        dtype: of most of its parameters while the stage was trained, e.g. "bfloat16"; those that
            are quantised don't count.
        quantization: the quantiser it was loaded with, and its settings as far as they are known,
            e.g. "bitsandbytes nf4"; None for a dense base.
        vocab_size: rows of its input embedding.
        tokenizer: SHA-256 of the vocabulary of the tokenizer it was trained with; None if that was
            not given.
        tokenizer_size: one more than the largest id in that vocabulary: tokens that are added
            later have larger ones, and don't count.
        chat_template: SHA-256 of that tokenizer's chat template; None if it has none.
        parameters: number of its parameters.
        shapes: SHA-256 of the sorted names and shapes of its parameters.
        sketch: what its weights look like; None in the older stages of a chain if it is that of
            the newest.
    """

    name_or_path: str | None = None
    revision: str | None = None
    model_class: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    vocab_size: int | None = None
    tokenizer: str | None = None
    tokenizer_size: int | None = None
    chat_template: str | None = None
    parameters: int | None = None
    shapes: str | None = None
    sketch: Sketch | None = None

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("tokenizer", "tokenizer_size", "chat_template", "sketch")
        return _leave_out_empty(write(self), *optional)


class Lamina(_Part):
    """A group of ranks: the part of the adapter that one stage began.

    Attributes:
        stage: the stage that trained it last.
        config: the adapter config of that stage, as in `adapter_config.json`; its own scaling in
            a module is what this config says there.
        ranks: plain module name -> its rank there. In the file, the ranks of a module are those of
            the laminae in their order.
        began: the `init_lora_weights` that took a part out of the base (PiSSA and its like), so
            that these ranks were converted to lie over the base as it was before; else None.
        taken: plain module name -> how many of its ranks, the last ones, are what was taken out.
            They don't train; "continue" takes them out of the base again.
        made_of: the stages that were put together in these ranks when the chain was flattened,
            oldest first; empty where one stage began them.
        error: `‖ΔW - ΔW_r‖_F / ‖ΔW‖_F` over all modules, where flattening left ranks out.
    """

    stage: str
    config: dict[str, Any]
    ranks: dict[str, int]
    began: str | None = None
    taken: dict[str, int] = Field(default_factory=dict)
    made_of: tuple[str, ...] = ()
    error: float | None = None

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Most laminae have left the base alone.
        return _leave_out_empty(write(self), "began", "taken", "made_of", "error")

    @field_validator("ranks")
    @classmethod
    def _positive(cls, ranks: dict[str, int]) -> dict[str, int]:
        if any(rank <= 0 for rank in ranks.values()):
            raise ValueError("a rank is a positive integer")
        return ranks


class Stage(_Part):
    """One stage of the chain.

    Attributes:
        name: unique in the chain.
        mode: how it was begun; "fresh" is the first of a chain.
        created: UTC time at which it was saved, ISO 8601.
        metrics: what was measured, by name.
        data: what it was trained on, as the caller described it.
        base: the base it was trained on.
        versions: of lamina, torch and transformers.
        probe: what the model answered when the stage was saved; None for a model that doesn't
            take tokens.
    """

    name: str
    mode: Mode
    created: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    data: Any = None
    base: Base = Field(default_factory=Base)
    versions: dict[str, str] = Field(default_factory=dict)
    probe: Probe | None = None

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _leave_out_empty(write(self), "probe")


class StageRecord(_Part):
    """The chain that an adapter holds.

    Attributes:
        format_version: of this record; a newer one than is known is refused.
        stages: all stages, oldest first.
        laminae: the groups of ranks, in the order in which they lie in the file.
        saved_modules: module trained whole -> the stage whose copy the file holds.
        biases: bias of the base -> the stage whose values the file holds. Others that may be there
            are the base's own.
        token_rows: plain name of a table -> stage -> the indices of the rows that it replaces there
            (`trainable_token_indices`). The file has them in the order of their indices.
        weights: SHA-256 of the adapter's tensors as they were saved: names, dtypes, shapes, bytes.
        left_out: stages that these were trained on, and whose part is not in this file, since it
            was split or flattened in part.
    """

    format_version: int = FORMAT_VERSION
    stages: tuple[Stage, ...]
    laminae: tuple[Lamina, ...]
    saved_modules: dict[str, str] = Field(default_factory=dict)
    biases: dict[str, str] = Field(default_factory=dict)
    token_rows: dict[str, dict[str, tuple[int, ...]]] = Field(default_factory=dict)
    weights: str | None = None
    left_out: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _leave_out_empty(write(self), "token_rows", "weights", "left_out")

    @model_validator(mode="after")
    def _consistent(self) -> StageRecord:
        names = [stage.name for stage in self.stages]
        if self.format_version < 1:
            raise ValueError("versions of the format are counted from 1")
        if not names:
            raise ValueError("a chain has at least one stage")
        if max(len(names), len(self.laminae)) > _MOST_STAGES:
            raise ValueError(f"a chain has at most {_MOST_STAGES:,} stages")
        if wrong := [name for name in names if name_fault(name)]:
            raise ValueError(f"the stage {wrong[0][:80]!r} {name_fault(wrong[0])}")
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name")
        pointers = [
            *(lamina.stage for lamina in self.laminae),
            *(stage for lamina in self.laminae for stage in lamina.made_of),
            *self.saved_modules.values(),
            *self.biases.values(),
            *(stage for stages in self.token_rows.values() for stage in stages),
        ]
        unknown = sorted(set(pointers) - set(names))
        if unknown:
            raise ValueError(f"there is no stage {', '.join(map(repr, unknown))} in the chain")
        return self

    @property
    def newest(self) -> Stage:
        """The last stage."""
        return self.stages[-1]

    def to_metadata(self) -> dict[str, str]:
        """The entry for the header of a safetensors file."""
        return {KEY: self.model_dump_json(exclude_defaults=False)}


def name_fault(name: str) -> str | None:
    """What keeps a name from being a stage's: it becomes an adapter's, and a folder's."""
    if not name or "." in name or name.startswith("/") or _CONTROL.search(name):
        return "has a name that can't be an adapter's or a folder's: no dots, no control characters"
    return None if len(name) <= _LONGEST_NAME else f"has a name of {len(name):,} characters"


def read_record(metadata: dict[str, str], *, source: str = "this file") -> StageRecord | None:
    """The record in a safetensors header; None if there is none.

    Raises:
        RecordError: it was written by a newer version, or is damaged.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        values = parse_json(text)
    except ValueError as error:
        raise RecordError(f"The stage record of {source} is not JSON: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise RecordError(
            f"The stage record of {source} has version {version}; this Lamina knows versions up to "
            f"{FORMAT_VERSION}.",
            cure="pip install --upgrade lamina; the weights themselves open in any PEFT reader",
        )
    try:
        # Strict: a rank is no text of digits, and a version no fraction.
        return StageRecord.model_validate_json(text, strict=True)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'record'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False)
        ]
        raise RecordError(
            f"The stage record of {source} is damaged.",
            faults=faults,
            cure="open it as a plain adapter with PeftModel.from_pretrained, or save it again",
        ) from error


def json_schema() -> dict[str, Any]:
    """The JSON schema of the record, for tools that read it elsewhere."""
    schema = StageRecord.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"lamina-stage-record-{FORMAT_VERSION}",
        **schema,
    }
