"""More of what goes wrong for people today: models of every kind, ties, resized vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lamina
from lamina.config import LoraConfig, PeftConfig
from lamina.engine.targets import make_plan
from tests import models, quantised
from tests.adapters import fill, llama_adapter, llama_config, logits, same, weights
from tests.parity.kinds import KINDS

# --- row 10: which base is the right one to merge into? -----------------------------------------


def quantised_llama() -> nn.Module:
    base = models.tiny_llama()
    for block in base.model.layers:
        block.self_attn.q_proj = quantised.bnb8(block.self_attn.q_proj)
    return base


def test_row_10_both_merges_are_offered_by_name_and_measured(tmp_path: Path) -> None:
    model = lamina.begin_stage(
        quantised_llama(), name="one", config=llama_config(target_modules=["q_proj"])
    )
    fill(model, "one")
    record = lamina.save_stage(model.eval(), tmp_path)
    assert (record.newest.base.quantization or "").startswith("bitsandbytes")
    with pytest.raises(lamina.FoldError, match="quanti") as caught:
        model.merge_and_unload()
    assert "target='quantized'" in str(caught.value).replace('"', "'")
    assert "dequantized" in str(caught.value)
    unmerged = logits(model)
    ids = {"input_ids": models.token_ids()}
    measured = {m.target: m for m in lamina.compare_merges(model, ids)}
    assert measured.keys() == {"quantized", "dequantized"}
    assert torch.equal(logits(model), unmerged)
    for target, told in measured.items():
        opened = lamina.load(tmp_path, quantised_llama())
        found = logits(opened.merge_and_unload(target=target))
        difference = (found - unmerged).abs().max().item()
        assert difference == pytest.approx(told.max_logit_difference, rel=1e-3, abs=1e-6)
    # Codes can't hold the sum; dense weights can.
    assert 1e-6 < measured["quantized"].max_logit_difference < 1e-3
    assert measured["dequantized"].max_logit_difference < measured["quantized"].max_logit


def test_row_10_the_record_says_which_base_is_the_right_one(tmp_path: Path) -> None:
    config = llama_config(target_modules=["q_proj"])
    model = lamina.begin_stage(models.tiny_llama(), name="one", config=config)
    # So little that values of the usual size keep their bits in bf16.
    fill(model, "one", size=1e-2)
    lamina.save_stage(model, tmp_path)
    lamina.load(tmp_path, models.tiny_llama().bfloat16())
    with pytest.warns(lamina.MismatchWarning, match="but bitsandbytes int8 instead of dense"):
        lamina.load(tmp_path, quantised_llama())
    twice = lamina.load(tmp_path, models.tiny_llama()).merge_and_unload().bfloat16()
    with pytest.raises(lamina.StageError, match="with the adapter folded in already"):
        lamina.load(tmp_path, twice)
    # Theirs adds the update a second time without a word.
    theirs = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path).merge_and_unload()
    again = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert not torch.allclose(logits(again), logits(lamina.load(tmp_path, models.tiny_llama())))


# --- row 11: tied embeddings come apart, or lose the head on load -------------------------------


def tied() -> nn.Module:
    return models.tiny_llama(tie_word_embeddings=True)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_row_11_folding_into_one_of_two_tied_weights_changes_the_other() -> None:
    config = {"r": 4, "target_modules": ["lm_head"]}
    theirs = peft.get_peft_model(tied(), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        theirs.get_base_model().lm_head.lora_B["default"].weight.normal_(std=0.1)
    before = logits(theirs)
    assert (logits(theirs.merge_and_unload()) - before).abs().max() > 1e-3

    model = lamina.get_peft_model(tied(), LoraConfig(**config)).eval()
    fill(model)
    before = logits(model)
    with pytest.raises(lamina.FoldError, match=r"tied to model\.embed_tokens"):
        model.merge_and_unload()
    torch.testing.assert_close(
        logits(model.merge_and_unload(untie=True)), before, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("whole", [["embed_tokens"], ["lm_head"]])
def test_row_11_a_merged_model_is_what_it_was_when_it_is_opened_again(
    whole: list[str], together: bool, tmp_path: Path
) -> None:
    config = llama_config(modules_to_save=whole, ensure_weight_tying=together)
    model = lamina.get_peft_model(tied(), config).eval()
    fill(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    opened = lamina.PeftModel.from_pretrained(tied(), tmp_path / "adapter")
    assert torch.equal(logits(opened), expected)
    merged = model.merge_and_unload()
    # Else a reader would tie again what was trained apart.
    assert merged.config.tie_word_embeddings is together
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is together


# --- row 13: fused experts ----------------------------------------------------------------------


def test_row_13_all_linear_says_what_it_leaves_out() -> None:
    kind = KINDS["Mixtral"]
    with pytest.warns(UserWarning, match="leaves out 4 parameters that hold experts"):
        model = lamina.get_peft_model(kind.make(), LoraConfig(target_modules="all-linear"))
    assert not any(".experts." in name for name, p in model.named_parameters() if p.requires_grad)


def test_row_13_experts_have_ranks_of_their_own_with_dropout_and_several_adapters() -> None:
    kind = KINDS["Mixtral"]
    config: dict[str, Any] = {"r": 2, "target_parameters": ["experts.down_proj"]}
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.get_peft_model(kind.make(), peft.LoraConfig(**config, lora_dropout=0.2))

    base = kind.make()
    before = base.model.layers[0].mlp.experts.down_proj.detach().clone()
    model = lamina.get_peft_model(base, LoraConfig(**config, lora_dropout=0.2))
    fill(model)
    model.add_adapter("second", LoraConfig(**config))
    fill(model, "second", seed=2)
    model.set_adapter(["default", "second"])
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    both = logits(model)
    layer = model.get_base_model().model.layers[0].mlp.experts
    sums = []
    for name in ("default", "second"):
        a, b = layer.factors(name)
        assert (len(a), b.shape[1]) == (6, 6)
        sums.append(layer.delta_weight(name))
    merged = model.merge_and_unload()
    after = merged.model.layers[0].mlp.experts.down_proj
    torch.testing.assert_close(after, before + sum(sums), rtol=0, atol=1e-6)
    # Each expert is changed in its own way.
    assert len({round(float(each.detach().abs().sum()), 4) for each in after - before}) == 3
    torch.testing.assert_close(logits(merged), both, rtol=0, atol=1e-5)


# --- row 14: empty or partial adapters ----------------------------------------------------------


def placeholders(model: nn.Module) -> None:
    """What ZeRO-3 leaves in place of parameters that other processes hold."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = torch.empty(0)


def test_row_14_an_empty_adapter_is_never_saved(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    placeholders(theirs)
    with pytest.warns(match="not gathered before save_pretrained"):
        theirs.save_pretrained(str(tmp_path / "peft"))
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    # Elsewhere that is a warning; the file is written, and half of it is empty.
    assert [tensor.numel() for key, tensor in saved.items() if "lora_A" in key] == [0, 0]
    ours = lamina.get_peft_model(models.tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    gathered = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    placeholders(ours)
    with pytest.raises(lamina.CheckpointError, match=r"2 of the 4 (?s:.*)lora_A.weight' is empty"):
        ours.save_pretrained(tmp_path / "lamina")
    assert not (tmp_path / "lamina").exists()
    ours.save_pretrained(tmp_path / "lamina", state_dict=gathered)
    again = load_file(tmp_path / "lamina" / "adapter_model.safetensors")
    for key, tensor in again.items():
        assert torch.equal(tensor, gathered[key.replace(".weight", ".default.weight")])


# --- row 16: resuming loses adapters, or keeps a stale alpha ------------------------------------


def test_row_16_what_is_resumed_has_the_runs_own_config(tmp_path: Path) -> None:
    def run(alpha: float) -> Any:
        model = llama_adapter(lora_alpha=alpha)
        model.add_adapter("other", llama_config(r=2))
        model.set_adapter(["default", "other"])
        return model

    first = run(8)
    fill(first, "other", seed=5)
    first.save_pretrained(tmp_path)
    again = run(8)
    for name, where in (("default", tmp_path), ("other", tmp_path / "other")):
        assert again.load_adapter(where, name, is_trainable=True).complete
    assert same(weights(again), weights(first))
    assert again.active_adapters == ["default", "other"]

    stale = run(16)
    before = weights(stale)
    with pytest.raises(lamina.LaminaError, match="lora_alpha"):
        stale.load_adapter(tmp_path, "default")
    assert same(weights(stale), before)


# --- row 17: gradient checkpointing kills the gradient ------------------------------------------


def test_row_17_recomputed_activations_get_their_gradient() -> None:
    ids = models.token_ids()

    def step(model: Any) -> dict[str, Tensor]:
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    base = models.tiny_llama()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads()
    with pytest.warns(UserWarning, match="requires_grad=True"), pytest.raises(RuntimeError):
        # A frozen embedding's output, and nothing that asks for a gradient comes out again.
        step(base.requires_grad_(False))

    model = lamina.get_peft_model(base, llama_config())
    model.load_state_dict(llama_adapter().state_dict())
    found, expected = step(model), step(llama_adapter())
    lamina.check_gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
        assert gradient.any()


# --- row 18: resized vocabularies ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_row_18_a_resized_vocabulary_costs_its_new_rows(tmp_path: Path) -> None:
    new = [models.VOCABULARY, models.VOCABULARY + 1]

    def resized() -> Any:
        base = models.tiny_llama()
        base.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
        return base

    theirs = peft.get_peft_model(resized(), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=True)
    rows = {"embed_tokens": new, "lm_head": new}
    ours = lamina.get_peft_model(
        resized(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows)
    ).eval()
    fill(ours)
    ours.save_pretrained(tmp_path / "ours")
    size = {
        side: (tmp_path / side / "adapter_model.safetensors").stat().st_size
        for side in ("ours", "theirs")
    }
    tables = 2 * (new[-1] + 1) * models.HIDDEN * 4
    assert size["theirs"] - size["ours"] > 0.9 * tables
    opened = lamina.load(tmp_path / "ours", models.tiny_llama())
    assert opened.config.vocab_size == new[-1] + 1
    assert torch.equal(logits(opened), logits(ours))


def test_row_18_a_base_of_another_vocabulary_is_told_by_its_rows(tmp_path: Path) -> None:
    model = lamina.begin_stage(models.tiny_llama(), name="one", config=llama_config())
    fill(model, "one")
    lamina.save_stage(model, tmp_path)
    grown = models.tiny_llama()
    grown.resize_token_embeddings(models.VOCABULARY + 8, mean_resizing=False)
    with pytest.raises(lamina.StageError, match="but with 8 more rows in lm_head") as caught:
        lamina.load(tmp_path, grown)
    assert "allow_base_mismatch=True" in str(caught.value.cure)
    opened = lamina.load(tmp_path, grown, allow_base_mismatch=True)
    kept = logits(opened)[..., : models.VOCABULARY]
    torch.testing.assert_close(kept, logits(lamina.load(tmp_path, models.tiny_llama())))


# --- row 24: suffixes that hit the vision tower too ---------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)


class Multimodal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"layers": nn.ModuleList([Attention(), Attention()])})
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList([Attention()])})


SCOPES: dict[str, dict[str, Any]] = {
    "expression": {"target_modules": r"language_model\..*\.(q|v)_proj"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r"vision_tower\..*"},
}


@pytest.mark.parametrize("scope", SCOPES)
def test_row_24_a_scope_keeps_out_of_the_tower_and_is_saved_as_it_was_written(
    scope: str, tmp_path: Path
) -> None:
    everywhere = make_plan(Multimodal(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert everywhere.counts == {"q_proj": 3, "v_proj": 3}

    config = LoraConfig(**SCOPES[scope])
    model = lamina.get_peft_model(Multimodal(), config)
    hit = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(hit) == 4
    assert all("language_model" in name for name in hit)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for field, value in SCOPES[scope].items():
        assert written[field] == value
    assert (
        PeftConfig.from_pretrained(tmp_path).to_dict()["target_modules"]
        == (written["target_modules"])
    )
