from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.targets import Plan, find_all_linear_names, layer_index, make_plan
from lamina.errors import TargetError, UnsupportedFieldError, UnsupportedTargetError
from tests import models
from tests.adapters import weights
from tests.engine.adapters import adapt, adapted_names, assert_same

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
NOT_ADAPTED = "there are modules of that name, but none that this adapter adapts"
MLP = ["down_proj", "gate_proj", "up_proj"]


def plan(model: nn.Module, *, strict: bool = True, **config: Any) -> Plan:
    return make_plan(model, LoraConfig(**config), strict=strict)


def names(found: Plan) -> list[str]:
    return [layer.name for layer in found.layers]


def in_layers(*indices: int, leaves: list[str]) -> list[str]:
    parts = [(f"self_attn.{x}" if x in ATTENTION else f"mlp.{x}") for x in leaves]
    return [f"model.layers.{i}.{part}" for i in indices for part in parts]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, in_layers(0, 1, leaves=["q_proj", "v_proj"])),
        ({"target_modules": ["self_attn.q_proj"]}, in_layers(0, 1, leaves=["q_proj"])),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, in_layers(1, leaves=["up_proj"])),
        ({"target_modules": r".*\.1\..*(q|k)_proj"}, in_layers(1, leaves=["q_proj", "k_proj"])),
        # A regular expression is for the whole name, a listed one ends at a dot.
        ({"target_modules": r"model\.layers\.0\.mlp\.up_proj"}, in_layers(0, leaves=["up_proj"])),
        ({"target_modules": "all-linear"}, in_layers(0, 1, leaves=ATTENTION + MLP)),
        ({"target_modules": "ALL-Linear"}, in_layers(0, 1, leaves=ATTENTION + MLP)),
        (
            {"target_modules": "all-linear", "exclude_modules": ["q_proj", "mlp.up_proj"]},
            in_layers(0, 1, leaves=["k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
            in_layers(1, leaves=["q_proj"]),
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1},
            in_layers(1, leaves=["q_proj"]),
        ),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [0],
                "layers_pattern": ["h", "layers"],
            },
            in_layers(0, leaves=["q_proj"]),
        ),
        ({"target_modules": None}, in_layers(0, 1, leaves=["q_proj", "v_proj"])),
    ],
    ids=lambda value: str(value.get("target_modules")) if isinstance(value, dict) else "",
)
def test_patterns_mean_these_layers(config: dict[str, Any], expected: list[str]) -> None:
    model = models.tiny_llama()
    assert sorted(names(plan(model, **config))) == sorted(expected)


def test_a_redundant_pattern_counts_what_it_matches() -> None:
    found = plan(models.tiny_llama(), target_modules=["q_proj", "self_attn.q_proj"])
    assert names(found) == in_layers(0, 1, leaves=["q_proj"])
    assert found.counts == {"q_proj": 2, "self_attn.q_proj": 2}


def test_ranks_and_alphas_are_looked_up_by_ending_or_expression() -> None:
    found = plan(
        models.tiny_llama(),
        target_modules="all-linear",
        r=8,
        lora_alpha=16,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 4, "up_proj": 2, r".*\.1\..*k_proj": 3},
        alpha_pattern={"up_proj": 5, "q_proj": 6},
    )
    numbers = {layer.name: (layer.record.r, layer.record.lora_alpha) for layer in found.layers}
    assert numbers["model.layers.0.self_attn.q_proj"] == (4, 6)
    assert numbers["model.layers.1.self_attn.q_proj"] == (8, 6)
    assert numbers["model.layers.1.self_attn.k_proj"] == (3, 16)
    assert numbers["model.layers.0.self_attn.k_proj"] == (8, 16)
    assert numbers["model.layers.1.mlp.up_proj"] == (2, 5)
    record = next(layer.record for layer in found.layers if layer.name.endswith("up_proj"))
    assert record.scaling == 2.5


def test_a_pattern_is_matched_at_a_dot_only() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    assert names(plan(model, target_modules=["proj"])) == ["proj"]
    found = plan(model, target_modules=["proj", "q_proj"], rank_pattern={"proj": 2})
    assert {layer.name: layer.record.r for layer in found.layers} == {"proj": 2, "q_proj": 8}


def test_all_that_matches_nothing_is_listed_at_once_with_what_is_nearest() -> None:
    with pytest.raises(TargetError) as caught:
        plan(
            models.tiny_llama(),
            target_modules=["q_prj", "v_proj", "FAKE"],
            exclude_modules=["up_pro"],
            modules_to_save=["lm_haed"],
            rank_pattern={"vv_proj": 3},
            alpha_pattern={"k_proj": 3},
        )
    assert not isinstance(caught.value, UnsupportedTargetError)
    assert caught.value.faults == (
        "target_modules: 'FAKE' matched 0 modules",
        "target_modules: 'q_prj' matched 0 modules; nearest: 'q_proj'",
        "exclude_modules: 'up_pro' matched 0 modules; nearest: 'up_proj'",
        "modules_to_save: 'lm_haed' matched 0 modules; nearest: 'lm_head'",
        "rank_pattern: 'vv_proj' matched 0 modules; nearest: 'v_proj'",
        f"alpha_pattern: 'k_proj' matched 0 modules; {NOT_ADAPTED}",
    )
    assert "all-linear" in str(caught.value.cure)


def test_a_shadowed_entry_is_told_apart_from_one_that_matches_nothing() -> None:
    with pytest.raises(TargetError) as caught:
        plan(
            models.tiny_llama(),
            target_modules=["q_proj"],
            rank_pattern={"q_proj": 4, "layers.0.*": 2},
        )
    (fault,) = caught.value.faults
    assert fault == "rank_pattern: 'layers.0.*' has no effect, since earlier entries match first"


@pytest.mark.parametrize("index", [7, [0, 7]])
def test_layers_that_are_not_there_are_a_fault(index: int | list[int]) -> None:
    with pytest.raises(TargetError, match=r"layers_to_transform has \[7\].*layers 0 to 1"):
        plan(models.tiny_llama(), target_modules=["q_proj"], layers_to_transform=index)


def test_a_regular_expression_that_matches_nothing_is_a_fault() -> None:
    with pytest.raises(TargetError, match=r"'.*Q_PROJ' matched 0 modules"):
        plan(models.tiny_llama(), target_modules=".*Q_PROJ")


def test_without_strict_patterns_may_match_nothing() -> None:
    found = plan(models.tiny_llama(), target_modules=["q_proj", "FAKE"], strict=False)
    assert names(found) == in_layers(0, 1, leaves=["q_proj"])


def test_dropouts_are_refused_by_name_and_pattern() -> None:
    model = models.tiny_bert_classifier()
    before = weights(model)
    with pytest.raises(UnsupportedTargetError) as caught:
        adapt(model, target_modules=["query", "dropout", "wxyz"])
    hit = "bert.encoder.layer.0.attention.self.dropout (Dropout), hit by 'dropout'"
    lines = [fault for fault in caught.value.faults if fault.startswith(hit)]
    assert lines
    assert "lora_dropout" in lines[0]
    # What matches nothing is in the same error, and so are the linear layers that exist.
    assert "target_modules: 'wxyz' matched 0 modules" in caught.value.faults
    assert "'query'" in str(caught.value.cure)
    assert "'all-linear'" in str(caught.value.cure)
    assert adapted_names(model) == set()
    assert_same(before, weights(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ReLU(), "has no weights to adapt"),
        (nn.LayerNorm(4), "is no linear, embedding or convolution layer"),
        (nn.Sequential(nn.Linear(4, 4)), "is a container; name the layers in it"),
        (nn.ConvTranspose1d(2, 2, 3), "is no linear, embedding or convolution layer"),
        (nn.Bilinear(2, 2, 2), "is no linear, embedding or convolution layer"),
    ],
)
def test_what_can_not_be_adapted_is_said_with_the_reason(module: nn.Module, reason: str) -> None:
    model = nn.ModuleDict({"hit": module, "fc": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedTargetError) as caught:
        plan(model, target_modules=["hit", "fc"])
    kind = type(module).__name__
    assert caught.value.faults == (f"hit ({kind}), hit by 'hit', {reason}",)


def test_many_hits_of_one_kind_are_counted_not_all_printed() -> None:
    model = nn.Sequential(*[nn.Dropout() for _ in range(30)], nn.Linear(2, 2))
    with pytest.raises(UnsupportedTargetError, match=r"hits 30 module\(s\)") as caught:
        plan(model, target_modules=r"\d+")
    assert len(caught.value.faults) < 12
    assert any("22 more" in fault for fault in caught.value.faults)


def test_an_unknown_initialisation_is_refused_before_anything() -> None:
    model = models.perceptron()
    with pytest.raises(UnsupportedFieldError, match="'pizza'"):
        adapt(model, target_modules=["up"], init_lora_weights="pizza")
    assert adapted_names(model) == set()


def test_a_rank_has_to_be_a_multiple_of_the_groups() -> None:
    with pytest.raises(TargetError, match="grouped is a convolution with 2 groups"):
        plan(models.convolution_net(2), target_modules=["stem", "grouped"], r=3)


def test_an_embedding_can_not_have_a_lora_bias() -> None:
    with pytest.raises(TargetError, match="embed is an embedding"):
        plan(models.embedding_net(), target_modules=["embed"], lora_bias=True)


# --- find_all_linear_names --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected", "head"),
    [
        (models.tiny_llama, sorted(ATTENTION + MLP), ["lm_head"]),
        (models.tiny_gpt2, ["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"], ["lm_head"]),
        (
            models.tiny_bert_classifier,
            ["intermediate.dense", "key", "output.dense", "pooler.dense", "query", "value"],
            ["classifier"],
        ),
        (models.perceptron, ["down", "up"], []),
    ],
    ids=["llama", "gpt2", "bert", "perceptron"],
)
def test_all_linear_names_are_the_same_before_and_after_adapting(
    make: Any, expected: list[str], head: list[str]
) -> None:
    model = make()
    plain = find_all_linear_names(model)
    with_head = find_all_linear_names(model, include_head=True)
    targeted = plan(model, target_modules=plain)
    assert _same_meaning(model, plain, expected)
    assert sorted(with_head) == sorted([*plain, *head])
    adapt(model, "one", target_modules=plain)
    adapt(model, "two", target_modules=plain[:1], modules_to_save=head or None)
    assert find_all_linear_names(model) == plain
    assert find_all_linear_names(model, include_head=True) == with_head
    assert names(plan(model, target_modules=find_all_linear_names(model))) == names(targeted)
    for internal in ("default", "base_layer", "lora_A", "lora_B", "original_module"):
        assert internal not in ".".join(find_all_linear_names(model, include_head=True))


def _same_meaning(model: nn.Module, found: list[str], expected: list[str]) -> bool:
    return names(plan(model, target_modules=found)) == names(plan(model, target_modules=expected))


def test_all_linear_and_the_names_mean_the_same_layers() -> None:
    for model in (models.tiny_llama(), models.tiny_gpt2(), models.tiny_bert_classifier()):
        spelt = plan(model, target_modules=find_all_linear_names(model))
        assert names(spelt) == names(plan(model, target_modules="all-linear"))


def test_numbers_that_also_mean_other_modules_get_longer_names() -> None:
    block = OrderedDict([("0", nn.Linear(4, 4)), ("1", nn.ReLU()), ("2", nn.Linear(4, 4))])
    model = nn.Sequential(nn.Sequential(block), nn.ReLU(), nn.Linear(4, 4))
    found = find_all_linear_names(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert linear == ["0.0", "0.2", "2"]
    assert names(plan(model, target_modules=found)) == linear


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 2),
    "relu": nn.ReLU,
    "norm": lambda: nn.LayerNorm(2),
}
trees = st.recursive(
    st.sampled_from(sorted(KINDS)),
    lambda inner: st.dictionaries(st.sampled_from(["0", "1", "proj", "mlp"]), inner, min_size=1),
    max_leaves=12,
)


def grown(tree: Any) -> nn.Module:
    if isinstance(tree, str):
        return KINDS[tree]()
    return nn.ModuleDict({name: grown(inner) for name, inner in tree.items()})


@given(st.dictionaries(st.sampled_from(["0", "1", "proj", "mlp"]), trees, min_size=1))
def test_the_names_mean_all_linears_of_any_tree_and_nothing_else(tree: Any) -> None:
    model = grown(tree)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    others = [n for n, m in model.named_modules() if n and not isinstance(m, nn.Linear)]
    # What no list of endings can tell apart.
    assume(linear and not any(o.endswith(f".{n}") for o in others for n in linear))
    found = find_all_linear_names(model)
    assert names(plan(model, target_modules=found)) == linear
    adapt(model, target_modules=found)
    assert find_all_linear_names(model) == found
    assert names(plan(model, target_modules=found)) == linear


def test_quantised_linears_count() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict(
        {
            "four": bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32),
            "eight": bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
            "norm": nn.LayerNorm(64),
        }
    )
    assert find_all_linear_names(model) == ["eight", "four"]
    adapt(model, target_modules=["four", "eight"])
    assert find_all_linear_names(model) == ["eight", "four"]


class Packed(nn.Module):
    """Like the linears of GPTQ and AWQ: no nn.Linear, its weight in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.register_buffer("qweight", torch.zeros(2, 6, dtype=torch.int32))


def test_linears_of_unknown_make_are_known_by_their_sizes() -> None:
    model = nn.ModuleDict({"packed": Packed(), "fc": nn.Linear(4, 4)})
    assert find_all_linear_names(model) == ["fc", "packed"]


def test_attention_is_left_out_of_all_linear() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert find_all_linear_names(layer) == ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("model.layers.3.mlp.up", None, 3),
        ("layers.3.mlp.up", None, 3),
        ("transformer.h.12.attn", None, 12),
        ("model.layers.1.experts.5.w1", None, 1),
        ("model.layers.1.experts.5.w1", "experts", 5),
        ("model.layers.1.mlp.up", ["h", "layers"], 1),
        ("model.layers.1.mlp.up", "h", None),
        ("model.norm", None, None),
    ],
)
def test_the_index_of_a_layer(name: str, pattern: Any, index: int | None) -> None:
    assert layer_index(name, pattern) == index


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        ({"target_modules": ["down"]}, {"modules_to_save": ["down"]}, "would cover down, which"),
        ({"modules_to_save": ["down"]}, {"target_modules": ["down"]}, "down would have no effect"),
    ],
)
def test_one_adapter_can_not_cover_what_another_adapts(
    first: dict[str, Any], second: dict[str, Any], fault: str
) -> None:
    model = models.perceptron()
    adapt(model, "one", **{"target_modules": ["up"], **first})
    before = weights(model)
    for strict in (True, False):
        with pytest.raises(TargetError, match=fault):
            adapt(model, "two", strict=strict, **{"target_modules": ["up"], **second})
    assert_same(before, weights(model))


def test_modules_trained_whole_are_not_nested() -> None:
    model = nn.ModuleDict({"head": nn.ModuleDict({"head": nn.Linear(2, 2)}), "fc": nn.Linear(2, 2)})
    found = plan(model, target_modules=["fc"], modules_to_save=["head"])
    assert found.saved == ("head",)
