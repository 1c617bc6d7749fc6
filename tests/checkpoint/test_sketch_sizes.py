"""Quantised bases, large ones, and what a sketch costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from lamina.checkpoint.sketch import FileWeights, compare
from lamina.checkpoint.sketch.memory import ModelWeights, sketch_model
from lamina.checkpoint.sketch.stored import samples
from lamina.engine.names import places
from tests import models, quantised
from tests.checkpoint.sketching import TINY, moved, told

# --- quantised -----------------------------------------------------------------------------------


def quantised_llama(kind: str, seed: int = 0) -> nn.Module:
    model = wider_llama(seed)
    for place in list(places(model)):
        if isinstance(place.module, nn.Linear) and place.name != "lm_head":
            assert place.parent is not None
            setattr(place.parent, place.child, quantised.KINDS[kind](place.module))
    return model


def wider_llama(seed: int = 0) -> nn.Module:
    return models.tiny_llama(seed, hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_a_quantised_base(kind: str) -> None:
    packed = quantised_llama(kind)
    likeness = told(wider_llama(), packed)
    assert (likeness.verdict, likeness.ok) == ("quantised", True)
    assert likeness.correlation is not None
    assert likeness.correlation > 0.98
    assert "instead of dense (correlation" in likeness.sentence
    back = told(packed, wider_llama())
    assert (back.verdict, back.ok) == ("quantised", True)
    assert "but dense instead of" in back.sentence
    assert told(packed, quantised_llama(kind)).verdict == "same"
    assert told(wider_llama(), quantised_llama(kind, seed=1)).verdict == "other"


def test_a_quantised_base_of_other_linear_layers() -> None:
    # All that is dense is the same: only the codes can tell.
    other = quantised_llama("nf4", seed=1)
    state = {n: p for n, p in wider_llama().state_dict().items() if "_proj" not in n}
    other.load_state_dict(state, strict=False)
    likeness = told(wider_llama(), other)
    assert (likeness.verdict, likeness.ok) == ("other", False)
    assert "8 of 15 weights have other values" in likeness.sentence


def test_a_quantised_relative_is_known_by_what_is_dense() -> None:
    relative = quantised_llama("nf4")
    moved(relative, TINY, "embed_tokens")
    assert told(wider_llama(), relative).verdict == "other"


def test_another_quantiser() -> None:
    likeness = told(quantised_llama("nf4"), quantised_llama("bnb-int8"))
    assert likeness.verdict == "quantised"
    assert "bitsandbytes int8 instead of bitsandbytes nf4" in likeness.sentence


def test_a_quantiser_that_fails_hides_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> Any:
        raise RuntimeError("no kernel for this device")

    sketch = sketch_model(quantised_llama("nf4"))
    with monkeypatch.context() as patched:
        patched.setattr("lamina.engine.weights.bnb.Bnb4bitWeight.read", fail)
        blind = sketch_model(quantised_llama("nf4"))
        for recorded in (sketch, sketch_model(wider_llama())):
            likeness = told(recorded, quantised_llama("nf4"))
            assert likeness.verdict == "same"
            assert "of its weights can't be" in likeness.sentence
        assert told(sketch, quantised_llama("nf4", seed=1)).verdict == "other"
    assert told(blind, quantised_llama("nf4")).verdict == "same"


def test_codes_in_files_are_not_compared(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    dense = wider_llama()
    state: dict[str, Tensor] = dict(dense.state_dict())
    for name in [n for n in state if "_proj" in n]:
        state[name] = torch.zeros(16, 1, dtype=torch.uint8)
        state[f"{name}.absmax"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors")
    likeness = compare(sketch_model(dense), FileWeights(tmp_path))
    assert likeness.verdict == "same"
    assert "14 of its weights can't be" in likeness.sentence


# --- size and speed ------------------------------------------------------------------------------


class Random:
    """The weights of a model on the meta device, made up."""

    whole, quantization = True, None

    def __init__(self, model: nn.Module) -> None:
        weights = ModelWeights(model)
        self.aliases = weights.aliases
        self.tensors = {
            name: type(each)(each.shape, "bfloat16") for name, each in weights.tensors.items()
        }

    def as_loaded(self) -> None: ...

    def read(self, wanted: Any) -> dict[str, Any]:
        generator = np.random.default_rng(0)
        return {
            name: generator.standard_normal(len(positions), dtype=np.float32)
            for name, positions in wanted.items()
        }


def test_a_sketch_of_a_large_model_is_small() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from lamina.checkpoint.sketch.sampling import sketch

    large = {
        291: (LlamaForCausalLM, LlamaConfig(num_hidden_layers=32, hidden_size=4096)),
        723: (LlamaForCausalLM, LlamaConfig(num_hidden_layers=80, hidden_size=8192)),
        531: (Qwen3MoeForCausalLM, Qwen3MoeConfig(num_hidden_layers=48, num_experts=128)),
    }
    for tensors, (kind, config) in large.items():
        with torch.device("meta"):
            model = kind(config)
        found = sketch(Random(model))
        assert len(samples(found)) == tensors
        assert found.samples >= 2
        assert len(found.model_dump_json()) < 6_000


def test_of_very_many_tensors_some_are_sampled() -> None:
    def build(seed: int) -> nn.Module:
        with models.seeded(seed):
            return nn.ModuleList(nn.Linear(3, 3) for _ in range(1_000))

    sketch = sketch_model(build(0))
    found = samples(sketch)
    assert len(found) == 2_000
    assert sum(sample.positions is not None for sample in found) == 1_024
    assert sketch.tensors == ("{0-999}.bias 3", "{0-999}.weight 3x3")
    assert len(sketch.model_dump_json()) < 8_000
    assert told(sketch, build(0)).sentence.endswith(
        "has the weights of 'someone/tiny', the recorded base"
    )
    assert told(sketch, build(1)).verdict == "other"


def test_a_sketch_takes_no_longer_than_a_look(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    began = time.perf_counter()
    sketch = sketch_model(model)
    assert compare(sketch, FileWeights(tmp_path)).verdict == "same"
    # 10 ms where nothing else runs; reading all of its 130 MB would take as long as that.
    assert time.perf_counter() - began < 1
