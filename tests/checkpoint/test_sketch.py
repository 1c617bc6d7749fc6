"""The same base is known in every dtype and from files, another is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lamina.checkpoint.sketch import FileWeights, compare, sketch_files
from lamina.checkpoint.sketch.memory import sketch_model
from lamina.checkpoint.sketch.stored import samples
from lamina.config import LoraConfig
from lamina.errors import MissingFileError
from lamina.model import get_peft_model
from tests import models
from tests.checkpoint.sketching import DTYPES, moved, told

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


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert FileWeights(tmp_path).config == {}
