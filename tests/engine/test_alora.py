from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lamina
from lamina.config import LoraConfig
from lamina.engine.routing import Routing
from lamina.engine.variants.alora import invocation_offsets
from lamina.errors import ConfigError, FoldError, RoutingError, TargetError
from tests import models
from tests.adapters import fill
from tests.engine.adapters import adapt, layer_of

CALL = [5, 6]


def called(*starts: int | None, length: int = 12) -> Tensor:
    """Ids, a row for each start of an invocation; None for a row without one."""
    ids = models.token_ids(len(starts), length=length).clamp(min=7)
    for row, start in enumerate(starts):
        if start is not None:
            ids[row, start : start + 2] = torch.tensor(CALL)
    return ids


def model_of(**config: Any) -> lamina.PeftModel:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]}
    settings |= {"alora_invocation_tokens": CALL, "task_type": "CAUSAL_LM"}
    model = lamina.get_peft_model(models.tiny_llama(), LoraConfig(**settings | config))
    fill(model, seed=1)
    return model.eval()


def plain_lora() -> lamina.PeftModel:
    return model_of(alora_invocation_tokens=None)


# --- where an invocation begins ------------------------------------------------------------------


def slowly(row: Sequence[int], invocation: Sequence[int]) -> int | None:
    span = len(invocation)
    starts = [i for i in range(len(row)) if list(row[i : i + span]) == list(invocation)]
    return len(row) - starts[-1] if starts else None


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4),
    st.lists(st.integers(0, 2), min_size=1, max_size=7),
)
def test_the_last_invocation_is_found_in_each_row(
    rows: list[list[int]], invocation: list[int]
) -> None:
    found = invocation_offsets(torch.tensor(rows), invocation)
    assert found == [slowly(row, invocation) for row in rows]


# --- the forward ---------------------------------------------------------------------------------


def test_it_acts_from_the_last_invocation_on_and_nowhere_else() -> None:
    model = model_of()
    ids = called(3, None, 10)
    ids[0, 7:9] = torch.tensor(CALL)
    logits = model(input_ids=ids).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    changed = (logits != base).any(-1)
    for row, start in enumerate((7, 12, 10)):
        assert not changed[row, :start].any()
        assert changed[row, start:].all()


def test_in_one_layer_it_is_lora_where_it_acts() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    state = adapt(model, target_modules=["layer"], r=2, alora_invocation_tokens=CALL)
    layer = layer_of(model, "layer")
    with models.seeded(2):
        x = torch.randn(2, 5, 6)
    base = layer.base_layer(x)
    lora = base + layer.update("default", x)
    for offsets in ([2, None], [5, 1], [9, 3]):
        with state.routed(Routing(offsets={"default": offsets})):
            result = layer(x)
        assert torch.equal(layer(x, alora_offsets=offsets), result)
        for row, offset in enumerate(offsets):
            start = 5 - min(offset or 0, 5)
            assert torch.equal(result[row, :start], base[row, :start])
            assert torch.equal(result[row, start:], lora[row, start:])
    # A batch of vectors is one of single tokens.
    flat = layer(x[:, 0], alora_offsets=[1, None])
    assert torch.equal(flat, torch.stack([lora[0, 0], base[1, 0]]))


def test_without_offsets_the_base_answers_and_gradients_are_zero() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    adapt(model, target_modules=["layer"], alora_invocation_tokens=CALL)
    layer, x = layer_of(model, "layer"), torch.ones(1, 3, 6)
    result = layer(x)
    assert torch.equal(result, layer.base_layer(x))
    result.sum().backward()
    for parameter in layer.trained_parameters("default"):
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_given_offsets_go_before_those_that_are_found() -> None:
    model, lora = model_of(), plain_lora()
    ids = called(3, None)
    wanted = lora(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids, alora_offsets=[12, 12]).logits, wanted)
    with pytest.raises(RoutingError, match="alora_offsets for 3 rows, and 2 rows in the batch"):
        model(input_ids=ids, alora_offsets=[1, 2, 3])


def test_embeddings_hide_the_invocation_which_is_told() -> None:
    model = model_of()
    embeds = model.get_input_embeddings()(called(3))
    with pytest.warns(UserWarning, match="when only inputs_embeds are provided"):
        result = model(inputs_embeds=embeds).logits
    with model.disable_adapter():
        assert torch.equal(result, model(inputs_embeds=embeds).logits)


def test_two_adapters_each_wait_for_their_own_invocation() -> None:
    model = model_of()
    other = LoraConfig(r=2, target_modules=["v_proj"], alora_invocation_tokens=[4])
    model.add_adapter("other", other)
    fill(model, "other", seed=2)
    ids = called(6).clone()
    ids[0, 2] = 4
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(input_ids=ids).logits
    model.set_adapter(["default", "other"])
    both = model(input_ids=ids).logits
    # Between the two invocations only the other one acts.
    assert torch.equal(both[:, :6], alone["other"][:, :6])
    assert not torch.equal(both[:, 6:], alone["other"][:, 6:])
    with model.disable_adapter():
        assert torch.equal(alone["default"][:, :6], model(input_ids=ids).logits[:, :6])


# --- training ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_recomputed_layers_act_as_in_their_own_forward() -> None:
    """Two forwards before the backward: each is computed again with its own invocations."""

    def gradients(recompute: bool) -> list[Tensor]:
        model = model_of().train()
        if recompute:
            model.gradient_checkpointing_enable()
        batches = [called(3, 5), called(None, 9)]
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in batches]
        assert model.adapter_state.routing is None
        torch.stack(losses).sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other)


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_a_cache_makes_no_difference(how: dict[str, Any]) -> None:
    """What comes after the invocation keeps the adapter; a row without one stays the base's."""
    model = model_of()
    ids = called(3, None, 10)
    cached = model.generate(input_ids=ids, max_new_tokens=8, **how)
    assert torch.equal(
        cached, model.generate(input_ids=ids, max_new_tokens=8, use_cache=False, **how)
    )
    with model.disable_adapter():
        base = model.generate(input_ids=ids, max_new_tokens=8, **how)
    assert torch.equal(cached[1], base[1])
    assert not torch.equal(cached[0], base[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_is_generated_as_if_it_were_alone(beams: int) -> None:
    model = model_of()
    ids = called(3, None, 10)
    together = model.generate(ids, max_new_tokens=6, num_beams=beams)
    for row, prompt in enumerate(ids):
        alone = model.generate(prompt.unsqueeze(0), max_new_tokens=6, num_beams=beams)[0]
        assert torch.equal(together[row, : len(alone)], alone)


def test_generated_tokens_are_those_of_lora_when_the_prompt_is_the_invocation() -> None:
    ids = torch.tensor([CALL])
    mine, lora = (m.generate(input_ids=ids, max_new_tokens=8) for m in (model_of(), plain_lora()))
    assert torch.equal(mine, lora)


# --- what is refused -----------------------------------------------------------------------------


def test_it_is_no_weight_to_fold() -> None:
    model = model_of()
    with pytest.raises(FoldError, match="aLoRA does not support merging"):
        model.merge_adapter()
    assert not model.adapter_state.folded_layers


@pytest.mark.parametrize("tokens", [[], [1.5], "abc", [-1]])
def test_an_invocation_is_a_list_of_token_ids(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="a list of token ids, at least one"):
        LoraConfig(alora_invocation_tokens=tokens)


def test_it_is_not_combined_with_dora() -> None:
    with pytest.raises(ConfigError, match="Invalid or unsupported variant combination"):
        LoraConfig(alora_invocation_tokens=CALL, use_dora=True)


def test_only_linear_layers_have_tokens_in_a_row() -> None:
    with pytest.raises(TargetError, match="ALora is made for linear layers"):
        adapt(models.embedding_net(), target_modules=["embed"], alora_invocation_tokens=CALL)
