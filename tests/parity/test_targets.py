from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from torch import nn

import lamina
from tests import models
from tests.parity.pairs import targets_of_lamina, targets_of_peft, trained

# What peft warns of is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

MAKE: dict[str, Callable[[], nn.Module]] = {
    "llama": models.tiny_llama,
    "gpt2": models.tiny_gpt2,
    "bert": models.tiny_bert_classifier,
}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": "all-linear"}),
    (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
    ),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.1\..*proj"}),
    ("llama", {"target_modules": r".*self_attn.*proj$", "exclude_modules": ["o_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}),
    (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "layers"]},
    ),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": ["mlp.c_proj", "wte"]}),
    ("gpt2", {"target_modules": ["c_proj"], "exclude_modules": ["attn.c_proj"]}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": r"transformer\.h\.\d+\.attn\.c_.*"}),
    ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": [0, 1]}),
    ("bert", {}),
    ("bert", {"target_modules": ["query", "key"], "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}),
    ("bert", {"target_modules": ["attention.output.dense"]}),
    ("bert", {"target_modules": ["word_embeddings", "classifier"]}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]}),
    ("bert", {"target_modules": ["value"], "layers_to_transform": 1, "layers_pattern": "layer"}),
]


@pytest.mark.parametrize(("kind", "config"), CONFIGS, ids=str)
def test_the_same_layers_are_adapted_and_the_same_parameters_train(
    kind: str, config: dict[str, Any]
) -> None:
    ours = lamina.get_peft_model(MAKE[kind](), lamina.LoraConfig(**config))
    theirs = peft.get_peft_model(MAKE[kind](), peft.LoraConfig(**config))
    assert targets_of_lamina(ours) == targets_of_peft(theirs) != set()
    assert trained(ours).keys() == trained(theirs).keys()
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    for name, parameter in trained(theirs).items():
        assert trained(ours)[name].shape == parameter.shape, name


RANKS: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 2, "up_proj": 3}},
    {"rank_pattern": {r"layers\.0\..*": 2, "q_proj": 3}},
    {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 5}},
    {"rank_pattern": {r".*\.(q|k)_proj": 2, r"model\.layers\.\d\.mlp\.up_proj": 6}},
    {"rank_pattern": {"self_attn.q_proj": 7}, "use_rslora": True},
    {"alpha_pattern": {"v_proj": 3, r"layers\.1\.mlp\..*": 32}, "lora_alpha": 16},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2, "up_proj": 1}},
]


@pytest.mark.parametrize("config", RANKS, ids=str)
def test_the_same_ranks_and_scalings(config: dict[str, Any]) -> None:
    config = {"target_modules": "all-linear", **config}
    ours = lamina.get_peft_model(models.tiny_llama(), lamina.LoraConfig(**config))
    theirs = peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(**config))
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            mine = ours.get_submodule(name)
            assert mine.r["default"] == module.r["default"], name
            assert mine.scaling["default"] == module.scaling["default"], name


def test_names_that_end_alike_are_kept_apart() -> None:
    def make() -> nn.Module:
        leaves = ("proj", "q_proj", "proj2", "proj_out")
        return nn.ModuleDict({"block": nn.ModuleDict({n: nn.Linear(2, 2) for n in leaves})})

    for targets in (["proj"], ["proj", "q_proj"], r".*proj", r".*proj.*", ["block.proj2", "proj"]):
        config: dict[str, Any] = {"target_modules": targets, "rank_pattern": {"proj": 1}}
        ours = lamina.get_peft_model(make(), lamina.LoraConfig(**config))
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**config))
        assert targets_of_lamina(ours) == targets_of_peft(theirs)
        shapes = [{n: p.shape for n, p in trained(model).items()} for model in (ours, theirs)]
        assert shapes[0] == shapes[1]
