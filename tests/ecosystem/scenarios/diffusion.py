"""diffusers: a tiny text-to-image pipeline and its UNet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests import models

# What peft says of every adapter after the first.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WIDTH = 16


def pipeline() -> Any:
    """A Stable Diffusion without an autoencoder: it is asked for latents."""
    with models.seeded(0):
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=models.VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    made = StableDiffusionPipeline(
        vae=None,
        text_encoder=text.eval(),
        tokenizer=None,
        unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def unet_config(**changes: Any) -> Any:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ATTENTION, "init_lora_weights": False}
    return peft.LoraConfig(**settings | changes)


def text_config() -> Any:
    return unet_config(target_modules=["q_proj", "v_proj"])


def adapted(*names: str, text: bool = False, **changes: Any) -> Any:
    pipe = pipeline()
    torch.manual_seed(1)
    for name in names:
        pipe.unet.add_adapter(unet_config(**changes), adapter_name=name)
        if text:
            pipe.text_encoder.add_adapter(text_config(), adapter_name=name)
    return pipe


@torch.no_grad()
def denoised(unet: Any, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 5, WIDTH, generator=generator)
    return unet(sample, torch.tensor(3), states, **more).sample


@torch.no_grad()
def image(pipe: Any, **more: Any) -> Tensor:
    """The latents that the whole pipeline makes from fixed ids and noise."""
    ids = torch.tensor([[1, 5, 9, 13, 2]])
    return pipe(
        prompt_embeds=pipe.text_encoder(ids)[0],
        negative_prompt_embeds=pipe.text_encoder(ids.flip(1))[0],
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(4),
        **more,
    ).images


def delta(layer: Any, name: str) -> Tensor:
    """`(alpha / r) B A` by hand, for linears and convolutions."""
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    scaling = 4 / a.shape[0]
    if a.dim() == 2:
        return scaling * b @ a
    return scaling * torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)


def reference(unet: Any, weight: Any) -> Any:
    """A plain UNet with `weight(adapter, module)` times each adapter's update in its weights."""
    base = pipeline().unet
    for path, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for name in layer.lora_A:
                update = weight(name, path) * delta(layer, name)
                base.get_submodule(path).weight.data += update
    return base


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def bits(model: nn.Module) -> dict[str, Tensor]:
    named = model.state_dict()
    return {n: each.clone() for n, each in named.items() if "lora_" not in n}


@pytest.mark.parametrize("targets", [ATTENTION, ["conv1", "conv2", "to_q", "proj_in"]])
def test_adapters_act_with_their_weights(targets: list[str]) -> None:
    pipe = adapted("one", "two", target_modules=targets)
    plain = pipeline().unet
    assert not torch.allclose(denoised(pipe.unet), denoised(plain), atol=1e-4)
    pipe.set_adapters("one")
    close(denoised(pipe.unet), denoised(reference(pipe.unet, lambda n, _: n == "one")))
    pipe.set_adapters(["one", "two"], adapter_weights=[0.5, 0.25])
    weights = {"one": 0.5, "two": 0.25}
    close(denoised(pipe.unet), denoised(reference(pipe.unet, lambda n, _: weights[n])))
    assert pipe.get_active_adapters() == ["one", "two"]
    assert pipe.get_list_adapters() == {"unet": ["one", "two"]}
    pipe.set_adapters(["one", "two"])
    close(denoised(pipe.unet), denoised(reference(pipe.unet, lambda n, _: 1)))


def test_adapters_act_with_a_weight_for_each_block() -> None:
    pipe = adapted("one")
    weights = {"down": 0.5, "mid": 0.25, "up": {"block_0": [0.1, 0.7]}}
    pipe.set_adapters("one", adapter_weights={"unet": weights})

    def weight(_: str, path: str) -> float:
        if path.startswith("up_blocks"):
            return 0.1 if "attentions.0" in path else 0.7
        return 0.5 if path.startswith("down") else 0.25

    close(denoised(pipe.unet), denoised(reference(pipe.unet, weight)))


def test_a_scale_for_one_call() -> None:
    pipe = adapted("one", text=True)
    expected = denoised(reference(pipe.unet, lambda *_: 0.3))
    before = denoised(pipe.unet)
    close(denoised(pipe.unet, cross_attention_kwargs={"scale": 0.3}), expected)
    close(denoised(pipe.unet), before)
    whole = image(pipe)
    assert not torch.allclose(image(pipe, cross_attention_kwargs={"scale": 0.3}), whole)
    close(image(pipe), whole)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fusing_and_back_is_exact_to_the_bit(scale: float) -> None:
    pipe = adapted("one", "two", text=True)
    pipe.set_adapters(["one", "two"], adapter_weights=[0.7, 0.2])
    before = bits(pipe.unet), bits(pipe.text_encoder)
    answer = denoised(pipe.unet)
    pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=scale)
    assert pipe.num_fused_loras == 2
    assert pipe.fused_loras == {"one", "two"}
    weights = {"one": 0.7, "two": 0.2}
    close(denoised(pipe.unet), denoised(reference(pipe.unet, lambda n, _: scale * weights[n])))
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    assert pipe.num_fused_loras == 0
    for model, kept in zip((pipe.unet, pipe.text_encoder), before, strict=True):
        found = bits(model)
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept)
    if scale == 1:
        assert torch.equal(denoised(pipe.unet), answer)


def test_one_adapter_is_fused_by_name_and_unloaded_from_under_it() -> None:
    pipe = adapted("one", "two")
    expected = denoised(reference(pipe.unet, lambda n, _: n == "two"))
    pipe.fuse_lora(components=["unet"], adapter_names=["two"])
    pipe.unload_lora_weights()
    assert not any(isinstance(each, BaseTunerLayer) for each in pipe.unet.modules())
    close(denoised(pipe.unet), expected)


@pytest.mark.filterwarnings("ignore:Adapter two was active which is now deleted:UserWarning")
def test_switching_off_on_and_deleting() -> None:
    pipe = adapted("one", "two", text=True)
    plain = pipeline()
    on = image(pipe)
    pipe.disable_lora()
    close(image(pipe), image(plain))
    pipe.enable_lora()
    close(image(pipe), on)
    pipe.unet.disable_adapters()
    close(denoised(pipe.unet), denoised(plain.unet))
    pipe.unet.enable_adapters()
    pipe.delete_adapters("two")
    assert pipe.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}
    assert pipe.get_active_adapters() == ["one"]
    close(denoised(pipe.unet), denoised(reference(pipe.unet, lambda *_: 1)))
    pipe.delete_adapters(["one"])
    close(image(pipe), image(plain))
    pipe.unet.add_adapter(unet_config(), adapter_name="two")
    assert pipe.unet.active_adapters() == ["two"]
    assert not torch.allclose(denoised(pipe.unet), denoised(plain.unet), atol=1e-4)


def saved(pipe: Any, folder: Path, name: str = "one", **more: Any) -> dict[str, Tensor]:
    """The adapters of both models in diffusers' one file."""
    unet = get_peft_model_state_dict(pipe.unet, adapter_name=name)
    text = get_peft_model_state_dict(pipe.text_encoder, adapter_name=name)
    StableDiffusionPipeline.save_lora_weights(
        str(folder), unet_lora_layers=unet, text_encoder_lora_layers=text, **more
    )
    tensors = {f"unet.{key}": each for key, each in unet.items()}
    return tensors | {f"text_encoder.{key}": each for key, each in text.items()}


def metadata(pipe: Any, name: str = "one") -> dict[str, Any]:
    """The settings, alpha among them, that diffusers writes into the header."""
    return {
        "unet_lora_adapter_metadata": pipe.unet.peft_config[name].to_dict(),
        "text_encoder_lora_adapter_metadata": pipe.text_encoder.peft_config[name].to_dict(),
    }


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("source", ["directory", "state dict"])
def test_weights_are_loaded(source: str, low: bool, tmp_path: Path) -> None:
    pipe = adapted("one", text=True)
    tensors = saved(pipe, tmp_path, **metadata(pipe))
    again = pipeline()
    given = str(tmp_path) if source == "directory" else copy.deepcopy(tensors)
    again.load_lora_weights(given, adapter_name="mine", low_cpu_mem_usage=low)
    assert again.get_list_adapters() == {"unet": ["mine"], "text_encoder": ["mine"]}
    if source == "state dict":
        # Tensors alone say nothing of alpha: diffusers takes the rank.
        assert set(again.unet.peft_config["mine"].alpha_pattern.values()) <= {2}
        pipe.set_adapters("one", adapter_weights=0.5)
    close(image(again), image(pipe))
    again.load_lora_weights(given, adapter_name="other", low_cpu_mem_usage=low)
    assert again.get_active_adapters() == ["other"]
    with pytest.raises(ValueError, match="already in use"):
        again.load_lora_weights(given, adapter_name="mine", low_cpu_mem_usage=low)
    again.unload_lora_weights()
    close(image(again), image(pipeline()))


def test_weights_are_hotswapped(tmp_path: Path) -> None:
    pipe = adapted("one", "two", text=False)
    for name in ("one", "two"):
        StableDiffusionPipeline.save_lora_weights(
            str(tmp_path / name),
            unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name=name),
        )
    again = pipeline()
    again.load_lora_weights(str(tmp_path / "one"), adapter_name="it")
    pipe.set_adapters("one", adapter_weights=0.5)
    close(denoised(again.unet), denoised(pipe.unet))
    again.load_lora_weights(str(tmp_path / "two"), adapter_name="it", hotswap=True)
    pipe.set_adapters("two", adapter_weights=0.5)
    close(denoised(again.unet), denoised(pipe.unet))


def test_an_adapter_of_the_unet_alone_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = adapted("one")
    pipe.unet.save_lora_adapter(str(tmp_path), adapter_name="one")
    again = pipeline().unet
    name = "pytorch_lora_weights.safetensors"
    again.load_lora_adapter(str(tmp_path), prefix=None, adapter_name="mine", weight_name=name)
    close(denoised(again), denoised(pipe.unet))
    assert again.peft_config["mine"].lora_alpha == 4


def test_kohyas_names_and_alphas_are_read(tmp_path: Path) -> None:
    pipe = adapted("one", target_modules=["to_q"])
    tensors: dict[str, Tensor] = {}
    for path, layer in pipe.unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            name = "lora_unet_" + path.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = layer.lora_A["one"].weight.detach()
            tensors[f"{name}.lora_up.weight"] = layer.lora_B["one"].weight.detach()
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
    again = pipeline()
    again.load_lora_weights(tensors, adapter_name="mine")
    close(denoised(again.unet), denoised(pipe.unet))


def test_training_reaches_the_adapter_and_nothing_else() -> None:
    pipe = pipeline()
    pipe.unet.requires_grad_(False)
    torch.manual_seed(1)
    pipe.unet.add_adapter(unet_config(init_lora_weights="gaussian"))
    wanted = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    assert wanted
    assert all(".lora_" in name for name in wanted)
    optimizer = torch.optim.AdamW(wanted.values(), lr=1e-2)
    noise = torch.randn(1, 4, 8, 8)
    losses = []
    for _ in range(4):
        out = pipe.unet(noise, torch.tensor(3), torch.ones(1, 5, WIDTH)).sample
        loss = (out - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
