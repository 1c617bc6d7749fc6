"""DoRA, aLoRA and batches whose rows go to different adapters, beside the real peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import lamina
from tests import models
from tests.adapters import WEIGHTS
from tests.parity.pairs import add, answer, assert_close, fill, gradients, merged, pair, trained
from tests.parity.test_layers import CASES

# What peft warns of is not what is tested.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]

CALL = [5, 6]


def called(rows: int = 3) -> Tensor:
    """Ids with an invocation twice in the first row, at the end of the last, nowhere between."""
    ids = models.token_ids(rows, length=12).clamp(min=7)
    for row, start in ((0, 3), (0, 7), (rows - 1, 10)):
        ids[row, start : start + 2] = torch.tensor(CALL)
    return ids


def alora(**more: Any) -> tuple[nn.Module, nn.Module]:
    return pair(
        models.tiny_llama,
        target_modules=["q_proj", "v_proj", "gate_proj"],
        r=4,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=CALL,
        **more,
    )


# --- DoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_dora_answers_and_learns_the_same(kind: str) -> None:
    make, targets, x = CASES[kind]
    ours, theirs = pair(make, target_modules=targets, use_dora=True, r=4, lora_alpha=6)
    assert any("lora_magnitude_vector" in name for name in trained(theirs))
    assert_close(answer(ours, x), answer(theirs, x), 2e-6)
    mine, other = gradients(ours, x), gradients(theirs, x)
    assert mine.keys() == other.keys() == trained(theirs).keys()
    for name, gradient in other.items():
        assert gradient.abs().max() > 0, name
        assert_close(mine[name], gradient, 5e-6)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d"])
def test_dora_with_dropout_draws_and_learns_the_same(kind: str) -> None:
    make, targets, x = CASES[kind]
    ours, theirs = pair(make, target_modules=targets, use_dora=True, r=4, lora_dropout=0.4)
    for model in (ours, theirs):
        model.eval()
        for name, module in model.named_modules():
            # Only what drops an adapter's input: the base has dropouts too.
            if hasattr(module, "lora_dropout") or "lora_dropout" in name:
                module.training = True
    found = []
    for model in (ours, theirs):
        with models.seeded(5):
            found.append((answer(model, x), gradients(model, x)))
    (mine, my_gradients), (other, other_gradients) = found
    assert_close(mine, other, 2e-6)
    with models.seeded(5):
        assert not torch.allclose(mine, answer(ours.eval(), x), atol=1e-3)
    for name, gradient in other_gradients.items():
        assert_close(my_gradients[name], gradient, 5e-6)


# conv3d: peft can't merge a kernel of 1 x 1 x 1. groups: the update is no weight of the base's.
@pytest.mark.parametrize("kind", sorted(CASES.keys() - {"groups", "conv3d"}))
def test_dora_merges_to_the_same_weights(kind: str) -> None:
    make, targets, _ = CASES[kind]
    mine, other = (merged(m) for m in pair(make, target_modules=targets, use_dora=True, r=4))
    assert mine.keys() == other.keys()
    for name, weight in other.items():
        assert_close(mine[name], weight, 2e-6)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv1d"])
@pytest.mark.parametrize("first", [False, True])
def test_several_adapters_meet_in_the_same_order(kind: str, first: bool) -> None:
    """DoRA scales what the adapters before it have added too, by norms of the base alone."""
    make, targets, x = CASES[kind]
    ours, theirs = pair(make, target_modules=targets, r=4, use_dora=first)
    add(ours, theirs, "dora", target_modules=targets[:1], r=2, lora_alpha=6, use_dora=True)
    add(ours, theirs, "last", target_modules=targets[:1], r=3, seed=3)
    both = answer(theirs, x)
    assert_close(answer(ours, x), both, 2e-6)
    mine, other = merged(ours), merged(theirs)
    for name, weight in other.items():
        assert_close(mine[name], weight, 2e-6)


@pytest.mark.parametrize("kind", ["llama", "Conv1D"])
@pytest.mark.parametrize("upcast", [True, False])
def test_dora_in_bf16_is_as_exact_as_peft(kind: str, upcast: bool) -> None:
    make, targets, x = CASES[kind]
    config: dict[str, Any] = {"target_modules": targets, "use_dora": True, "r": 4}
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(3):
        ours, theirs = (
            library.get_peft_model(
                make().bfloat16(), library.LoraConfig(**config), autocast_adapter_dtype=upcast
            ).eval()
            for library in (lamina, peft)
        )
        fill(ours, theirs, seed)
        kinds = {name: (p.shape, p.dtype) for name, p in trained(theirs).items()}
        assert {name: (p.shape, p.dtype) for name, p in trained(ours).items()} == kinds
        exact = lamina.get_peft_model(make().double(), lamina.LoraConfig(**config)).eval()
        exact.load_state_dict(ours.state_dict())
        wanted = answer(exact, x)
        errors += torch.stack([(answer(m, x) - wanted).norm() for m in (ours, theirs)]).detach()
        assert errors[1] <= 0.03 * (seed + 1) * wanted.norm()
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("kind", ["llama", "Conv1D", "embedding", "conv1d", "conv2d", "conv3d"])
def test_dora_files_go_both_ways(kind: str, tmp_path: Path) -> None:
    make, targets, x = CASES[kind]
    ours, theirs = pair(make, target_modules=targets, use_dora=True, r=4)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    extra = {key for key in other.keys() - mine.keys() if "base_layer" in key}
    assert mine.keys() == other.keys() - extra
    for key, tensor in mine.items():
        assert torch.equal(tensor, other[key]), key
    opened = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert torch.equal(answer(opened, x), answer(theirs, x))
    again = lamina.PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    assert torch.equal(answer(again, x), answer(ours, x))


# --- aLoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_alora_answers_and_learns_the_same(recompute: bool) -> None:
    ours, theirs = alora()
    ids = called()
    assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    found = []
    for model in (ours, theirs):
        model.train()
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    mine, other = found
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        assert gradient.abs().max() > 0, name
        assert_close(mine[name], gradient)


def test_alora_generates_the_same() -> None:
    ours, theirs = alora()
    ids = called()
    mine, other = (m.generate(input_ids=ids, max_new_tokens=8) for m in (ours, theirs))
    assert torch.equal(mine, other)


def test_alora_files_go_both_ways(tmp_path: Path) -> None:
    ours, theirs = alora()
    ids = called()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    opened = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "ours").eval()
    again = lamina.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "theirs").eval()
    wanted = theirs(input_ids=ids).logits
    assert torch.equal(opened(input_ids=ids).logits, wanted)
    assert_close(again(input_ids=ids).logits, wanted)


# --- mixed batches -------------------------------------------------------------------------------

NAMES = ["b", "__base__", "default", "b", "default"]


def test_alora_and_others_in_one_batch_are_the_same() -> None:
    ours, theirs = alora()
    add(ours, theirs, "b", target_modules=["q_proj", "up_proj"], r=2, task_type="CAUSAL_LM")
    for model in (ours, theirs):
        model.set_adapter("default")
    ids = called(5)
    ids[2] = ids[0]
    mine, other = (m(input_ids=ids, adapter_names=NAMES).logits for m in (ours, theirs))
    assert_close(mine, other)


@pytest.mark.parametrize("kind", ["linear", "llama", "Conv1D", "embedding", "conv1d", "conv2d"])
def test_mixed_batches_are_the_same(kind: str) -> None:
    make, targets, x = CASES[kind]
    ours, theirs = pair(make, target_modules=targets, r=4)
    add(ours, theirs, "b", target_modules=targets[:1], r=2, lora_alpha=6)
    x = torch.cat([x] * 3)[:5]
    names = NAMES[: len(x)]
    given = [model(x, adapter_names=names) for model in (ours, theirs)]
    mine, other = (getattr(output, "logits", output) for output in given)
    assert_close(mine, other)
    assert not torch.allclose(mine, answer(ours, x), atol=1e-3)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_mixed_generations_are_the_same(how: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
    ours, theirs = pair(models.tiny_llama, target_modules=["q_proj", "embed_tokens"], **settings)
    add(ours, theirs, "b", target_modules=["up_proj", "down_proj"], **settings)
    for model in (ours, theirs):
        model.set_adapter("default")
    ids = models.token_ids(5)
    mine, other = (
        m.generate(input_ids=ids, adapter_names=NAMES, max_new_tokens=6, **how)
        for m in (ours, theirs)
    )
    assert torch.equal(mine, other)
    assert not torch.equal(mine, ours.generate(input_ids=ids, max_new_tokens=6, **how))


def tiny_t5() -> nn.Module:
    with models.seeded(0):
        config = T5Config(
            vocab_size=models.VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
        return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_and_decoder_each_get_their_rows(beams: int) -> None:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 32, "task_type": "SEQ_2_SEQ_LM"}
    ours, theirs = pair(tiny_t5, target_modules=["q", "v", "wo"], **settings)
    add(ours, theirs, "b", target_modules=["k", "o"], **settings)
    for model in (ours, theirs):
        model.set_adapter("default")
    ids = models.token_ids(5)
    mine, other = (
        m.generate(input_ids=ids, adapter_names=NAMES, max_new_tokens=6, num_beams=beams)
        for m in (ours, theirs)
    )
    assert torch.equal(mine, other)
    by_row = [
        ours.generate(
            input_ids=ids[i : i + 1],
            adapter_names=[name],
            max_new_tokens=6,
            num_beams=beams,
        )
        for i, name in enumerate(NAMES)
    ]
    for row, alone in enumerate(by_row):
        assert torch.equal(mine[row, : alone.shape[1]], alone[0])


def test_modules_trained_whole_are_mixed_alike() -> None:
    ids = models.token_ids(5)
    config: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    ours, theirs = pair(models.tiny_bert_classifier, **config)
    ours.add_adapter("b", lamina.LoraConfig(**config))
    theirs.add_adapter("b", peft.LoraConfig(**config))
    for model in (ours, theirs):
        model.set_adapter("b")
    ours.set_adapter("b", train="b")
    fill(ours, theirs, 4)
    mine, other = (m(input_ids=ids, adapter_names=NAMES).logits for m in (ours, theirs))
    assert_close(mine, other)
