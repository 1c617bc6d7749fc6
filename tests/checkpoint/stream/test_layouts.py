"""Layouts that differ between files, model and result: ties, vocabularies, names, dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from lamina import LoraConfig, get_peft_model, load
from lamina.errors import CheckpointError, ConfigError, FoldError, MissingFileError
from lamina.stages.merged import MergeReport, save_merged
from tests import adapters, models
from tests.checkpoint.stream.merging import (
    differing,
    hashes,
    merged_both_ways,
    saved,
    tensors_of,
)

CONFIG = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def linear(**changes: Any) -> LoraConfig:
    return LoraConfig(**CONFIG | {"target_modules": ["q_proj", "down_proj"]} | changes)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def logits_of(directory: Path) -> torch.Tensor:
    return adapters.logits(AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval())


def test_the_files_are_laid_out_as_those_of_the_base(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear(), dtype=torch.bfloat16, shards=True)
    report, _ = merged_both_ways(tmp_path)
    base, made = tmp_path / "base", tmp_path / "streamed"
    names = {file.name for file in base.glob("*.safetensors")}
    assert len(names) > 1
    assert {file.name for file in made.glob("*.safetensors")} == names
    index = "model.safetensors.index.json"
    assert (made / index).read_bytes() == (base / index).read_bytes()
    assert (made / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert set(differing(made, base)) == {
        f"model.layers.{i}.{name}.weight"
        for i in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert report.changed == 4


def test_a_single_file_is_the_very_file_that_memory_writes(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear(), dtype=torch.bfloat16)
    merged_both_ways(tmp_path)
    one, other = (tmp_path / way / "model.safetensors" for way in ("streamed", "whole"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype(dtype: torch.dtype, shards: bool, tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear(), dtype=torch.bfloat16, shards=shards)
    report, _ = merged_both_ways(tmp_path, dtype=dtype)
    assert differing(tmp_path / "streamed", tmp_path / "whole") == []
    name = str(dtype).removeprefix("torch.")
    assert report.dtype == config_of(tmp_path / "streamed")["dtype"] == name
    if not shards:
        one, other = (tmp_path / way / "model.safetensors" for way in ("streamed", "whole"))
        assert one.read_bytes() == other.read_bytes()
    else:
        index = json.loads((tmp_path / "streamed/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(
            tensor.nbytes for tensor in tensors_of(tmp_path / "streamed").values()
        )


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    saved(models.tiny_llama(tie_word_embeddings=True), tmp_path, linear())
    merged_both_ways(tmp_path)
    assert differing(tmp_path / "streamed", tmp_path / "whole") == []
    assert "lm_head.weight" not in tensors_of(tmp_path / "streamed")


def test_an_adapter_on_one_of_two_tied_weights_is_refused(tmp_path: Path) -> None:
    base = models.tiny_llama(tie_word_embeddings=True)
    saved(base, tmp_path, linear(target_modules=["embed_tokens"]))
    for streaming in (True, False):
        with pytest.raises(FoldError, match=r"1 of 1 layers can't[^$]*tied to lm_head"):
            save_merged(
                tmp_path / "adapter",
                tmp_path / "out",
                base=str(tmp_path / "base"),
                streaming=streaming,
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_weights_trained_whole(module: str, shards: bool, tmp_path: Path) -> None:
    base = models.tiny_llama(tie_word_embeddings=True)
    saved(base, tmp_path, linear(modules_to_save=[module]), shards=shards)
    report, whole = merged_both_ways(tmp_path)
    assert differing(tmp_path / "streamed", tmp_path / "whole") == []
    assert config_of(tmp_path / "streamed")["tie_word_embeddings"] is False
    assert report.parameters == whole.parameters
    expected = adapters.logits(load(tmp_path / "adapter", str(tmp_path / "base")))
    assert (logits_of(tmp_path / "streamed") - expected).abs().max() < 1e-5


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_though_it_is_tied(equal: bool, tmp_path: Path) -> None:
    saved(models.tiny_llama(tie_word_embeddings=True), tmp_path, linear())
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1.0 if equal else 2.0)
    save_file(tensors, file, metadata={"format": "pt"})
    merged_both_ways(tmp_path)
    ours, theirs = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "whole")
    # Nothing is taken out of the files; in memory, what is tied is saved once.
    assert ours.keys() - theirs.keys() == ({"lm_head.weight"} if equal else set())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits_of(tmp_path / "streamed"), logits_of(tmp_path / "whole"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tokens_make_the_tables_larger(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = list(range(models.VOCABULARY, models.VOCABULARY + 3))
    config = linear(trainable_token_indices={"embed_tokens": rows, "lm_head": rows})
    saved(
        models.tiny_llama(),
        tmp_path,
        config,
        dtype=dtype,
        shards=True,
        adapt=lambda base: base.resize_token_embeddings(rows[-1] + 1, mean_resizing=False),
    )
    report, whole = merged_both_ways(tmp_path)
    assert differing(tmp_path / "streamed", tmp_path / "whole") == []
    made = tensors_of(tmp_path / "streamed")
    assert made["model.embed_tokens.weight"].shape[0] == rows[-1] + 1
    assert config_of(tmp_path / "streamed")["vocab_size"] == rows[-1] + 1
    assert report.parameters == whole.parameters
    index = json.loads((tmp_path / "streamed/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in made.values())
    assert torch.equal(logits_of(tmp_path / "streamed"), logits_of(tmp_path / "whole"))


def test_an_embedding_that_the_adapter_brings_along(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear(target_modules=["embed_tokens", "q_proj"]))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    weight = load_file(tmp_path / "base/model.safetensors")["model.embed_tokens.weight"]
    adapters.rewrite(tmp_path / "adapter", lambda file: {**file, key: weight + 1})
    merged_both_ways(tmp_path)
    assert differing(tmp_path / "streamed", tmp_path / "whole") == []


def test_old_names_stay_as_they_are(tmp_path: Path) -> None:
    base = models.tiny_bert_classifier()
    config = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    saved(base, tmp_path, config)
    file = tmp_path / "base" / "model.safetensors"
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    merged_both_ways(tmp_path)
    assert tensors_of(tmp_path / "streamed").keys() == old.keys()
    assert differing(tmp_path / "streamed", tmp_path / "whole") == []
    ours = BertForSequenceClassification.from_pretrained(tmp_path / "streamed").eval()
    expected = adapters.logits(load(tmp_path / "adapter", str(tmp_path / "base")))
    assert (adapters.logits(ours) - expected).abs().max() < 1e-5


def test_names_without_the_prefix_of_the_model_inside(tmp_path: Path) -> None:
    saved(models.tiny_gpt2(), tmp_path, linear(target_modules=["c_attn"]))
    file = tmp_path / "base" / "model.safetensors"
    bare = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    merged_both_ways(tmp_path)
    made = tensors_of(tmp_path / "streamed")
    assert made.keys() == bare.keys()
    whole = tensors_of(tmp_path / "whole")
    assert all(torch.equal(made[key], whole[f"transformer.{key}"]) for key in made)


def test_what_the_model_has_no_place_for_is_kept(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear())
    file = tmp_path / "base" / "model.safetensors"
    more = {"mtp.extra.weight": torch.randn(3, 4), "mtp.steps": torch.tensor([1, 2])}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    merged_both_ways(tmp_path)
    made = tensors_of(tmp_path / "streamed")
    assert all(torch.equal(made[key], tensor) for key, tensor in more.items())


def streamed_only(directory: Path) -> MergeReport:
    base = str(directory / "base")
    return save_merged(
        directory / "adapter", directory / "streamed", base=base, streaming=True, verify="samples"
    )


# --- what is done in memory, or not at all -------------------------------------------------------


def test_a_new_head_needs_the_model(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    base = models.tiny_bert_classifier()
    base.bert.config.architectures = ["BertModel"]
    base.bert.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    adapters.fill(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"can't be streamed.*BertModel"):
        save_merged(tmp_path / "adapter", tmp_path / "out", streaming=True)
    report = save_merged(tmp_path / "adapter", tmp_path / "out", num_labels=3)
    assert not report.streamed
    assert report.why_in_memory == "num_labels is for loading the base"


def cut_off(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def removed(base: Path) -> None:
    sorted(base.glob("*.safetensors"))[0].unlink()


def leads_out(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(found))


def twice(base: Path) -> None:
    first, second = sorted(base.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    tensors.update(dict(list(load_file(first).items())[:1]))
    save_file(tensors, second, metadata={"format": "pt"})


def linked(base: Path) -> None:
    secret = base.parent / "secret"
    secret.write_text("mine")
    (base / "LICENSE").symlink_to(secret)


@pytest.mark.parametrize(
    ("harm", "error", "says"),
    [
        (cut_off, CheckpointError, "cut off"),
        (removed, MissingFileError, "is missing"),
        (leads_out, CheckpointError, "leads out"),
        (twice, CheckpointError, "is in model-"),
        (linked, CheckpointError, "leads out"),
    ],
)
def test_a_broken_base_is_refused_and_left_alone(
    harm: Any, error: type[Exception], says: str, tmp_path: Path
) -> None:
    saved(models.tiny_llama(), tmp_path, linear(), shards=True)
    harm(tmp_path / "base")
    before = hashes(tmp_path / "base")
    with pytest.raises(error, match=says):
        save_merged(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert hashes(tmp_path / "base") == before
    assert not (tmp_path / "out").exists()


def test_a_licence_travels_and_weights_of_other_formats_do_not(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear())
    for name in ("LICENSE", "USE_POLICY.md", "model.gguf", "pytorch_model.bin", "run.py"):
        (tmp_path / "base" / name).write_text(name)
    report, _ = merged_both_ways(tmp_path)
    assert {"LICENSE", "USE_POLICY.md"} <= report.files.keys()
    assert not {"model.gguf", "pytorch_model.bin", "run.py"} & report.files.keys()


def test_the_tokenizer_of_the_adapter_goes_before_that_of_the_base(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear())
    for place, text in (("base", "of the base"), ("adapter", "with new tokens")):
        (tmp_path / place / "tokenizer.json").write_text(text)
        (tmp_path / place / "chat_template.jinja").write_text(text)
    report = streamed_only(tmp_path)
    assert report.tokenizer == str(tmp_path / "adapter")
    assert (tmp_path / "streamed" / "tokenizer.json").read_text() == "with new tokens"
    assert (tmp_path / "streamed" / "chat_template.jinja").read_text() == "with new tokens"


def test_code_is_copied_only_where_the_base_needs_it_and_never_run(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear())
    ran = tmp_path / "ran"
    (tmp_path / "base" / "modeling.py").write_text(f"open({str(ran)!r}, 'w')")
    config = config_of(tmp_path / "base")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    report = streamed_only(tmp_path)
    assert "modeling.py" in report.files
    assert config_of(tmp_path / "streamed") == config
    assert not ran.exists()


def test_a_base_stored_quantised_is_merged_in_memory_or_refused(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear())
    config = config_of(tmp_path / "base")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="stored quantised"):
        streamed_only(tmp_path)


def test_8_bit_floats_are_no_sums(tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear())
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"q_proj.weight is stored as F8_E4M3"):
        streamed_only(tmp_path)


@pytest.mark.parametrize("verify", ["model", "auto", "samples", "none"])
def test_what_is_looked_at_is_told(verify: Any, tmp_path: Path) -> None:
    saved(models.tiny_llama(), tmp_path, linear(), dtype=torch.bfloat16)
    report = save_merged(
        tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"), verify=verify
    )
    if verify == "none":
        assert report.verified is None
        return
    assert report.verified is not None
    assert report.verified.how == ("samples" if verify == "samples" else "model")
    assert (report.max_logit_difference is None) == (verify == "samples")


def test_an_unknown_way_to_look_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="verify='look' is unknown"):
        save_merged(tmp_path, tmp_path / "out", verify="look")  # type: ignore[arg-type]
