"""Ask a model a fixed sequence of tokens, and leave no trace in it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lamina.engine.dequantise import computing_dtype
from lamina.engine.names import places, unadapted
from lamina.engine.weights import weight_of
from lamina.errors import ProbeError

LENGTH = 16
# Two primes: tokens that lie far apart, the same for each vocabulary of a size.
_STEP, _FIRST = 7919, 11
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")
# Logits that a model sets to the least finite number are masked, not computed.
_MASKED = 60_000.0


@dataclass(frozen=True)
class Outputs:
    """What a model answered.

    Attributes:
        tokens: what it was asked.
        values: positions x outputs, fp32, on the CPU; what the model masks (-inf, or the least
            number of its dtype) is 0.
        kind: "logits", or "hidden states" for a model without a head, of which no distribution
            can be made.
        dtype: that the model computed in, without "torch.".
        quantization: the quantiser that most of its quantised weights name; None if all are dense.
        depth: its number of blocks, one after another.
    """

    tokens: tuple[int, ...]
    values: torch.Tensor
    kind: Literal["logits", "hidden states"]
    dtype: str
    quantization: str | None
    depth: int

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return float(self.values.abs().max())

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return bool(self.values.isfinite().all())


def ask(model: Any, tokens: Sequence[int] | None = None) -> Outputs | None:
    """What a model answers to a fixed sequence of tokens; None if it takes none.

    It is asked as it stands (adapters active, folded or off), without dropout, gradients, autocast
    or a cache. Afterwards modes, flags, hooks and random states are what they were.

    Args:
        model: any model, adapted or not, on any device.
        tokens: the sequence; None takes `probe_tokens`.

    Raises:
        ProbeError: it takes tokens, but can't be asked: why is in the message.
    """
    embedding = _embedding(model)
    if embedding is None or not _takes_tokens(model):
        return None
    asked = probe_tokens(model) if tokens is None else tuple(int(token) for token in tokens)
    _refuse_unknown(asked, _rows(embedding))
    _refuse_sharded(model)
    device = _device(embedding)
    try:
        with _undisturbed(model, device):
            given = model(**_inputs(model, asked, device))
        values, kind = values_of(given)
    except Exception as error:
        # A model raises whatever it likes.
        said = str(error).strip().partition("\n")[0]
        raise ProbeError(
            f"The model can't be asked {len(asked)} tokens: {type(error).__name__}: {said}",
            cure="model(input_ids=...) has to work by itself",
        ) from error
    dtype = computing_dtype(_root(model)) or values.dtype
    return Outputs(
        tokens=asked,
        values=_unmasked(values),
        kind=kind,
        dtype=str(dtype).removeprefix("torch."),
        quantization=_quantiser(_root(model)),
        depth=_depth(_root(model)),
    )


def probe_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that a model is asked: spread over its vocabulary, none of them special.

    An encoder-decoder gets the end of the text as the last one, since some look for it; an aLoRA
    adapter is invoked in the middle, since it answers nothing else.

    Raises:
        ProbeError: the model has no input embedding.
    """
    embedding = _embedding(model)
    if embedding is None:
        raise ProbeError(f"A {type(model).__name__} has no input embedding to take tokens.")
    rows, config = _rows(embedding), getattr(_root(model), "config", None)
    special = _special_tokens(config)
    spread = ((i * _STEP + _FIRST) % rows for i in range(4 * LENGTH + len(special)))
    plain = [token for token in spread if token not in special] or [0]
    chosen = [*plain, *plain * LENGTH][:LENGTH]
    invocation = _invocation(model)
    if invocation:
        middle = LENGTH // 2
        chosen = [*chosen[:middle], *invocation, *chosen[middle:]][: LENGTH + len(invocation)]
    end = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) and end < rows:
        chosen[-1] = end
    return tuple(chosen)


def _root(model: Any) -> nn.Module:
    """The model itself, adapted, under the facade."""
    get = getattr(model, "get_base_model", None)
    found = get() if callable(get) else model
    assert isinstance(found, nn.Module)
    return found


def _embedding(model: Any) -> Any:
    get = getattr(_root(model), "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    found = unadapted(found) if isinstance(found, nn.Module) else None
    return found if isinstance(getattr(found, "num_embeddings", None), int) else None


def _rows(embedding: Any) -> int:
    return int(embedding.num_embeddings)


def _takes_tokens(model: Any) -> bool:
    return "input_ids" in inspect.signature(_root(model).forward).parameters


def _special_tokens(config: Any) -> set[int]:
    """The ids that a config names: padding, ends of text, places of images."""
    found: set[int] = set()
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "decoder"))):
        for name, value in getattr(part, "__dict__", {}).items():
            if name.endswith(("token_id", "token_index")):
                ids = value if isinstance(value, (list, tuple)) else [value]
                found |= {token for token in ids if isinstance(token, int)}
    return found


def _invocation(model: Any) -> list[int]:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return []
    found = [getattr(config, "alora_invocation_tokens", None) for config in configs.values()]
    return list(next((tokens for tokens in reversed(found) if tokens), []))


def _refuse_unknown(tokens: tuple[int, ...], rows: int) -> None:
    unknown = sorted({token for token in tokens if not 0 <= token < rows})
    if unknown or not tokens:
        raise ProbeError(
            f"The model's vocabulary of {rows:,} has no token {unknown[-1]:,}."
            if unknown
            else "There are no tokens to ask.",
            cure="load the base that the adapter was trained on",
        )


def _refuse_sharded(model: nn.Module) -> None:
    """Asking shards is a step of all processes together; one alone would wait for ever."""
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    sharded = kinds.intersection(_SHARDED) or any(
        hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor"
        for parameter in model.parameters()
    )
    if sharded:
        raise ProbeError(
            "The model's weights are sharded among processes, and it answers only where all take "
            "part.",
            cure="lamina verify, or save_stage once more, where the model is whole",
        )


def _device(embedding: Any) -> torch.device:
    hook = getattr(embedding, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    device = embedding.weight.device
    if device.type != "meta":
        return torch.device(device)
    if execution is None:
        raise ProbeError(
            "The model has no weights yet: they are on the meta device.",
            cure="load them first",
        )
    return torch.device(execution)


def _inputs(model: Any, tokens: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    root: Any = _root(model)
    ids = torch.tensor([tokens], device=device)
    inputs: dict[str, Any] = {"input_ids": ids}
    known = inspect.signature(root.forward).parameters
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if "use_cache" in known:
        inputs["use_cache"] = False
    return inputs


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Everything that asking could change is afterwards as it was."""
    devices = {parameter.device for parameter in model.parameters()} | {device}
    others = sorted({each.index or 0 for each in devices if each.type == device.type})
    kind = device.type
    with ExitStack() as stack:
        forked = {"devices": others, "device_type": kind} if kind not in ("cpu", "meta") else {}
        stack.enter_context(torch.random.fork_rng(**(forked or {"devices": []})))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_full_precision())
        # A graph compiled for training isn't what is asked, nor worth a second one.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(in_eval(model))
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of fp32 are in fp32, and not in TF32, which a record would not tell."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # It was set for one backend alone, and can't be told apart.
        before = "highest"
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """All of a model in eval mode for a while; afterwards each module has the mode it had."""
    # Flags alone: `train()` may be overridden, and do more.
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = _packs(module)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _packs(module: nn.Module) -> bool:
    """Whether a layer rearranges its codes in place, for good, when it answers in eval mode."""
    kind = type(module)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


def values_of(given: Any) -> tuple[torch.Tensor, Literal["logits", "hidden states"]]:
    """Positions x outputs of whatever a forward returns."""
    named: Mapping[str, Any] = given if isinstance(given, Mapping) else vars(given or object)
    if isinstance(named.get("logits"), torch.Tensor):
        values, is_head = named["logits"], True
    elif isinstance(named.get("start_logits"), torch.Tensor):
        # Spans: two numbers for each position.
        values, is_head = torch.stack([named["start_logits"], named["end_logits"]], -1), True
    else:
        hidden = named.get("last_hidden_state")
        first = given if isinstance(given, torch.Tensor) else None
        values = hidden if hidden is not None else first if first is not None else given[0]
        is_head = False
    values = torch.as_tensor(values)
    return values.reshape(-1, values.shape[-1]), "logits" if is_head else "hidden states"


def _unmasked(values: torch.Tensor) -> torch.Tensor:
    values = values.detach().float().cpu()
    return values.masked_fill(values <= -_MASKED, 0.0)


def _quantiser(root: nn.Module) -> str | None:
    said = Counter(weight_of(place.original).quantised for place in places(root))
    del said[None]
    return said.most_common(1)[0][0] if said else None


def _depth(root: nn.Module) -> int:
    """Blocks one after another: the lengths of the lists that lie in no other list."""

    def count(module: nn.Module) -> int:
        if isinstance(module, nn.ModuleList):
            return len(module)
        return sum(map(count, module.children()))

    return max(count(root), 1)
