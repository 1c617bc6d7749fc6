"""Without a record, on loading, and what saving asks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina import begin_stage, load, save_stage
from lamina.checkpoint.probe import answers_of, ask
from lamina.errors import (
    AlreadyAdaptedError,
    CheckpointError,
    MismatchWarning,
    ProbeWarning,
    StageError,
    VerificationError,
)
from lamina.model import PeftModel, get_peft_model
from lamina.stages import verify
from tests import adapters, models
from tests.stages.chains import (
    Snapshot,
    fill_trainable,
    llama_lora,
    metadata_of,
    run_stage,
)
from tests.stages.verifying import (
    CHAT,
    DOMAIN,
    V_PROJ,
    blamed,
    changed,
    demo_stage,
    double_alpha,
    double_b,
    four_bits,
    verdicts,
)

# --- without a record ----------------------------------------------------------------------------


def plain(path: Path, model: PeftModel) -> Path:
    model.save_pretrained(path)
    return path


def test_a_plain_adapter_passes_and_is_not_proved(tmp_path: Path) -> None:
    path = plain(tmp_path / "plain", adapters.llama_adapter())
    report = verify(path, models.tiny_llama())
    assert report.passed
    assert not report.proved
    found = {check.name: check for check in report.checks}
    assert found["answers"].verdict == "not checked"
    assert "save_stage" in found["answers"].detail
    assert found["effect"].verdict == "passed"
    assert "changes the answers" in found["effect"].detail


@pytest.mark.filterwarnings("ignore:.*all .* B matrices are zero")
def test_a_plain_adapter_that_changes_nothing_fails(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny_llama(), adapters.llama_config())
    report = verify(plain(tmp_path / "plain", model), models.tiny_llama())
    blamed(report, "adapter not applied")


def test_a_plain_adapter_that_lacks_a_tensor(tmp_path: Path) -> None:
    path = plain(tmp_path / "plain", adapters.llama_adapter())
    key = f"{V_PROJ}.lora_A.weight"
    broken = changed(path, tmp_path / "broken", lambda x: {k: v for k, v in x.items() if k != key})
    assert key in blamed(verify(broken, models.tiny_llama()), "incomplete file")


def test_a_probe_of_a_newer_version_is_not_replayed(runs: Path, tmp_path: Path) -> None:
    def newer(record: dict[str, Any]) -> None:
        record["stages"][-1]["probe"]["version"] = 2

    report = verify(changed(runs / "chat", tmp_path / "chat", record=newer), models.tiny_llama())
    assert report.passed
    assert not report.proved
    assert any("newer Lamina made the probe" in note for note in report.notes)


def test_a_scale_that_contradicts_the_record_counts_where_there_is_no_probe(
    runs: Path, tmp_path: Path
) -> None:
    def without_probes(record: dict[str, Any]) -> None:
        for stage in record["stages"]:
            stage.pop("probe")

    path = changed(runs / "chat", tmp_path / "ok", record=without_probes)
    assert verify(path, models.tiny_llama()).passed
    twice = changed(path, tmp_path / "twice", config=double_alpha)
    assert "scaled by 2" in blamed(verify(twice, models.tiny_llama()), "adapter scaled")


# --- errors, and loading -------------------------------------------------------------------------


def test_what_cannot_be_verified_is_an_error(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        verify(tmp_path / "nothing", models.tiny_llama())
    with pytest.raises(CheckpointError, match="doesn't name its base"):
        verify(runs / "chat")
    with pytest.raises(AlreadyAdaptedError):
        verify(runs / "chat", adapters.llama_adapter().get_base_model())
    with pytest.raises(StageError, match="loaded already") as caught:
        verify(runs / "chat", models.tiny_llama(), dtype="float16", load_in_4bit=True)
    assert len(caught.value.faults) == 2


def test_loading_verifies_where_it_is_asked_to(runs: Path, tmp_path: Path) -> None:
    model = load(runs / "chat", models.tiny_llama(), verify=True)
    assert model.active_adapters == ["chat"]
    broken = changed(runs / "chat", tmp_path / "chat", double_b)
    assert load(broken, models.tiny_llama()).active_adapters == ["chat"]
    with pytest.raises(VerificationError, match="scaled by 2") as caught:
        load(broken, models.tiny_llama(), verify=True)
    assert any("largest difference" in fault for fault in caught.value.faults)
    assert caught.value.cure
    with pytest.raises(StageError, match="another base"):
        load(runs / "chat", models.tiny_llama(seed=1), verify=True)
    other = {"allow_base_mismatch": True, "verify": True}
    with pytest.raises(VerificationError, match="not, or doesn't answer, what was saved"):
        load(runs / "chat", models.tiny_llama(seed=1), **other)


def test_a_quantised_load_is_verified(tmp_path: Path) -> None:
    path = demo_stage(tmp_path)
    options = {"quantization_config": four_bits(), "dtype": torch.float32, "verify": True}
    with pytest.warns(MismatchWarning, match="instead of dense"):
        load(path, **options)
    twice = changed(path, tmp_path / "twice", config=double_alpha)
    with (
        pytest.warns(MismatchWarning),
        pytest.raises(VerificationError, match="scaled by 2"),
    ):
        load(twice, **options)


# --- saving --------------------------------------------------------------------------------------


def trained(probe: bool, steps: int = 3) -> list[Tensor]:
    """The weights of a stage that is trained, saved and trained on, with dropout."""
    with models.seeded(3):
        model = begin_stage(
            models.tiny_llama(), name="sft", config=llama_lora(lora_dropout=0.3, bias="all")
        )
        model.train()
        model.config.use_cache = False
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        batch = models.token_ids()
        for step in range(steps):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                _save(model, probe)
        return [p.detach().clone() for p in model.parameters()]


def _save(model: PeftModel, probe: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        record = save_stage(model, Path(folder) / "sft", probe=probe)
    assert (record.newest.probe is not None) == probe


def test_training_goes_on_as_if_nothing_had_been_asked() -> None:
    for one, other in zip(trained(probe=True), trained(probe=False), strict=True):
        assert torch.equal(one, other)


def test_merged_training_goes_on_too(tmp_path: Path) -> None:
    run_stage(tmp_path / "domain", DOMAIN)
    model = begin_stage(
        models.tiny_llama(), name="chat", parent=tmp_path / "domain", mode="merge", config=CHAT
    )
    before = Snapshot(model)
    record = save_stage(model, tmp_path / "chat")
    before.check()
    alone = ask(models.tiny_llama())
    assert alone is not None
    probe = record.newest.probe
    assert probe is not None
    assert probe.base == answers_of(alone)


def test_what_is_active_does_not_change_what_is_recorded(tmp_path: Path) -> None:
    run_stage(tmp_path / "domain", DOMAIN)
    model = run_stage(tmp_path / "chat", CHAT, parent=tmp_path / "domain", mode="stack")
    expected = save_stage(model, tmp_path / "chat").newest.probe
    model.set_adapter("domain")
    assert save_stage(model, tmp_path / "chat").newest.probe == expected
    assert model.active_adapters == ["domain"]
    with model.disable_adapter():
        assert save_stage(model, tmp_path / "chat").newest.probe == expected
        assert model.adapter_state.disabled
    model.merge_adapter(["domain"])
    folded = save_stage(model, tmp_path / "chat").newest.probe
    assert folded is not None
    assert expected is not None
    assert folded.base == expected.base
    assert verify(tmp_path / "chat", models.tiny_llama()).proved


def test_a_model_that_cannot_be_asked_is_saved_with_a_warning(tmp_path: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="sft", config=DOMAIN).eval()
    fill_trainable(model)
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.warns(ProbeWarning, match="saved without a probe.*ZeroDivisionError") as caught:
        record = save_stage(model, tmp_path / "sft")
    assert caught[0].filename == __file__
    assert record.newest.probe is None
    handle.remove()
    report = verify(tmp_path / "sft", models.tiny_llama())
    assert report.passed
    assert not report.proved
    save_stage(model, tmp_path / "again")
    broken = models.tiny_llama()
    broken.lm_head.register_forward_hook(lambda *_: 1 / 0)
    report = verify(tmp_path / "again", broken)
    assert verdicts(report)["answers"] == "failed"
    assert "ZeroDivisionError" in blamed(report, "unknown")


def test_a_stage_can_be_saved_without_a_probe(tmp_path: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="sft", config=DOMAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save_stage(model, tmp_path / "sft", probe=False).newest.probe is None


def test_the_record_stays_small(runs: Path) -> None:
    values = json.loads(metadata_of(runs / "chat")["lamina"])
    assert all(len(json.dumps(stage["probe"])) < 4500 for stage in values["stages"])
    assert len(values["weights"]) == 64
