"""Fused experts and other parameters adapted by themselves, against the real peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import lamina
from tests import models
from tests.parity.pairs import add, answer, assert_close, fill, gradients, pair

IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 6, 1, 2]])
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAKES: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**_SIZES)),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**_SIZES, num_experts_per_tok=2)
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **_SIZES,
            intermediate_size_mlp=24,
            interleave_moe_layer_step=1,
            attn_implementation="eager",
        )
    ),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def make(kind: str, how: str | None = None) -> nn.Module:
    with models.seeded(0):
        model = _MAKES[kind]().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    if how is not None:
        model.set_experts_implementation(how)
    return model


CASES = [
    ("mixtral", "eager"),
    ("mixtral", "batched_mm"),
    ("mixtral", "grouped_mm"),
    ("gpt_oss", "eager"),
    ("gpt_oss", "batched_mm"),
    ("gpt_oss", "grouped_mm"),
    ("llama4", None),
]


# peft warns of the pattern, and honours it.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_experts_answer_and_learn_as_in_peft(kind: str, how: str | None) -> None:
    config: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": [],
        "target_parameters": BOTH,
        "rank_pattern": {"experts.down_proj": 2},
    }
    ours, theirs = pair(lambda: make(kind, how), **config)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    assert_close(answer(ours, IDS), answer(theirs, IDS), 1e-5)
    mine, other = gradients(ours, IDS), gradients(theirs, IDS)
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        assert_close(mine[name], gradient, 1e-4)


def test_files_open_in_both_directions(tmp_path: Path) -> None:
    ours, theirs = pair(lambda: make("mixtral"), r=3, target_modules=[], target_parameters=BOTH)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected = answer(theirs, IDS)
    opened = lamina.PeftModel.from_pretrained(make("mixtral"), tmp_path / "theirs").eval()
    assert_close(answer(opened, IDS), expected, 1e-5)
    reopened = peft.PeftModel.from_pretrained(make("mixtral"), tmp_path / "ours").eval()
    assert torch.equal(answer(reopened, IDS), expected)


def test_several_adapters_fold_and_unfold_exactly() -> None:
    config: dict[str, Any] = {"target_modules": [], "target_parameters": BOTH}
    ours, theirs = pair(lambda: make("mixtral"), r=3, **config)
    add(ours, theirs, "second", r=2, **config)
    expected = answer(theirs, IDS)
    assert_close(answer(ours, IDS), expected, 1e-5)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.merge_adapter()
    assert_close(answer(ours, IDS), expected, 1e-5)
    ours.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_adapters_of_different_parameters_have_files_of_their_own(tmp_path: Path) -> None:
    ours = lamina.get_peft_model(
        make("mixtral"), lamina.LoraConfig(r=2, target_modules=[], target_parameters=BOTH[:1])
    )
    config = lamina.LoraConfig(
        r=2, target_modules=[], target_parameters=BOTH, init_lora_weights=False
    )
    ours.add_adapter("both", config)
    ours.set_adapter("both")
    ours.save_pretrained(tmp_path)
    alone = peft.PeftModel.from_pretrained(make("mixtral"), tmp_path / "both").eval()
    assert_close(answer(ours.eval(), IDS), answer(alone, IDS), 1e-5)


class _Scaled(nn.Module):
    """A parameter that is used otherwise than in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.exp().sum(1)


class _Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("parametrized", [False, True])
def test_any_use_of_a_parameter_sees_the_sum(parametrized: bool) -> None:
    def holder() -> nn.Module:
        model = _Holder()
        if parametrized:
            nn.utils.parametrize.register_parametrization(model.inner, "weight", nn.Tanh())
        return model

    ours, theirs = pair(holder, r=2, target_modules=[], target_parameters=["inner.weight"])
    x = torch.randn(2, 4)
    assert_close(ours(x), theirs(x), 1e-5)
    mine, other = gradients(ours, x), gradients(theirs, x)
    for name, gradient in other.items():
        assert_close(mine[name], gradient, 1e-5)


def test_bf16_experts_stay_near_peft() -> None:
    config: dict[str, Any] = {"r": 3, "target_modules": [], "target_parameters": BOTH}
    ours, theirs = pair(lambda: make("mixtral").bfloat16(), **config)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    fill(ours, theirs, 3)
    assert_close(answer(ours, IDS).float(), answer(theirs, IDS).float(), 0.05)


def test_a_file_of_separate_experts_is_told_apart() -> None:
    ours = lamina.get_peft_model(make("mixtral"), lamina.LoraConfig(target_modules=["q_proj"]))
    tensors = {
        f"base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_{side}.weight": tensor
        for side, tensor in (("A", torch.zeros(8, 32)), ("B", torch.zeros(24, 8)))
    }
    with pytest.raises(lamina.errors.KeyMismatchError, match="fused the weights of experts"):
        lamina.set_peft_model_state_dict(ours, tensors)
