from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamina.errors import PreflightError
from lamina.model import (
    PeftModel,
    check_gradients,
    get_peft_model,
    inject_adapter_in_model,
    preflight,
)
from tests import models
from tests.adapters import fill, llama_adapter, llama_config, trained


def refused(model: torch.nn.Module) -> PreflightError:
    with pytest.raises(PreflightError) as caught:
        preflight(model)
    return caught.value


def step(model: PeftModel) -> None:
    ids = models.token_ids()
    model(input_ids=ids, labels=ids).loss.backward()


def test_what_is_ready_to_train_passes() -> None:
    model = get_peft_model(models.tiny_llama(), llama_config())
    preflight(model)
    model.add_adapter("two", llama_config())
    model.set_adapter(["default", "two"], train=["two"])
    preflight(model)
    preflight(inject_adapter_in_model(llama_config(), models.tiny_llama()))


def test_a_frozen_adapter_is_told_with_its_cure(tmp_path: Path) -> None:
    llama_adapter().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    error = refused(model)
    assert any("0 trainable parameters" in fault for fault in error.faults)
    assert any("'default' is frozen" in fault for fault in error.faults)
    assert error.cure is not None
    assert "is_trainable=True" in error.cure
    call = error.cure.partition("or ")[2]
    assert call == "model.set_adapter(['default'], train=['default'])"
    model.set_adapter(["default"], train=["default"])
    preflight(model)


def test_an_idle_trainable_adapter_is_told_with_its_cure() -> None:
    model = llama_adapter()
    model.add_adapter("two", llama_config())
    model.set_requires_grad("default", False)
    error = refused(model)
    assert any("'two' is not active" in fault for fault in error.faults)
    assert error.cure == "model.set_adapter(['default', 'two'], train=['two'])"
    model.set_adapter(["default", "two"], train=["two"])
    preflight(model)


def test_a_folded_adapter_does_not_learn() -> None:
    model = llama_adapter()
    model.merge_adapter()
    error = refused(model)
    assert any("'default' is folded" in fault for fault in error.faults)
    assert "unmerge_adapter" in (error.cure or "")
    model.unmerge_adapter()
    preflight(model)


def test_switched_off_adapters_do_not_learn() -> None:
    model = llama_adapter()
    with model.disable_adapter():
        assert any("switched off" in fault for fault in refused(model).faults)
    preflight(model)


def test_weights_that_are_not_there_do_not_learn() -> None:
    model = get_peft_model(models.tiny_llama(), llama_config(), low_cpu_mem_usage=True)
    assert any("8 adapter weights are on the meta device" in f for f in refused(model).faults)


def test_models_without_adapters_are_refused() -> None:
    assert "get_peft_model" in (refused(models.tiny_llama()).cure or "")
    with pytest.raises(PreflightError):
        check_gradients(models.tiny_llama())


def test_everything_that_is_wrong_is_listed() -> None:
    model = llama_adapter()
    model.add_adapter("two", llama_config())
    model.merge_adapter(["default"])
    assert len(refused(model).faults) == 2


def test_gradients_that_arrived_pass() -> None:
    model = get_peft_model(models.tiny_llama().train(), llama_config())
    step(model)
    check_gradients(model)


def test_gradients_that_did_not_arrive_are_told() -> None:
    model = get_peft_model(models.tiny_llama().train(), llama_config())
    with pytest.raises(PreflightError, match="8 adapter weights got no gradient"):
        check_gradients(model)
    # Cut off between the layers: only what comes after it learns.
    model.get_base_model().model.layers[1].register_forward_pre_hook(
        lambda module, args: (args[0].detach(), *args[1:])
    )
    step(model)
    with pytest.raises(PreflightError, match="4 adapter weights got no gradient") as caught:
        check_gradients(model)
    assert all("layers.0" in fault for fault in caught.value.faults)


def test_broken_gradients_are_told() -> None:
    model = get_peft_model(models.tiny_llama().train(), llama_config())
    step(model)
    name = min(trained(model))
    model.get_parameter(name).grad[0, 0] = float("nan")
    with pytest.raises(PreflightError, match="1 a broken one"):
        check_gradients(model)


def test_the_count_says_why_nothing_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_adapter().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    model.print_trainable_parameters()
    line, reason = capsys.readouterr().out.splitlines()
    assert line.startswith("trainable params: 0 || all params:")
    assert "'default' is frozen" in reason
    assert "is_trainable=True" in reason
    model.add_adapter("two", llama_config())
    fill(model, "two")
    model.print_trainable_parameters()
    assert "'two' is trainable but not active" in capsys.readouterr().out
    model.set_adapter("two")
    model.print_trainable_parameters()
    assert "Nothing trains" not in capsys.readouterr().out
