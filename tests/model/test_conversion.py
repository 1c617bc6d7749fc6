from __future__ import annotations

from typing import Any

import pytest
import torch

from lamina import LoraConfig, get_peft_model
from lamina.errors import AdapterNameError, ConversionError
from lamina.model.conversion import convert_to_lora, supports_lora_conversion
from lamina.model.intruders import reduce_intruder_dimension
from tests import models
from tests.adapters import fill, llama_adapter, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already")


def test_a_full_rank_gives_the_same_update_with_the_scaling_one() -> None:
    model = llama_adapter(lora_alpha=9)
    config, tensors = convert_to_lora(model, 4)
    assert (config.r, config.lora_alpha) == (4, 4)
    assert not config.rank_pattern
    for name, layer in model.named_modules():
        if hasattr(layer, "records"):
            update = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            torch.testing.assert_close(update, layer.get_delta_weight("default"))


def test_it_warns_that_it_is_lora_already() -> None:
    with pytest.warns(UserWarning, match="that is already a LoRA adapter"):
        convert_to_lora(llama_adapter(), 2)


def test_half_precision_stays() -> None:
    model = get_peft_model(
        models.tiny_llama().bfloat16(),
        LoraConfig(target_modules=["q_proj"]),
        autocast_adapter_dtype=False,
    )
    fill(model)
    assert {t.dtype for t in convert_to_lora(model, 2)[1].values()} == {torch.bfloat16}


def test_a_model_without_a_facade_names_its_own_targets() -> None:
    model = llama_adapter().get_base_model()
    config, tensors = convert_to_lora(model, 2)
    assert config.target_modules == {key.rpartition(".lora_")[0] for key in tensors}


@pytest.mark.parametrize("field", ["bias", "lora_bias"])
def test_trained_biases_are_refused(field: str) -> None:
    config: dict[str, Any] = {field: "all" if field == "bias" else True}
    model = get_peft_model(models.perceptron(), LoraConfig(target_modules=["up"], **config))
    with pytest.raises(ConversionError, match="The adapter's config sets"):
        convert_to_lora(model, 2)


def test_convolutions_are_refused() -> None:
    config = LoraConfig(target_modules=["stem"])
    model = get_peft_model(models.convolution_net(2), config)
    assert not supports_lora_conversion(model)
    assert not model.supports_lora_conversion()
    assert llama_adapter().supports_lora_conversion()
    with pytest.raises(ConversionError, match="do not support LoRA conversion") as caught:
        convert_to_lora(model, 2)
    assert "stem" in caught.value.faults[0]


def test_layers_of_other_adapters_are_left_alone() -> None:
    model = llama_adapter()
    model.add_adapter("other", LoraConfig(target_modules=["o_proj", "q_proj"], r=3))
    fill(model, "other", seed=2)
    tensors = convert_to_lora(model, 3, "other")[1]
    assert {key.split(".")[-3] for key in tensors} == {"o_proj", "q_proj"}


def test_a_progress_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    convert_to_lora(llama_adapter(), 2, progressbar=True)
    assert "Converting to LoRA" in capsys.readouterr().err


# --- intruders -----------------------------------------------------------------------------------


def test_intruders_of_a_convolution_and_their_bias() -> None:
    config = LoraConfig(target_modules=["stem"], r=3, lora_bias=True)
    model = get_peft_model(models.convolution_net(2), config)
    fill(model, size=1.0)
    layer = model.base_model.model.stem
    before = layer.get_delta_weight("default")
    reduce_intruder_dimension(model, threshold_epsilon=999, top_k=2, logging_sink=None)
    after = layer.get_delta_weight("intruder_reduced")
    u, s, vh = torch.linalg.svd((layer.weight + before).flatten(1), full_matrices=False)
    wanted = before.flatten(1) - 0.25 * u[:, :2] * s[:2] @ vh[:2]
    u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
    torch.testing.assert_close(after.flatten(1), u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.lora_B["intruder_reduced"].bias, layer.lora_B["default"].bias)


def test_what_has_no_intruders_to_find_is_refused_unchanged() -> None:
    with pytest.raises(ValueError, match="not using LoRA"):
        reduce_intruder_dimension(models.perceptron())
    with pytest.raises(AdapterNameError):
        reduce_intruder_dimension(llama_adapter(), "other")
    model = get_peft_model(models.convolution_net(2), LoraConfig(target_modules=["grouped"], r=2))
    before = weights(model)
    with pytest.raises(ConversionError, match="1 place"):
        reduce_intruder_dimension(model)
    assert same(before, weights(model))
