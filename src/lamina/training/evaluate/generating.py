"""How a model goes on with tokens: greedily, in batches, and leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lamina.errors import DataError

# A prompt's place among all, and how many tokens its answer may have.
_Asked = tuple[int, int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: the smallest set of tokens that are together at least as likely as this.
        seed: of the draws; None goes on with torch's own random state.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """Go on with prompts, greedily.

    Batches are padded on the left, and of prompts that are about equally long. Padding has no part
    in the answers: but for what batches of other shapes round otherwise in half precision, they are
    the same whatever the batch size.

    Args:
        model: a causal language model, adapted or not; mode, configs and random state are left as
            they are.
        tokenizer: of it; its end token ends an answer, and so do those of the model's configs.
        prompts: token ids.
        max_new_tokens: of an answer; one that comes to the end of the model's context ends there.
        batch_size: prompts at a time.

    Returns:
        The new tokens of each prompt, up to and including the first end token.

    Raises:
        DataError: prompts that are empty, or fill the model's context.
    """
    ends = end_tokens(model, tokenizer)
    found: list[list[int]] = [[] for _ in prompts]
    with left_as_is(model):
        for batch in _batches(model, prompts, max_new_tokens, batch_size):
            rows = [prompts[place] for place, _ in batch]
            told = _generated(model, tokenizer, rows, batch[0][1], GREEDY)
            for (place, _), row in zip(batch, told.tolist(), strict=True):
                found[place] = _until_end(row, ends)
    return found


def go_on(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    heard: Callable[[int], bool] = lambda token: True,
) -> list[int]:
    """Go on with one prompt, telling every token as soon as it is there.

    Args:
        model: as in `generate`.
        tokenizer: likewise.
        prompt: token ids.
        max_new_tokens: as in `generate`.
        sampling: how tokens are chosen.
        heard: is told of every token but the end token; False ends the answer.

    Returns:
        The new tokens, up to and including the first end token.

    Raises:
        DataError: the prompt is empty, or fills the model's context.
    """
    ((_, room),) = _asked(model, [prompt], max_new_tokens)
    ends = end_tokens(model, tokenizer)
    hearing = _Hearing(heard, ends)
    with left_as_is(model):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        _generated(model, tokenizer, [prompt], room, sampling, hearing)
    return hearing.tokens


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: of the tokenizer, and of the model's configs."""
    root = root_of(model)
    told = [
        tokenizer.eos_token_id,
        getattr(getattr(root, "generation_config", None), "eos_token_id", None),
        getattr(_text_config(root), "eos_token_id", None),
    ]
    ids: set[int] = set()
    for each in told:
        ids.update(each if isinstance(each, (list, tuple)) else [] if each is None else [each])
    return frozenset(ids)


def context_of(model: Any) -> int | None:
    """How many tokens a model can read at once; None if its config doesn't say."""
    most = getattr(_text_config(root_of(model)), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def root_of(model: Any) -> Any:
    """The transformers model in an adapted one; any other model is its own."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


@contextmanager
def left_as_is(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, generation config and random state are as found."""
    root = root_of(model)
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(root, "generation_config", None)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=[each.index for each in devices]):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            root.generation_config = config


def _text_config(root: Any) -> Any:
    config: Any = getattr(root, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# --- batches -------------------------------------------------------------------------------------


def _asked(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[_Asked]:
    """Each prompt's place, with the room that is left for its answer."""
    context = context_of(model)
    found = []
    faults = []
    for place, prompt in enumerate(prompts):
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
        if not prompt:
            faults.append(f"prompt {place + 1} has no tokens")
        elif room < 1:
            faults.append(
                f"prompt {place + 1} has {len(prompt):,} tokens, and the model's context is "
                f"{context:,}"
            )
        found.append((place, room))
    if faults:
        raise DataError(
            "These prompts can't be gone on with.",
            faults=faults[:8],
            cure="prompts with at least one token, shorter than the model's context",
        )
    return found


def _batches(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> Iterator[list[_Asked]]:
    """The longest prompts first; those of a batch have the same room for answers."""
    asked = _asked(model, prompts, max_new_tokens)
    asked.sort(key=lambda each: (each[1], -len(prompts[each[0]])))
    batch: list[_Asked] = []
    for each in asked:
        if batch and (len(batch) == batch_size or batch[0][1] != each[1]):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _until_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1])
    return list(tokens)


# --- generation ----------------------------------------------------------------------------------


def _generated(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    hearing: _Hearing | None = None,
) -> torch.Tensor:
    """The new tokens of a batch, rows x at most `max_new_tokens`, padded on the right."""
    from transformers import StoppingCriteriaList

    root = root_of(model)
    ends = sorted(end_tokens(model, tokenizer))
    pad = _padding(tokenizer, ends)
    # In place of the model's own, from which transformers takes all that is not said here.
    root.generation_config = _config(max_new_tokens, sampling, ends, pad)
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    device = next(root.parameters()).device
    told: torch.Tensor = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=root.generation_config,
        streamer=hearing,
        stopping_criteria=StoppingCriteriaList([hearing.criterion] if hearing else []),
    )
    return told[:, length:]


def _padding(tokenizer: Any, ends: Sequence[int]) -> int:
    """Any token will do: the attention mask keeps it out."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None else ends[0] if ends else 0


def _config(max_new_tokens: int, sampling: Sampling, ends: Sequence[int], pad: int) -> Any:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        # Whatever the model's config says, as it does for gradient checkpointing.
        use_cache=True,
        **chosen,
    )


class _Hearing:
    """A streamer of transformers that passes tokens on, and the criterion that ends on a False."""

    def __init__(self, heard: Callable[[int], bool], ends: frozenset[int]) -> None:
        self.tokens: list[int] = []
        self._heard, self._ends = heard, ends
        self._prompt_came = self._over = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt's tokens, then every new one."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        for token in value.flatten().tolist():
            if self._over:
                return
            self.tokens.append(token)
            self._over = token in self._ends or not self._heard(token)

    def end(self) -> None:
        """Nothing is held back."""

    def criterion(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """Whether to end, for the one row."""
        return torch.full((ids.shape[0],), self._over, dtype=torch.bool, device=ids.device)
