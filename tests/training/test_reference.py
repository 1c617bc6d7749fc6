"""The reference is the same model, and answers as the stage that it refers to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.training.reference import reference_of
from tests import models
from tests.stages.chains import fill_trainable, llama_lora, run_chain

IDS = models.token_ids()


def log_probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits, -1)


def loaded(path: Path) -> torch.Tensor:
    return log_probabilities(lamina.load(path, models.tiny_llama()))


def began(parent: Path, mode: str, name: str = "own", **changes: Any) -> Any:
    config = None if mode == "continue" else llama_lora(r=3, **changes)
    model = lamina.begin_stage(
        models.tiny_llama(), name=name, parent=parent, mode=mode, config=config
    )
    return model.train()


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """a -> b -> c: ranks of a, then of b, which c trained on."""
    stages = [
        ("a", None, llama_lora()),
        ("b", "stack", llama_lora(r=2, lora_dropout=0.5, lora_alpha=3)),
        ("c", "continue", None),
    ]
    return run_chain(tmp_path, stages)[1]


def state_of(model: Any) -> tuple[Any, ...]:
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    modes = [module.training for module in model.modules()]
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    return model.active_adapters, trains, modes, drops


@pytest.mark.parametrize("mode", ["stack", "continue", "merge"])
def test_it_answers_as_the_parent_while_the_stage_trains_away(mode: str, chain: Path) -> None:
    model = began(chain, mode)
    reference = reference_of(model, chain)
    fill_trainable(model, seed=9)
    model.get_base_model().model.layers[0].self_attn.attention_dropout = 0.5
    before, drawn = state_of(model), torch.get_rng_state()
    answer = log_probabilities(reference)
    torch.testing.assert_close(answer, loaded(chain), atol=2e-6, rtol=0)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.allclose(log_probabilities(model.eval()), answer, atol=1e-3)


@pytest.mark.parametrize("mode", ["stack", "continue", "merge"])
def test_the_base_is_a_reference_too(mode: str, chain: Path) -> None:
    model = began(chain, mode)
    fill_trainable(model, seed=9)
    answer = log_probabilities(reference_of(model, None))
    assert torch.equal(answer, log_probabilities(models.tiny_llama()))


@pytest.mark.parametrize("mode", ["stack", "continue"])
@pytest.mark.parametrize("stage", ["a", "b"])
def test_an_earlier_stage_is_the_reference_as_it_was(mode: str, stage: str, chain: Path) -> None:
    model = began(chain, mode)
    fill_trainable(model, seed=9)
    reference = reference_of(model, chain.parent / stage)
    expected = loaded(chain.parent / stage)
    torch.testing.assert_close(log_probabilities(reference), expected, atol=2e-6, rtol=0)


def test_an_earlier_stage_is_refused_where_it_is_folded_in(chain: Path) -> None:
    with pytest.raises(lamina.StageError, match="'a' can't be the reference"):
        reference_of(began(chain, "merge"), chain.parent / "a")


def test_a_stage_of_another_chain_is_refused(chain: Path, tmp_path: Path) -> None:
    other = run_chain(tmp_path, [("other", None, llama_lora())])[1]
    with pytest.raises(lamina.StageError, match="no part of the chain"):
        reference_of(began(chain, "stack"), other)


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_a_changed_base_is_the_references_too(mode: str, tmp_path: Path) -> None:
    """PiSSA moves weights out of the base; the reference has them where its stage had."""
    config = llama_lora(init_lora_weights="pissa")
    _, parent = run_chain(tmp_path, [("a", None, config)])
    model = began(parent, mode)
    reference = reference_of(model, parent)
    fill_trainable(model, seed=9)
    torch.testing.assert_close(log_probabilities(reference), loaded(parent), atol=2e-5, rtol=0)


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_modules_trained_whole_are_the_parents(mode: str, tmp_path: Path) -> None:
    config = llama_lora(modules_to_save=["lm_head"])
    _, parent = run_chain(tmp_path, [("a", None, config)])
    changes = {} if mode == "continue" else {"modules_to_save": ["lm_head"]}
    model = began(parent, mode, **changes)
    reference = reference_of(model, parent)
    fill_trainable(model, seed=9)
    torch.testing.assert_close(log_probabilities(reference), loaded(parent), atol=2e-6, rtol=0)


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_the_saved_stage_knows_nothing_of_the_reference(
    mode: str, chain: Path, tmp_path: Path
) -> None:
    model = began(chain, mode)
    fill_trainable(model, seed=9)
    lamina.save_stage(model, tmp_path / "without")
    reference_of(model, chain)
    lamina.save_stage(model, tmp_path / "with")
    weights = [tmp_path / each / "adapter_model.safetensors" for each in ("without", "with")]
    first, second = (lamina.load(each.parent, models.tiny_llama()) for each in weights)
    for (name, mine), (other, theirs) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs)
