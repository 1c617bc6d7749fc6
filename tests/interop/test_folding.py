"""How the drop-in folds: over tied weights, twice, with NaNs; and what it disables."""

from __future__ import annotations

import pytest
import torch

from lamina.errors import FoldError
from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.lora_config import LoraConfig
from tests import models
from tests.adapters import logits

pytestmark = pytest.mark.filterwarnings("ignore:The model ties", "ignore:Model has `tie_word")
UNTIES = "Setting .*tie_word_embeddings=False"


def llama(*targets, tied=False, **more):
    base = models.tiny_llama(tie_word_embeddings=tied)
    torch.manual_seed(1)
    targets = targets or ("q_proj",)
    return get_peft_model(
        base, LoraConfig(target_modules=[*targets], init_lora_weights=False, **more)
    )


def test_an_embedding_tied_to_the_head_is_folded_alone_and_tied_again():
    model = llama("embed_tokens", tied=True)
    base = model.get_base_model()
    before, table = logits(model), base.lm_head.weight

    with pytest.warns(UserWarning, match=UNTIES):
        model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert base.lm_head.weight is not table or base.model.embed_tokens.weight is not table
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight is table
    assert base.config.tie_word_embeddings

    with pytest.warns(UserWarning, match=UNTIES):
        merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-5)
    assert not merged.config.tie_word_embeddings


def test_a_refused_fold_leaves_tied_weights_tied():
    model = llama("embed_tokens", tied=True)
    base = model.get_base_model()
    with torch.no_grad():
        base.model.embed_tokens.lora_embedding_A["default"][0, 0] = torch.nan

    told = r"NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.warns(UserWarning, match=UNTIES), pytest.raises(FoldError, match=told):
        model.merge_and_unload(safe_merge=True)
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight


def test_folding_again_warns_and_changes_nothing():
    model = llama()
    model.merge_adapter()
    before = logits(model)

    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)


def test_what_was_disabled_stays_so_after_the_context():
    model = llama()
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert not model.has_active_enabled_adapter
    assert model.has_active_enabled_adapter

    model.disable_adapter_layers()
    before = logits(model)
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model), before)


def test_layers_that_differ_are_all_enabled_afterwards_and_that_is_said():
    model = llama("q_proj", "v_proj")
    whole = logits(model)
    model.get_base_model().model.layers[0].self_attn.q_proj.enable_adapters(False)
    assert not torch.equal(logits(model), whole)

    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"):
        with model.disable_adapter():
            pass
    assert torch.equal(logits(model), whole)


def test_two_adapters_that_replace_one_module_are_not_activated_together():
    model = llama("q_proj", modules_to_save=["lm_head"])
    again = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("other", again)

    with pytest.raises(ValueError, match=r"Only one adapter can be set .* ModulesToSaveWrapper"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
