"""What differs between a base and the recorded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from lamina.checkpoint.sketch import FileWeights, Over, compare
from lamina.checkpoint.sketch.memory import ModelWeights, sketch_model
from tests import models
from tests.checkpoint.sketching import DTYPES, TINY, moved, told

# --- what is folded in ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_in_the_targets_alone(dtype: torch.dtype) -> None:
    base, merged = models.tiny_llama(), moved(models.tiny_llama(), TINY, "q_proj", "v_proj")
    targets = [
        f"model.layers.{i}.self_attn.{each}" for i in range(2) for each in ("q_proj", "v_proj")
    ]
    likeness = told(base, merged.to(dtype), targets=targets)
    assert (likeness.verdict, likeness.ok) == ("merged", False)
    assert set(likeness.differing) == {f"{target}.weight" for target in targets}
    assert likeness.sentence == (
        "this is 'someone/tiny', the recorded base with the adapter, or one like it, folded in "
        "already: it differs in all 4 weights that the adapter targets, and in nothing else"
    )


def test_an_update_larger_than_the_weights_where_others_vouch_for_the_base() -> None:
    merged = moved(models.tiny_llama(), 1.0, "q_proj")
    targets = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert told(models.tiny_llama(), merged, targets=targets).verdict == "merged"


def test_an_update_in_files(tmp_path: Path) -> None:
    moved(models.tiny_gpt2(), TINY, "c_attn.weight").bfloat16().save_pretrained(tmp_path)
    targets = [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
    sketch = sketch_model(models.tiny_gpt2())
    likeness = compare(sketch, FileWeights(tmp_path), Over(targets=targets))
    assert likeness.verdict == "merged"
    assert "in all 2 weights that the adapter targets" in likeness.sentence


def test_an_update_in_some_of_the_targets() -> None:
    merged = moved(models.tiny_llama(), TINY, "layers.1.self_attn.q_proj")
    targets = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    likeness = told(models.tiny_llama(), merged, targets=targets)
    assert likeness.verdict == "merged"
    assert "in 1 of the 2 weights that the adapter targets" in likeness.sentence


def test_an_update_of_other_weights_too() -> None:
    merged = moved(models.tiny_llama(), TINY, "q_proj", "layers.0.mlp.up_proj")
    targets = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    likeness = told(models.tiny_llama(), merged, targets=targets)
    assert (likeness.verdict, likeness.ok) == ("other", False)
    assert "is not quite" in likeness.sentence
    assert "3 of 21 weights have other values" in likeness.sentence
    assert "model.layers.0.mlp.up_proj.weight" in likeness.sentence


def test_smallest_updates_are_seen_in_the_smallest_values() -> None:
    # A step of bfloat16 at the usual size of these weights is 1e-4.
    merged = moved(models.tiny_llama(), 3e-6, "q_proj").bfloat16()
    unchanged = models.tiny_llama().bfloat16()
    same = merged.model.layers[0].self_attn.q_proj.weight == (
        unchanged.model.layers[0].self_attn.q_proj.weight
    )
    assert 0.9 < same.float().mean() < 1
    likeness = told(models.tiny_llama(), merged)
    assert len(likeness.differing) == 2


def test_a_model_that_was_trained_on() -> None:
    likeness = told(models.tiny_llama(), moved(models.tiny_llama(), TINY))
    assert (likeness.verdict, likeness.ok) == ("other", False)
    assert "is a relative of 'someone/tiny', the recorded base, and not it" in likeness.sentence
    assert likeness.correlation is not None
    assert likeness.correlation > 0.99


def test_one_weight_that_differs_is_named() -> None:
    changed = models.tiny_llama()
    changed.model.norm.weight.data += 0.5
    likeness = told(models.tiny_llama(), changed)
    assert likeness.verdict == "other"
    assert "1 of 21 weights has other values (model.norm.weight)" in likeness.sentence


def test_what_the_adapter_brings_itself_does_not_matter() -> None:
    changed = moved(models.tiny_bert_classifier(), 1.0, "classifier")
    assert told(models.tiny_bert_classifier(), changed).verdict == "other"
    likeness = told(models.tiny_bert_classifier(), changed, replaced=["classifier"])
    assert likeness.verdict == "same"


# --- rows, heads, other shapes -------------------------------------------------------------------


def resized(rows: int) -> LlamaForCausalLM:
    model = models.tiny_llama()
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def test_more_rows() -> None:
    likeness = told(models.tiny_llama(), resized(72))
    assert (likeness.verdict, likeness.ok) == ("resized", False)
    assert likeness.sentence == (
        "this is 'someone/tiny', the recorded base, but with 8 more rows in lm_head.weight, "
        "model.embed_tokens.weight (72 instead of 64)"
    )


def test_fewer_rows() -> None:
    likeness = told(models.tiny_llama(), resized(60))
    assert (likeness.verdict, likeness.ok) == ("resized", False)
    assert "with 4 rows fewer" in likeness.sentence
    assert "so that what was trained on those is lost" in likeness.sentence


def test_rows_that_the_adapter_brings_itself() -> None:
    recorded, here = resized(72), resized(72)
    for model in (recorded.model.embed_tokens, recorded.lm_head):
        model.weight.data[64:] = 5.0
    assert told(recorded, here).verdict == "other"
    own = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), range(64, 72))
    assert told(recorded, here, rows=own).verdict == "same"


def test_rows_that_the_adapter_brings_itself_are_not_missed() -> None:
    own = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), range(64, 72))
    assert told(resized(72), models.tiny_llama(), rows=own).verdict == "same"
    most = dict.fromkeys(own, range(64, 71))
    assert told(resized(72), models.tiny_llama(), rows=most).verdict == "resized"


def test_resized_and_changed_is_not_only_resized() -> None:
    likeness = told(models.tiny_llama(), moved(resized(72), TINY, "layers.0"))
    assert likeness.verdict == "other"


def with_backbone_of(model: Any, source: LlamaForCausalLM) -> Any:
    """The same weights under another head, or under none."""
    backbone = getattr(model, "model", model)
    backbone.load_state_dict(source.model.state_dict())
    return model


def test_the_same_base_under_another_head() -> None:
    source = models.tiny_llama()
    classifier = with_backbone_of(LlamaForSequenceClassification(source.config), source)
    likeness = told(source, classifier)
    assert (likeness.verdict, likeness.ok) == ("head", True)
    assert likeness.sentence == (
        "this is 'someone/tiny', the recorded base, but without lm_head.weight and with "
        "score.weight besides"
    )
    bare = with_backbone_of(LlamaModel(source.config), source)
    assert told(source, bare).verdict == "head"
    assert "without lm_head.weight" in told(source, bare).sentence
    assert told(bare, source).verdict == "head"
    other = with_backbone_of(LlamaModel(source.config), models.tiny_llama(seed=1))
    assert told(source, other).verdict == "other"


def test_a_head_that_is_a_block_of_its_own() -> None:
    classifier = models.tiny_bert_classifier()
    masked = BertForMaskedLM(classifier.config)
    masked.bert.load_state_dict(classifier.bert.state_dict(), strict=False)
    assert told(classifier, masked).verdict == "head"


def test_a_pooler_that_no_checkpoint_has() -> None:
    def build(seed: int) -> Any:
        bare = models.tiny_bert_classifier().bert
        with models.seeded(seed):
            bare.pooler.dense.reset_parameters()
        return bare

    likeness = told(build(1), build(2))
    assert (likeness.verdict, likeness.ok) == ("head", True)
    assert "but with a pooler that was initialised anew (pooler.dense.bias" in likeness.sentence
    assert told(build(1), moved(build(2), TINY, "layer.0")).verdict == "other"
    # Under a classifier it is part of what the labels come from.
    recorded, here = models.tiny_bert_classifier(), models.tiny_bert_classifier()
    here.bert.pooler.dense.reset_parameters()
    assert told(recorded, here).verdict == "other"


def test_more_layers_are_another_structure() -> None:
    deeper = models.tiny_llama(num_hidden_layers=3)
    state = models.tiny_llama().state_dict()
    deeper.load_state_dict({**deeper.state_dict(), **state})
    likeness = told(models.tiny_llama(), deeper)
    assert (likeness.verdict, likeness.ok) == ("structure", False)
    assert "with model.layers.2.self_attn.q_proj.weight" in likeness.sentence
    assert told(deeper, models.tiny_llama()).verdict == "structure"


def test_other_shapes_are_another_model() -> None:
    likeness = told(models.tiny_llama(), models.tiny_llama(hidden_size=16))
    assert (likeness.verdict, likeness.ok) == ("other", False)
    assert "have other values or shapes" in likeness.sentence
    assert told(models.tiny_llama(), models.perceptron()).verdict == "other"


def test_values_that_cannot_be_looked_at() -> None:
    meta = models.tiny_llama().to("meta")
    likeness = told(models.tiny_llama(), meta)
    assert (likeness.verdict, likeness.ok) == ("unknown", True)
    assert "no values of it can be looked at" in likeness.sentence
    assert told(meta, models.tiny_llama()).verdict == "unknown"
    assert told(models.tiny_llama(hidden_size=16), meta).verdict == "other"
    partly = models.tiny_llama()
    partly.model.layers[1].to("meta")
    likeness = told(models.tiny_llama(), partly)
    assert likeness.verdict == "same"
    assert likeness.sentence.endswith(", as far as can be seen: 9 of its weights can't be")


def test_the_names_of_both_are_said() -> None:
    sketch = sketch_model(models.perceptron())
    weights = ModelWeights(models.perceptron(seed=1))
    likeness = compare(sketch, weights, name="someone/tiny", here="runs/merged")
    assert likeness.sentence.startswith("'runs/merged' is another model than 'someone/tiny'")
    assert compare(sketch, weights).sentence.startswith("this is another model than the recorded")
