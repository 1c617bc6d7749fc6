"""What peft's guides and docstrings promise of LoRA, where only the drop-in promises it too."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from torch import nn

from lamina.config import EvaConfig, LoraGAConfig, LoraRuntimeConfig
from lamina.interop.peft.adalora import AdaLoraConfig
from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.facade import PeftModel
from lamina.interop.peft.injecting import inject_adapter_in_model
from lamina.interop.peft.kinds import LoraLayer
from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.lora_eva import get_eva_state_dict, initialize_lora_eva_weights
from lamina.interop.peft.lora_loraga import estimate_gradients
from lamina.interop.peft.mixed import PeftMixedModel
from lamina.interop.peft.scripts import update_forward_signature
from lamina.interop.peft.switching import delete_adapter
from lamina.interop.peft.trainable_tokens import TrainableTokensConfig
from tests import models


def config(*targets, **more):
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **more)


def test_combining_returns_nothing_and_leaves_an_adapter_of_that_name_alone():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config("0"))
    model.add_adapter("b", config("0"))

    assert model.add_weighted_adapter(["default", "b"], [1, 1], "sum") is None
    before = model.base_model.model[0].lora_A["sum"].weight.clone()
    with pytest.warns(UserWarning, match="'sum' already"):
        assert model.add_weighted_adapter(["default", "b"], [3, 1], "sum") is None
    assert torch.equal(model.base_model.model[0].lora_A["sum"].weight, before)


def test_mixed_models_combine_nothing():
    model = PeftMixedModel(nn.Sequential(nn.Linear(4, 4)), config("0"))

    with pytest.raises(NotImplementedError, match="Weighted adapters are not supported"):
        model.add_weighted_adapter(["default"], [1], "other")
    assert list(model.peft_config) == ["default"]


def test_deleting_the_only_active_adapter_tells_which_one_takes_over():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config("0"))
    model.add_adapter("b", config("0"))

    with pytest.warns(UserWarning, match="default was active which is now deleted.*to b"):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    model.delete_adapter("b")
    assert model.active_adapters == []


def test_the_function_that_deletes_passes_over_unknown_names():
    model = inject_adapter_in_model(config("0"), nn.Sequential(nn.Linear(4, 4)))

    assert delete_adapter(model, "nobody", prefix="lora_") == ["default"]
    assert delete_adapter(model, "default", prefix="lora_") is None


@pytest.mark.parametrize(("task", "with_head"), [(None, True), ("SEQ_CLS", False)])
def test_all_linear_leaves_a_classifier_out_where_the_task_says_so(task, with_head):
    base = models.tiny_bert_classifier()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type=task))

    assert ("classifier" in model.targeted_module_names) is with_head


def test_all_linear_takes_heads_of_models_of_your_own():
    base = nn.ModuleDict({"body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 2)})
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))

    assert set(model.targeted_module_names) == {"body", "lm_head"}


def test_all_linear_leaves_a_head_out_that_is_kept_tied():
    base = nn.ModuleDict({"body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 2)})
    settings = LoraConfig(r=2, target_modules="all-linear", ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        model = get_peft_model(base, settings)

    assert model.targeted_module_names == ["body"]


def test_directions_of_the_plain_model_fit_the_adapted_one():
    data = [torch.rand(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    settings = LoraConfig(
        r=2, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    options = {
        "forward_fn": lambda model, x: model(x),
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
        "show_progress_bar": False,
    }
    found = get_eva_state_dict(nn.Sequential(nn.Linear(4, 4)), data, settings, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), settings, low_cpu_mem_usage=True)

    initialize_lora_eva_weights(model, eva_state_dict=found)
    assert list(found) == ["0"]
    assert torch.equal(model.base_model.model[0].lora_A["default"].weight, found["0"].float())


def test_the_shown_signature_is_the_base_models():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, pixels, mask=None):
            return self.layer(pixels)

    model = get_peft_model(Base(), config("layer"))
    update_forward_signature(model)

    assert list(inspect.signature(model.forward).parameters) == ["pixels", "mask"]
    assert model(torch.zeros(1, 4)).shape == (1, 4)


class Scaled(nn.Module, LoraLayer):
    """A layer of one's own, for a module that peft can't adapt."""

    def __init__(self, base_layer, adapter_name, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_scale = nn.ParameterDict({adapter_name: nn.Parameter(torch.ones(4))})

    def update_layer(self, *args, **kwargs):
        pass

    def forward(self, x):
        return self.base_layer(x) * self.lora_scale["default"]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_parameters_of_layers_of_your_own_are_saved_and_loaded(tmp_path):
    def adapt_norms(settings):
        settings._register_custom_module({nn.LayerNorm: Scaled})
        return settings

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    model = get_peft_model(base(), adapt_norms(config("0", "1")))
    model.base_model.model[1].lora_scale["default"].data.fill_(3)
    model.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(
        base(), tmp_path, config=adapt_norms(LoraConfig.from_pretrained(tmp_path))
    )
    x = torch.randn(2, 4)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.base_model.model[1].lora_scale["default"], torch.full((4,), 3.0))


def test_rows_of_a_table_that_is_adapted_itself_are_refused():
    settings = LoraConfig(r=2, target_modules=["embed_tokens"], trainable_token_indices=[0, 1])
    base = models.tiny_llama()

    with pytest.raises(TypeError, match=r"modules of type <class 'peft.*layer.Embedding'>"):
        get_peft_model(base, settings)
    assert type(base.model.embed_tokens) is nn.Embedding


def test_the_file_of_trained_rows_holds_that_methods_settings_only(tmp_path):
    settings = TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"])
    get_peft_model(models.tiny_llama(), settings).save_pretrained(tmp_path)

    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() == {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights"),
        *("peft_type", "peft_version", "revision", "target_modules", "task_type"),
        "token_indices",
    }
    assert (written["peft_type"], written["token_indices"]) == ("TRAINABLE_TOKENS", [1, 3])


def test_what_can_never_be_merged_is_not_implemented():
    settings = config("q_proj", alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    model = get_peft_model(models.tiny_llama(), settings)

    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
            merge()
    with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
        model.base_model.model.model.layers[0].self_attn.q_proj.merge()


@pytest.mark.parametrize(
    ("settings", "kind", "layer"),
    [
        (AdaLoraConfig(target_modules=["q_proj"], total_step=9), "ADALORA", "adalora.SVDLinear"),
        (TrainableTokensConfig(token_indices=[1]), "TRAINABLE_TOKENS", "TrainableTokensLayer"),
        (LoraConfig(target_modules=["q_proj"]), "LORA", "lora.Linear"),
    ],
)
def test_the_status_names_method_and_layer(settings, kind, layer):
    model = get_peft_model(models.tiny_llama(), settings)

    whole, first = model.get_model_status(), model.get_layer_status()[0]
    assert whole.peft_types == {"default": kind}
    assert whole.requires_grad == first.requires_grad == {"default": True}
    assert first.module_type == layer


def test_gradients_can_be_estimated_by_themselves():
    base = nn.Sequential(nn.Linear(3, 2, bias=False))
    settings = LoraConfig(
        target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    x = torch.tensor([[1.0, 2.0, 3.0]])

    estimate_gradients(base, settings, lambda: base(x).sum().backward())
    assert torch.equal(base[0]._peft_loraga_grad, x.expand(2, 3))


def test_a_new_adapter_drops_entries_until_it_is_evaluated():
    settings = LoraConfig(
        r=2, target_modules=["0"], lora_dropout=0.5, lora_alpha=64, init_lora_weights=False
    )
    model = get_peft_model(nn.Sequential(nn.Linear(32, 8)).eval(), settings)
    x = torch.ones(4, 32)

    assert not torch.equal(model(x)[0], model(x)[1])
    assert not model.base_model.model[0].base_layer.training
    model.eval()
    assert torch.equal(model(x)[0], model(x)[1])


def test_layers_keep_what_they_were_made_with():
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config("1", runtime_config=runtime)
    )

    layer = model.base_model.model[1]
    assert layer.kwargs["target_name"] == "1"
    assert layer.ephemeral_gpu_offload is True
