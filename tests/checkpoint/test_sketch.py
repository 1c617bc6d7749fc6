"""A base known by its weights: every verdict, in every dtype, from memory and from files."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lamina.checkpoint.record import Sketch
from lamina.checkpoint.sketch import FileWeights, Likeness, Over, compare, sketch_files
from lamina.checkpoint.sketch.memory import ModelWeights, sketch_model
from lamina.checkpoint.sketch.stored import samples
from lamina.config import LoraConfig
from lamina.engine.names import places
from lamina.errors import MissingFileError
from lamina.model import get_peft_model
from tests import models, quantised

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What a merged LoRA of usual size adds to weights of usual size.
TINY = 1e-4
BUILDS: dict[str, Callable[..., Any]] = {
    "llama": models.tiny_llama,
    "llama-tied": lambda seed=0: models.tiny_llama(seed, tie_word_embeddings=True),
    "gpt2": models.tiny_gpt2,
    "bert": models.tiny_bert_classifier,
    "perceptron": models.perceptron,
    "convolution-1": lambda seed=0: models.convolution_net(1, seed),
    "convolution-2": lambda seed=0: models.convolution_net(2, seed),
    "convolution-3": lambda seed=0: models.convolution_net(3, seed),
    "embedding": models.embedding_net,
    "embedding-tied": lambda seed=0: models.embedding_net(seed, tied=True),
}


def told(recorded: nn.Module | Sketch, here: nn.Module, **over: Any) -> Likeness:
    """What `here` is, beside the recorded model."""
    sketch = recorded if isinstance(recorded, Sketch) else sketch_model(recorded)
    return compare(sketch, ModelWeights(here), Over(**over), name="someone/tiny")


def moved(model: nn.Module, size: float, *parts: str) -> nn.Module:
    """The model, with noise added to the weights whose names have one of these parts."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts or ("",)):
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.data += noise.to(parameter.dtype)
    return model


# --- the same base -------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_base_is_the_same_in_every_dtype(build: Callable[..., nn.Module]) -> None:
    for recorded in DTYPES:
        sketch = sketch_model(build().to(recorded))
        for here in DTYPES:
            likeness = told(sketch, build().to(here))
            assert (likeness.verdict, likeness.ok) == ("same", True), (recorded, here, likeness)
            assert likeness.sentence == "this has the weights of 'someone/tiny', the recorded base"


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_another_seed_is_another_model(build: Callable[..., nn.Module]) -> None:
    likeness = told(build(), build(seed=1))
    assert (likeness.verdict, likeness.ok) == ("other", False)
    assert "is another model than 'someone/tiny'" in likeness.sentence
    assert likeness.correlation is not None
    assert abs(likeness.correlation) < 0.5


def test_a_sketch_has_the_values_that_are_there() -> None:
    model = models.tiny_gpt2()
    weights = dict(model.named_parameters(remove_duplicate=True))
    found = samples(sketch_model(model))
    assert {sample.name for sample in found} == set(weights)
    for sample in found:
        assert sample.shape == tuple(weights[sample.name].shape)
        flat = weights[sample.name].detach().flatten()
        expected = flat[torch.from_numpy(sample.positions)].bfloat16().float().numpy()
        assert np.array_equal(sample.values, expected), sample.name


def test_values_beyond_the_range_of_fp16() -> None:
    def build() -> nn.Module:
        model = models.perceptron()
        model.up.weight.data *= 1e-6
        model.down.weight.data *= 1e6
        return model

    for recorded, here in ((torch.float16, torch.float32), (torch.bfloat16, torch.float16)):
        assert told(build().to(recorded), build().to(here)).verdict == "same"
    # Only where one side is fp16 is anything forgiven.
    assert told(build(), moved(build(), 1e-8, "up.weight")).verdict == "other"


def test_an_adapted_model_is_its_base() -> None:
    configs = {
        "llama": LoraConfig(
            r=2,
            target_modules=["q_proj", "embed_tokens"],
            modules_to_save=["lm_head"],
            bias="all",
        ),
        "gpt2": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        "convolution-2": LoraConfig(r=2, target_modules=["stem", "strided"]),
        "bert": LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"),
    }
    for name, config in configs.items():
        plain = sketch_model(BUILDS[name]())
        adapted = get_peft_model(BUILDS[name](), config)
        assert sketch_model(adapted.get_base_model()) == plain
    rows = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    adapted = get_peft_model(models.tiny_llama(), rows)
    assert sketch_model(adapted.get_base_model()) == sketch_model(models.tiny_llama())


def test_a_compiled_model_is_itself() -> None:
    assert sketch_model(torch.compile(models.perceptron())) == sketch_model(models.perceptron())


# --- from files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_give_the_sketch_of_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    for number, build in enumerate((models.tiny_llama, models.tiny_gpt2)):
        model = build().to(dtype)
        whole, sharded = tmp_path / f"whole{number}", tmp_path / f"sharded{number}"
        model.save_pretrained(whole)
        model.save_pretrained(sharded, max_shard_size="20KB")
        assert len(list(sharded.glob("*.safetensors"))) > 2
        in_memory = sketch_model(model)
        for directory in (whole, sharded):
            assert sketch_files(directory) == in_memory.model_copy(update={"whole": False})
            assert compare(in_memory, FileWeights(directory)).verdict == "same"
            assert told(sketch_files(directory), build()).verdict == "same"


def test_files_of_another_model(tmp_path: Path) -> None:
    models.tiny_llama(seed=1).save_pretrained(tmp_path)
    likeness = compare(sketch_model(models.tiny_llama()), FileWeights(tmp_path))
    assert likeness.verdict == "other"


def test_a_tied_head_may_be_in_the_files_or_not(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = models.tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    sketch = sketch_model(model)
    assert compare(sketch, FileWeights(tmp_path)).verdict == "same"
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert compare(sketch, FileWeights(tmp_path)).verdict == "same"
    # A sketch that has both is that of a model that has only one.
    both = sketch_files(tmp_path)
    assert any(pattern.startswith("lm_head.weight") for pattern in both.tensors)
    assert told(both, model).verdict == "same"
    untied = models.tiny_llama()
    untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight)
    tied = models.tiny_llama(tie_word_embeddings=True)
    tied.model.embed_tokens.weight.data.copy_(untied.model.embed_tokens.weight)
    assert told(tied, untied).verdict == "same"
    assert told(untied, tied).verdict == "same"


def random_values(model: nn.Module) -> nn.Module:
    """The model, with no weights that are all zeros or ones."""
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model.eval()


def test_files_that_name_or_fuse_their_tensors_otherwise(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    experts = MixtralConfig(
        **sizes, vocab_size=64, num_key_value_heads=2, num_local_experts=4, pad_token_id=0
    )
    vision = ViTConfig(**sizes, image_size=32, patch_size=8)
    built: dict[str, Callable[[], Any]] = {
        "experts": lambda: MixtralForCausalLM(experts),
        "vision": lambda: ViTForImageClassification(vision),
    }
    unseen = {"experts": 4, "vision": 0}
    for name, build in built.items():
        with models.seeded(0):
            model = random_values(build())
        model.save_pretrained(tmp_path / name)
        names = {tensor.partition(" ")[0] for tensor in FileWeights(tmp_path / name).tensors}
        assert names != {place for place, _ in model.named_parameters()}
        likeness = compare(sketch_model(model), FileWeights(tmp_path / name))
        assert likeness.verdict == "same"
        assert (f"{unseen[name]} of its weights can't be" in likeness.sentence) == bool(
            unseen[name]
        )
        with models.seeded(1):
            other = random_values(build())
        likeness = compare(sketch_model(other), FileWeights(tmp_path / name))
        assert likeness.verdict == "other"


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        sketch_files(tmp_path)


def test_files_are_compared_without_torch(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "sketch.json").write_text(sketch_model(models.tiny_llama()).model_dump_json())
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lamina.checkpoint.record import Sketch\n"
        "from lamina.checkpoint.sketch import FileWeights, compare\n"
        "here = Path(sys.argv[1])\n"
        "sketch = Sketch.model_validate_json((here / 'sketch.json').read_text())\n"
        "assert compare(sketch, FileWeights(here)).verdict == 'same'\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


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
