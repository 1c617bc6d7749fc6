"""Models that transformers loads quantised, under the facade and in a chain of stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import lamina
from lamina.stages.bases import describe_base
from lamina.stages.merged import save_merged
from tests import models

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _nf4() -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def _int8() -> Any:
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao() -> Any:
    import torchao.quantization as ao

    return TorchAoConfig(ao.Int8WeightOnlyConfig())


QUANTISERS: dict[str, tuple[Callable[[], Any], str]] = {
    "nf4": (_nf4, "bitsandbytes nf4"),
    "int8": (_int8, "bitsandbytes int8"),
    "torchao": (_torchao, "torchao Int8Tensor"),
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base on the disk; bitsandbytes wants sides that are multiples of 64."""
    path = tmp_path_factory.mktemp("base")
    # Head and embedding bigger than usual, so that answers differ between tokens.
    model = models.tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.1)
    model.save_pretrained(path)
    return path


def opened(saved: Path, quantiser: str | None) -> Any:
    settings = {} if quantiser is None else {"quantization_config": QUANTISERS[quantiser][0]()}
    model = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, device_map={"": "cpu"}, **settings
    )
    return model.eval()


def config(**settings: Any) -> lamina.LoraConfig:
    return lamina.LoraConfig(
        **{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **settings}
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=models.token_ids()).logits


def adapted(saved: Path, quantiser: str | None, **settings: Any) -> Any:
    with models.seeded(4):
        return lamina.get_peft_model(opened(saved, quantiser), config(**settings)).eval()


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_parameters_count_as_those_of_the_dense_model(saved: Path, quantiser: str) -> None:
    model, dense = adapted(saved, quantiser), adapted(saved, None)
    assert model.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
    status = lamina.get_model_status(model)
    assert status.total_params == dense.get_nb_trainable_parameters()[1]


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_all_linear_finds_what_it_finds_in_the_dense_model(saved: Path, quantiser: str) -> None:
    names = lamina.find_all_linear_names(opened(saved, quantiser))
    assert names == lamina.find_all_linear_names(opened(saved, None))
    assert len(names) == 7


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_adapters_are_saved_and_loaded(saved: Path, quantiser: str, tmp_path: Path) -> None:
    model = adapted(saved, quantiser)
    model.save_pretrained(tmp_path)
    loaded = lamina.PeftModel.from_pretrained(opened(saved, quantiser), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    # The file is that of any base.
    dense = lamina.PeftModel.from_pretrained(opened(saved, None), tmp_path).eval()
    assert (logits(dense) - logits(model)).abs().max() < 0.5 * logits(model).abs().max()


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_stages_are_stacked_over_a_quantised_base(
    saved: Path, quantiser: str, tmp_path: Path
) -> None:
    with models.seeded(5):
        first = lamina.begin_stage(opened(saved, quantiser), config=config(), name="domain")
    record = lamina.save_stage(first, tmp_path / "domain")
    assert record.newest.base.quantization == QUANTISERS[quantiser][1]
    assert record.newest.base.dtype == "float32"
    with models.seeded(6):
        second = lamina.begin_stage(
            opened(saved, quantiser),
            name="chat",
            parent=tmp_path / "domain",
            mode="stack",
            config=config(r=2, target_modules=["k_proj", "q_proj"]),
        )
    lamina.save_stage(second, tmp_path / "chat")
    loaded = lamina.load(tmp_path / "chat", opened(saved, quantiser))
    torch.testing.assert_close(logits(loaded), logits(second.eval()), atol=2e-2, rtol=0)
    assert not torch.allclose(logits(loaded), logits(first.eval()), atol=0.1)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_parent_is_not_merged_into_codes(saved: Path, quantiser: str, tmp_path: Path) -> None:
    lamina.save_stage(
        lamina.begin_stage(opened(saved, quantiser), config=config(), name="domain"), tmp_path / "a"
    )
    with pytest.raises(lamina.FoldError, match="mode 'stack'"):
        lamina.begin_stage(
            opened(saved, quantiser),
            parent=tmp_path / "a",
            name="chat",
            mode="merge",
            config=config(),
        )


def test_a_dense_base_is_recorded_as_one(saved: Path) -> None:
    assert describe_base(opened(saved, None)).quantization is None


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_dequantised_models_are_saved_and_opened_as_dense_ones(
    saved: Path, quantiser: str, tmp_path: Path
) -> None:
    model = adapted(saved, quantiser)
    before = logits(model)
    merged = model.merge_and_unload(target="dequantized")
    kinds = {type(m).__module__.partition(".")[0] for m in merged.modules()}
    assert "bitsandbytes" not in kinds
    assert all(type(p) is torch.nn.Parameter for p in merged.parameters())
    expected = logits(merged)
    # 8-bit products round their inputs too, and packed 4-bit ones are in bf16.
    torch.testing.assert_close(expected, before, atol=0.05 * before.abs().max().item(), rtol=0)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert getattr(again.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(again), expected)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_merges_are_measured_and_the_model_stays_as_it_was(saved: Path, quantiser: str) -> None:
    model = adapted(saved, quantiser).train()
    inputs = {"input_ids": models.token_ids()}
    state = {name: p.clone() for name, p in model.named_parameters() if "lora" in name}
    before = logits(model.eval())
    model.train()
    found = lamina.compare_merges(model, inputs, base=opened(saved, None))
    assert model.training
    assert [each.target for each in found] == ["quantized", "dequantized", "original"]
    quantized, dequantized, original = found
    # What is only dequantised keeps the function; codes can't hold the sum.
    assert dequantized.max_logit_difference <= quantized.max_logit_difference
    assert dequantized.max_logit_difference < original.max_logit_difference
    assert 0 <= dequantized.kl <= quantized.kl
    assert 0.8 <= dequantized.top1_agreement <= 1
    assert quantized.max_logit == pytest.approx(before.abs().max().item())
    model.eval()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters() if "lora" in n)


def test_a_measure_is_that_of_the_merge_itself(saved: Path) -> None:
    model = adapted(saved, "torchao")
    measured = lamina.compare_merges(model, {"input_ids": models.token_ids()})[0]
    before = logits(model)
    after = logits(model.merge_and_unload(target="quantized"))
    assert measured.max_logit_difference == (before - after).abs().max().item()
    kl = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True
    )
    assert measured.kl == pytest.approx(kl.sum(-1).mean().item(), rel=1e-3)
    same = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    assert measured.top1_agreement == same


def test_a_base_of_another_shape_is_refused(saved: Path) -> None:
    model = adapted(saved, "torchao")
    with pytest.raises(lamina.FoldError, match="q_proj"):
        lamina.compare_merges(model, {"input_ids": models.token_ids()}, base=models.tiny_llama())


def test_contradicting_settings_are_refused(saved: Path) -> None:
    model = adapted(saved, "torchao")
    with pytest.raises(lamina.ConfigError, match="unknown"):
        model.merge_and_unload(target="dense")
    with pytest.raises(lamina.ConfigError, match="dtype"):
        model.merge_and_unload(target="quantized", dtype=torch.bfloat16)
    with pytest.raises(lamina.ConfigError, match="for good"):
        model.merge_adapter(target="dequantized")
    assert model.active_adapters == ["default"]


def test_an_adapter_trained_over_codes_is_merged_into_the_original(
    saved: Path, tmp_path: Path
) -> None:
    with models.seeded(5):
        model = lamina.begin_stage(opened(saved, "nf4"), config=config(), name="domain")
    lamina.save_stage(model, tmp_path / "domain")
    told = "but dense instead of bitsandbytes nf4"
    with pytest.warns(lamina.MismatchWarning, match=told):
        report = save_merged(tmp_path / "domain", tmp_path / "out", base=str(saved))
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-4
    with pytest.warns(lamina.MismatchWarning, match=told):
        dense = lamina.load(tmp_path / "domain", opened(saved, None))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), logits(dense), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def prequantised(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose files are in 4 bits."""
    path = tmp_path_factory.mktemp("nf4")
    opened(saved, "nf4").save_pretrained(path)
    return path


@pytest.mark.parametrize("target", ["quantized", "dequantized"])
def test_a_base_stored_in_codes_is_merged_by_target(
    prequantised: Path, target: str, tmp_path: Path
) -> None:
    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(prequantised, device_map={"": "cpu"})

    with models.seeded(5):
        model = lamina.begin_stage(base(), config=config(), name="domain")
    record = lamina.save_stage(model, tmp_path / "domain")
    assert record.newest.base.quantization == "bitsandbytes nf4"
    with pytest.raises(lamina.FoldError, match="target="):
        save_merged(tmp_path / "domain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = save_merged(tmp_path / "domain", tmp_path / "out", target=target)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    quantised = getattr(again.config, "quantization_config", None) is not None
    assert quantised == (target == "quantized")
    assert report.max_logit_difference is not None
    limit = {"quantized": 0.5, "dequantized": 0.05}[target]
    assert report.max_logit_difference < limit * report.max_logit
    assert report.dtype == "float32"


def test_a_dtype_for_codes_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(lamina.ConfigError, match="become dense"):
        save_merged(tmp_path / "a", tmp_path / "out", target="quantized", dtype=torch.float16)
