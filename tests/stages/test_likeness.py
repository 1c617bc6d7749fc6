"""Bases known by their weights, where stages are begun, loaded and saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

from lamina.config import LoraConfig
from lamina.engine.names import places
from lamina.errors import LaminaError, MismatchWarning, StageError
from lamina.model import get_peft_model
from lamina.stages import begin_stage, lineage, load, save_stage
from lamina.stages.bases import describe_base
from tests import models, quantised
from tests.stages.chains import (
    answer,
    distance,
    fill_trainable,
    llama_lora,
    rewrite_record,
    run_stage,
    tensors_of,
)

SECOND = llama_lora(r=2, target_modules=["o_proj", "up_proj"])


def named(seed: int = 0, **changes: Any) -> Any:
    model = models.tiny_llama(seed, **changes)
    model.name_or_path = "someone/tiny"
    return model


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, of updates that are small beside the weights."""
    folder = tmp_path_factory.mktemp("chain")
    for name, parent, config in (("domain", None, llama_lora()), ("chat", "domain", SECOND)):
        model = begin_stage(
            named(),
            name=name,
            parent=None if parent is None else folder / parent,
            mode=None if parent is None else "stack",
            config=config,
        )
        fill_trainable(model, seed=len(name), size=0.01)
        save_stage(model, folder / name)
    return folder


def refusals(base: nn.Module, stage: Path) -> list[str]:
    """What `load` and `begin_stage` say against a base: the same."""
    with pytest.raises(StageError) as loading:
        load(stage, base)
    with pytest.raises(StageError) as beginning:
        begin_stage(base, name="new", parent=stage, mode="stack", config=llama_lora())
    faults = list(loading.value.faults)
    assert list(beginning.value.faults) == [f"base: {fault}" for fault in faults]
    for error in (loading.value, beginning.value):
        assert "allow_base_mismatch=True" in str(error.cure)
    return faults


# --- a base with the adapter in it already -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_with_the_adapter_folded_in(chain: Path, dtype: torch.dtype) -> None:
    merged = load(chain / "chat", named()).merge_and_unload().to(dtype)
    (fault,) = refusals(merged, chain / "chat")
    assert fault == (
        "this is 'someone/tiny', the recorded base with the adapter folded in already: it differs "
        "in all 8 weights that the adapter targets, and in nothing else"
    )
    # Nothing keeps those from it who know what they do.
    load(chain / "chat", merged, allow_base_mismatch=True)


def test_a_base_with_the_first_stage_folded_in(chain: Path) -> None:
    merged = load(chain / "domain", named()).merge_and_unload()
    merged.name_or_path = "runs/merged"
    (fault,) = refusals(merged, chain / "chat")
    assert fault == (
        "'runs/merged' is 'someone/tiny', the recorded base with stage 'domain' folded in already: "
        "it differs in 4 of the 8 weights that the adapter targets, and in nothing else"
    )


def test_a_base_with_another_adapter_folded_in(chain: Path, tmp_path: Path) -> None:
    other = begin_stage(named(), name="domain", config=llama_lora())
    fill_trainable(other, seed=99, size=0.01)
    merged = other.merge_and_unload()
    (fault,) = refusals(merged, chain / "domain")
    assert "with something else folded in, or trained on" in fault
    assert "all 4 weights that the adapter targets" in fault


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (models.tiny_gpt2, ["c_attn", "c_proj"]),
        (models.embedding_net, ["embed", "head"]),
        (models.perceptron, ["up", "down"]),
    ],
)
def test_folded_into_weights_of_every_layout(
    build: Any, targets: list[str], tmp_path: Path
) -> None:
    model = begin_stage(build(), name="one", config=LoraConfig(r=4, target_modules=targets))
    fill_trainable(model, size=0.01)
    save_stage(model, tmp_path / "one")
    merged = load(tmp_path / "one", build()).merge_and_unload()
    (fault,) = refusals(merged, tmp_path / "one")
    assert "with the adapter folded in already" in fault


def test_folding_in_memory_is_no_other_base(chain: Path, tmp_path: Path) -> None:
    model = begin_stage(
        named(), name="next", parent=chain / "chat", mode="merge", config=llama_lora(r=2)
    )
    fill_trainable(model, seed=3, size=0.01)
    save_stage(model, tmp_path / "next")
    assert distance(answer(load(tmp_path / "next", named())), answer(model.eval())) < 1e-5


# --- what is only told -------------------------------------------------------------------------


def packed(model: nn.Module, kind: str = "nf4") -> nn.Module:
    for place in list(places(model)):
        if isinstance(place.module, nn.Linear) and place.name != "lm_head":
            assert place.parent is not None
            setattr(place.parent, place.child, quantised.KINDS[kind](place.module))
    return model


def wide(seed: int = 0) -> Any:
    return named(seed, hidden_size=64, intermediate_size=128)


def test_a_quantised_base_is_told(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora(), build=wide)
    with pytest.warns(
        MismatchWarning, match=r"but bitsandbytes nf4 instead of dense \(corr"
    ) as told:
        load(tmp_path / "one", packed(wide()))
    assert str(told[0].message).startswith(str(tmp_path / "one"))
    assert told[0].filename == __file__
    with pytest.warns(MismatchWarning, match="but bitsandbytes nf4 instead of dense") as told:
        begin_stage(
            packed(wide()), name="x", parent=tmp_path / "one", mode="stack", config=llama_lora()
        )
    assert str(told[0].message).startswith("Stage 'x' on ")
    assert told[0].filename == __file__
    (fault,) = refusals(packed(wide(seed=1)), tmp_path / "one")
    assert "is another model" in fault


def test_a_dense_base_under_a_stage_of_a_quantised_one(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora(), build=lambda: packed(wide()))
    load(tmp_path / "one", packed(wide()))
    with pytest.warns(MismatchWarning, match="but dense instead of bitsandbytes nf4"):
        load(tmp_path / "one", wide())
    with pytest.warns(MismatchWarning, match="but dense instead of bitsandbytes nf4"):
        run_stage(tmp_path / "two", SECOND, parent=tmp_path / "one", mode="merge", build=wide)
    # Each stage keeps what its own base looked like.
    first, second = lineage(tmp_path / "two").stages
    assert (first.base.quantization, second.base.quantization) == ("bitsandbytes nf4", None)
    assert first.base.sketch is not None
    assert second.base.sketch is not None
    load(tmp_path / "two", wide())


def test_another_head_is_told(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    run_stage(tmp_path / "one", config, build=named)
    source = named()
    classifier = LlamaForSequenceClassification(source.config)
    classifier.model.load_state_dict(source.model.state_dict())
    with pytest.warns(MismatchWarning, match=r"without lm_head\.weight and with score\.weight"):
        load(tmp_path / "one", classifier)


def test_a_head_that_is_trained_whole_may_begin_anyhow(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    build = models.tiny_bert_classifier
    model = begin_stage(build(), name="one", config=config)
    fill_trainable(model)
    save_stage(model, tmp_path / "one")

    def fresh() -> Any:
        base = build()
        base.classifier.reset_parameters()
        return base

    load(tmp_path / "one", fresh())
    begin_stage(fresh(), name="two", parent=tmp_path / "one", mode="continue")
    # Where it isn't trained, it is part of what the stage learned on.
    plain = LoraConfig(r=4, target_modules=["query"])
    run_stage(tmp_path / "bare", plain, build=build)
    (fault,) = refusals(fresh(), tmp_path / "bare")
    assert "(classifier.bias, classifier.weight)" in fault


def test_trained_biases_and_rows_are_not_the_bases(tmp_path: Path) -> None:
    config = llama_lora(trainable_token_indices=[3, 64, 65])

    def grown() -> Any:
        model = named(tie_word_embeddings=True)
        model.resize_token_embeddings(66, mean_resizing=False)
        return model

    base = grown()
    base.model.embed_tokens.weight.data[64:] = 3.0
    model = begin_stage(base, name="one", config=config)
    fill_trainable(model)
    save_stage(model, tmp_path / "one")
    other = grown()
    other.model.embed_tokens.weight.data[64:] = -3.0
    assert distance(answer(load(tmp_path / "one", other)), answer(model.eval())) < 1e-6
    # Rows that are missing are those that the file has.
    again = load(tmp_path / "one", named(tie_word_embeddings=True))
    assert distance(answer(again), answer(model)) < 1e-6
    biased = LoraConfig(r=4, target_modules=["up"], bias="all")
    run_stage(tmp_path / "two", biased, build=models.perceptron)
    changed = models.perceptron()
    changed.up.bias.data += 1
    load(tmp_path / "two", changed)


# --- what is on record ---------------------------------------------------------------------------


def sketches(path: Path) -> list[bool]:
    return [stage.base.sketch is not None for stage in lineage(path).stages]


def test_the_sketch_is_in_a_chain_once(chain: Path) -> None:
    assert sketches(chain / "domain") == [True]
    assert sketches(chain / "chat") == [False, True]


def test_a_base_in_another_dtype_has_the_same_sketch(chain: Path, tmp_path: Path) -> None:
    model = begin_stage(
        named().bfloat16(), name="next", parent=chain / "chat", mode="stack", config=llama_lora()
    )
    save_stage(model, tmp_path / "next")
    assert sketches(tmp_path / "next") == [False, False, True]
    load(tmp_path / "next", named())


def test_a_base_that_differs_keeps_both_sketches(chain: Path, tmp_path: Path) -> None:
    model = begin_stage(
        named(seed=1),
        name="next",
        parent=chain / "chat",
        mode="stack",
        config=llama_lora(),
        allow_base_mismatch=True,
    )
    save_stage(model, tmp_path / "next")
    assert sketches(tmp_path / "next") == [False, True, True]
    # The newest stage says what the chain lies over.
    load(tmp_path / "next", named(seed=1))
    assert "is another model" in refusals(named(), tmp_path / "next")[0]


def test_a_base_is_described_as_it_is_without_adapters(chain: Path) -> None:
    adapted = get_peft_model(named(), llama_lora(bias="all", modules_to_save=["lm_head"]))
    assert describe_base(adapted.get_base_model()) == describe_base(named())


def test_initialisations_that_change_the_base_are_not_in_the_sketch(tmp_path: Path) -> None:
    config = llama_lora(init_lora_weights="pissa")
    model = begin_stage(named(), name="one", config=config)
    fill_trainable(model, size=0.01)
    save_stage(model, tmp_path / "one")
    load(tmp_path / "one", named())
    begin_stage(named(), name="two", parent=tmp_path / "one", mode="continue")


def damage(record: Any, **changes: Any) -> None:
    record["stages"][-1]["base"]["sketch"].update(changes)


def test_a_damaged_sketch_says_so(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "domain", tmp_path / "one")
    rewrite_record(tmp_path / "one", lambda record: damage(record, values="????"))
    before = tensors_of(tmp_path / "one")
    with pytest.raises(LaminaError, match="damaged") as caught:
        load(tmp_path / "one", named())
    assert "not base64" in str(caught.value)
    assert "PeftModel.from_pretrained" in str(caught.value.cure)
    assert tensors_of(tmp_path / "one").keys() == before.keys()
