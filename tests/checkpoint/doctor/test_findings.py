"""Each check: an adapter with one fault has its finding, the same without the fault has none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.checkpoint.doctor import examine
from lamina.checkpoint.record import StageRecord
from tests.checkpoint.doctor.made import Change, Parts, chain, examined, key, plain
from tests.cli.made import chain_record


def config(**values: Any) -> Change:
    return lambda parts: parts.config.update(values)


def without(*names: str) -> Change:
    return lambda parts: [parts.config.pop(name) for name in names]


def put(name: str, *shape: int, value: float = 0.5) -> Change:
    return lambda parts: parts.tensors.update({name: torch.full(shape, value)})


def drop(part: str) -> Change:
    def change(parts: Parts) -> None:
        for name in [name for name in parts.tensors if part in name]:
            del parts.tensors[name]

    return change


def rename(old: str, new: str) -> Change:
    def change(parts: Parts) -> None:
        parts.tensors = {name.replace(old, new): t for name, t in parts.tensors.items()}

    return change


def edit(name: str, how: Callable[[torch.Tensor], Any]) -> Change:
    def change(parts: Parts) -> None:
        tensor = parts.tensors[name].clone()
        found = how(tensor)
        parts.tensors[name] = found if isinstance(found, torch.Tensor) else tensor

    return change


def every(side: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(parts: Parts) -> None:
        for name, tensor in parts.tensors.items():
            if f"lora_{side}" in name:
                parts.tensors[name] = how(tensor)

    return change


def both(*changes: Change) -> Change:
    return lambda parts: [change(parts) for change in changes]


def zeroed(name: str) -> Change:
    return edit(name, torch.zeros_like)


Q0A, Q0B = key(0, "q_proj", "A"), key(0, "q_proj", "B")
V3A = key(3, "v_proj", "A")


def nan_in(tensor: torch.Tensor) -> None:
    tensor[0, :2] = float("nan")
    tensor[1, 0] = float("inf")


def weak_rows(tensor: torch.Tensor) -> None:
    tensor[2:4] = 0


def weak_column(tensor: torch.Tensor) -> None:
    tensor[:, 1] *= 1e-9


def repeated(tensor: torch.Tensor) -> None:
    tensor[5] = 2 * tensor[1]


def one_rank(tensor: torch.Tensor) -> torch.Tensor:
    return torch.outer(tensor[:, 0], torch.ones(tensor.shape[1])) + 1e-4 * tensor


# (severity, code, how a plain adapter is changed, a part of the first place that it names)
PLAIN: list[tuple[str, str, Change, str]] = [
    ("error", "not-finite", edit(Q0A, nan_in), Q0A),
    ("error", "no-effect", every("B", torch.zeros_like), "layers.0.self_attn.q_proj"),
    ("error", "no-effect", every("A", torch.zeros_like), "layers.0.self_attn.q_proj"),
    ("warning", "zero-b", edit(Q0B, torch.zeros_like), "layers.0.self_attn.q_proj"),
    ("warning", "zero-a", edit(V3A, torch.zeros_like), "layers.3.self_attn.v_proj"),
    ("note", "dead-ranks", edit(Q0A, weak_rows), "2 of 8"),
    ("note", "dead-ranks", edit(Q0B, weak_column), "1 of 8"),
    (
        "warning",
        "ranks-repeated",
        both(edit(Q0A, repeated), edit(Q0B, lambda t: repeated(t.T))),
        "rank 5 is rank 1",
    ),
    ("note", "ranks-unused", every("B", one_rank), "of 8"),
    ("warning", "norm-outlier", edit(Q0B, lambda t: t * 1e4), "layers.0.self_attn.q_proj"),
    ("note", "over-float16", edit(V3A, lambda t: t * 1e6), V3A),
    ("note", "dtype-float64", edit(Q0A, torch.Tensor.double), Q0A),
    ("note", "dtype-mixed", edit(Q0A, torch.Tensor.bfloat16), "BF16 and F32"),
    ("warning", "dtype-float8", edit(Q0A, lambda t: t.to(torch.float8_e4m3fn)), Q0A),
    ("error", "dtype-unusable", edit(Q0A, lambda t: t.to(torch.int8)), Q0A),
    ("error", "no-tensors", drop("lora"), ""),
    ("error", "tensor-empty", put("base_model.model.lm_head.weight", 0), "lm_head"),
    ("error", "factor-missing", drop("layers.2.self_attn.q_proj.lora_A"), "layers.2"),
    ("error", "shapes-contradict", edit(Q0B, lambda t: t[:, :5]), "layers.0.self_attn.q_proj"),
    ("error", "shapes-contradict", edit(Q0A, lambda t: t[0]), "layers.0"),
    ("warning", "names-wrapped", rename("model.layers", "model._orig_mod.layers"), "_orig_mod"),
    ("warning", "names-with-adapter", rename(".weight", ".default.weight"), "default"),
    ("error", "names-nested", rename("base_model.model.", "base_model.model." * 2), "base_model"),
    ("warning", "prefix-missing", rename("base_model.model.", ""), "model.layers"),
    ("error", "names-of-another-tool", rename("lora_A.weight", "lora_down.weight"), "lora_down"),
    ("error", "names-of-another-tool", rename("lora_A.weight", "lora_a"), "lora_a"),
    ("error", "companion-missing", config(use_dora=True), "layers.0"),
    (
        "error",
        "companion-unasked",
        put(Q0A.replace("lora_A.weight", "lora_magnitude_vector"), 32),
        "layers.0",
    ),
    ("error", "companion-missing", config(lora_bias=True), "layers.0"),
    ("error", "companion-unasked", put(Q0B.replace(".weight", ".bias"), 32), "layers.0"),
    ("warning", "tensor-unexplained", put("base_model.model.model.norm.weight", 32), "norm"),
    ("note", "table-saved", put("base_model.model.lm_head.weight", 64, 32), "lm_head"),
    ("error", "rows-missing", config(trainable_token_indices=[1, 2]), "trainable_token"),
    (
        "error",
        "rows-unasked",
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
        "embed_tokens",
    ),
    (
        "error",
        "rows-contradict",
        both(
            put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
            config(trainable_token_indices=[1, 2, 3]),
        ),
        "embed_tokens",
    ),
    ("note", "layers-uneven", drop("layers.4.self_attn.v_proj"), "not in layer 4"),
    ("warning", "field-missing", without("lora_alpha", "r"), "r"),
    ("error", "rank-contradicts", config(r=16), "r=16 in the config, 8 in the file"),
    ("error", "rank-contradicts", config(rank_pattern={"v_proj": 4}), "r=4 in the config"),
    ("warning", "pattern-matches-nothing", config(rank_pattern={"o_proj": 4}), "o_proj"),
    ("warning", "pattern-matches-nothing", config(alpha_pattern={"q_prj": 4}), "q_prj"),
    ("error", "module-untargeted", config(target_modules=["q_proj"]), "v_proj"),
    ("error", "module-untargeted", config(target_modules=r".*q_proj"), "v_proj"),
    ("error", "module-untargeted", config(exclude_modules=["v_proj"]), "v_proj"),
    ("error", "module-untargeted", config(layers_to_transform=[0, 1, 2, 3, 4]), "layers.5"),
    ("warning", "target-without-tensors", config(layers_to_transform=list(range(7))), "layer 6"),
    (
        "warning",
        "target-without-tensors",
        config(target_modules=["q_proj", "v_proj", "o_proj"]),
        "o_proj",
    ),
    ("error", "saved-module-missing", config(modules_to_save=["lm_head"]), "lm_head"),
    ("note", "bias-contradicts", config(bias="all"), "bias"),
    (
        "warning",
        "bias-contradicts",
        put("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", 32),
        "q_proj",
    ),
    ("warning", "init-changes-base", config(init_lora_weights="pissa_niter_16"), "init_lora"),
    ("note", "base-unnamed", config(base_model_name_or_path=""), "base_model_name"),
    ("warning", "base-path-missing", config(base_model_name_or_path="/no/such"), "base_model_name"),
    ("note", "peft-newer", config(peft_version="99.0"), "peft_version"),
    ("error", "config-refused", config(use_new_thing=True), "use_new_thing"),
    ("error", "config-refused", config(peft_type="LOHA"), ""),
    ("error", "config-refused", config(r=-1), "r=-1"),
    ("error", "record-broken", lambda p: p.metadata.update(lamina='{"format_version": 1}'), ""),
    ("error", "record-newer", lambda p: p.metadata.update(lamina='{"format_version": 99}'), ""),
    (
        "warning",
        "zero-tensor",
        both(
            put("base_model.model.lm_head.weight", 64, 32, value=0.0),
            config(modules_to_save=["lm_head"]),
        ),
        "lm_head",
    ),
    ("error", "file-end-zero", both(*[zeroed(key(5, "v_proj", s)) for s in "AB"]), "layers.5"),
    ("note", "vllm-rank", every("A", lambda t: t.repeat(4, 1)), "q_proj"),
    ("note", "vllm-refuses", config(modules_to_save=["lm_head"], use_dora=True), ""),
    ("note", "vllm-scaling", config(alpha_pattern={"v_proj": 4}), "v_proj: 0.5"),
]


def codes(parts: Parts, path: Path) -> list[tuple[str, str]]:
    return [(each.severity, each.code) for each in examined(parts, path).findings]


@pytest.mark.parametrize(
    ("severity", "code", "change", "place"), PLAIN, ids=[f"{i}-{p[1]}" for i, p in enumerate(PLAIN)]
)
def test_a_fault_is_found(
    severity: str, code: str, change: Change, place: str, tmp_path: Path
) -> None:
    healthy, broken = plain(), plain()
    change(broken)
    assert codes(healthy, tmp_path / "healthy") == []
    found = [f for f in examined(broken, tmp_path / "broken").findings if f.code == code]
    assert [each.severity for each in found[:1]] == [severity]
    assert place in (found[0].where or ("",))[0]
    assert found[0].what
    assert found[0].cure


# --- a chain -------------------------------------------------------------------------------------


def recorded(**changes: Any) -> Change:
    def change(parts: Parts) -> None:
        parts.metadata.update(chain_record(**changes).to_metadata())

    return change


def other_base(**values: Any) -> Change:
    stages = list(chain_record().stages)
    base = stages[-1].base.model_copy(update=values)
    stages[-1] = stages[-1].model_copy(update={"base": base})
    return recorded(stages=tuple(stages))


def tokenizers(*hashes: str) -> Change:
    stages = [
        stage.model_copy(update={"base": stage.base.model_copy(update={"tokenizer": each})})
        for stage, each in zip(chain_record().stages, hashes, strict=True)
    ]
    return recorded(stages=tuple(stages))


def flattened(parts: Parts) -> None:
    laminae = list(chain_record().laminae)
    laminae[-1] = laminae[-1].model_copy(update={"error": 0.015, "made_of": ("more", "chat")})
    recorded(laminae=tuple(laminae))(parts)


def zero_chat(parts: Parts) -> None:
    for name in [n for n in parts.tensors if "q_proj.lora_B" in n]:
        parts.tensors[name][:, 4:] = 0


def twice(parts: Parts) -> None:
    values = json.loads(parts.metadata["lamina"])
    values["stages"][1]["name"] = "domain"
    parts.metadata["lamina"] = json.dumps(values)


CHAIN: list[tuple[str, str, Change, str]] = [
    ("warning", "zero-b", zero_chat, "layers.0.self_attn.q_proj"),
    ("error", "record-contradicts", drop("layers.10.self_attn.v_proj"), "in the file"),
    ("error", "record-broken", twice, "two stages have the same name"),
    ("error", "weights-changed", recorded(weights="0" * 64), "adapter_model"),
    ("error", "scaling-contradicts", config(lora_alpha=40), "alpha / r is 4, 2 on record"),
    ("warning", "base-contradicts", config(base_model_name_or_path="a/other"), "base_model"),
    ("warning", "stages-differ-in-base", other_base(model_class="MistralForCausalLM"), "more"),
    ("warning", "stages-differ-in-base", other_base(vocab_size=70), "more -> chat"),
    ("warning", "stages-differ-in-tokenizer", tokenizers("a", "a", "b"), "more -> chat"),
    ("warning", "stages-left-out", recorded(left_out=("base-stage",)), "base-stage"),
    ("note", "flattened-in-part", flattened, "1.50%"),
    ("note", "probe-missing", recorded(), "chat"),
    ("note", "sketch-missing", recorded(), "chat"),
]


@pytest.mark.parametrize(
    ("severity", "code", "change", "place"), CHAIN, ids=[f"{i}-{p[1]}" for i, p in enumerate(CHAIN)]
)
def test_a_fault_of_a_chain_is_found(
    severity: str, code: str, change: Change, place: str, tmp_path: Path
) -> None:
    broken = chain()
    change(broken)
    healthy = codes(chain(), tmp_path / "healthy")
    assert healthy == [("note", "probe-missing"), ("note", "sketch-missing")]
    found = [f for f in examined(broken, tmp_path / "broken").findings if f.code == code]
    assert [each.severity for each in found] == [severity]
    assert place in " ".join(found[0].where)
    assert found[0].what
    assert found[0].cure


def test_names_the_stage_whose_ranks_are_zero(tmp_path: Path) -> None:
    broken = chain()
    zero_chat(broken)
    (found,) = [f for f in examined(broken, tmp_path).findings if f.code == "zero-b"]
    assert "of stage 'chat'" in found.what
    assert len(found.where) == 3


def test_the_digest_is_that_of_the_tensors(tmp_path: Path) -> None:
    from lamina.checkpoint.digest import tensors_digest

    parts = chain()
    record = StageRecord(**{**dict(chain_record()), "weights": tensors_digest(parts.tensors)})
    parts.metadata = record.to_metadata()
    assert "weights-changed" not in examined(parts, tmp_path / "whole").codes()
    parts.tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] += 1e-3
    assert "weights-changed" in examined(parts, tmp_path / "changed").codes("error")


# --- what a program takes ------------------------------------------------------------------------


def test_limits_of_a_program_are_errors_for_who_asks(tmp_path: Path) -> None:
    parts = plain(r=24)
    parts.config.update(use_dora=True)
    noted = examined(parts, tmp_path)
    asked = examine(tmp_path, target="vllm")
    assert {"vllm-rank", "vllm-refuses"} <= {*noted.codes("note")}
    assert "vllm-refuses" in asked.codes("error")
    # It takes rank 24, if it is told to.
    assert asked.codes("warning") == ["vllm-rank"]
    assert "--max-lora-rank 32" in next(f.cure for f in asked.findings if f.code == "vllm-rank")


def test_the_worst_comes_first_and_is_counted(tmp_path: Path) -> None:
    parts = plain()
    both(edit(Q0A, nan_in), config(peft_version="99"), config(rank_pattern={"x": 2}))(parts)
    found = examined(parts, tmp_path)
    order = [each.severity for each in found.findings]
    assert order == sorted(order, key=["error", "warning", "note"].index)
    assert found.counts == {s: order.count(s) for s in ("error", "warning", "note")}
    assert (found.worst, found.healthy) == ("error", False)
    assert found.to_dict()["counts"] == found.counts
    assert dataclasses.replace(found, findings=found.findings[-1:]).healthy
