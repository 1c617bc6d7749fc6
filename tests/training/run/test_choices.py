"""How a base is kept and trained, by its effect; curves and streams that go on where they were."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaMLP

import lamina
from lamina.errors import PlanError
from lamina.training.run import RunResult, Told
from tests.ecosystem import texts
from tests.training.run import plans

STAGE: dict[str, Any] = {"name": "a", "method": "pt"}
# All eight texts in one batch.
WHOLE = ("per_device_train_batch_size=8", "max_steps=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choices") / "base"
    plans.write_base(folder)
    return folder


def first_loss(base: Path, **how: Any) -> float:
    """The mean loss per token of what "pt" trains on, by the base alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **how)
    # Evaluating over 4-bit codes on a CPU packs them for inference.
    model.train()
    tokenizer, found = texts.tokenizer(), []
    for row in texts.texts():
        ids = torch.tensor([[*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            likely = torch.log_softmax(model(input_ids=ids).logits.float(), -1)
        found.append(-likely[0, :-1].gather(1, ids[0, 1:, None]).flatten())
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_is_kept_in_its_dtype_and_its_adapter_in_fp32(
    dtype: str, base: Path, tmp_path: Path
) -> None:
    path = plans.write_plan(tmp_path, [STAGE], base=base)
    result = plans.run(path, f"dtype={dtype}", *WHOLE)
    record = lamina.lineage(result.path)
    assert record.newest.base.dtype == dtype
    expected = first_loss(base, dtype=getattr(torch, dtype))
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert plans.log_of(tmp_path, "a")[0]["loss"] == pytest.approx(expected, rel=2 * eps)
    tensors = plans.tensors(result.path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "told", "settings"),
    [
        (
            "load_in_4bit",
            "bitsandbytes nf4, double quantisation",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.float32,
            },
        ),
        ("load_in_8bit", "bitsandbytes int8", {"load_in_8bit": True}),
    ],
)
def test_a_base_of_codes_answers_as_codes_do(
    key: str, told: str, settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    path = plans.write_plan(tmp_path, [STAGE], base=base)
    evaluated = ("eval_fraction=0.25", "eval_steps=1")
    result = plans.run(path, f"{key}=true", *WHOLE, *evaluated, f"output_dir={tmp_path}/codes")
    record = lamina.lineage(result.path)
    assert record.newest.base.quantization == told
    assert result.stages[0].metrics is not None
    assert "eval_loss" in result.stages[0].metrics
    plans.run(path, f"{key}=true", *WHOLE)
    loss = plans.log_of(tmp_path, "a")[0]["loss"]
    quantised = transformers.BitsAndBytesConfig(**settings)
    expected = first_loss(base, quantization_config=quantised, dtype="auto")
    assert loss == pytest.approx(expected, rel=1e-3)
    assert abs(loss - expected) < abs(loss - first_loss(base))


def test_checkpointed_layers_are_run_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = LlamaMLP.forward

    def counting(self: Any, x: Any) -> Any:
        if self.training and x.shape[0] == 8:
            calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counting)
    path = plans.write_plan(tmp_path, [STAGE], base=base)
    counts = []
    for checkpointing in ("false", "true"):
        calls.clear()
        output = f"output_dir={tmp_path / checkpointing}"
        plans.run(path, *WHOLE, f"gradient_checkpointing={checkpointing}", output)
        counts.append(len(calls))
    # Two layers, two steps.
    assert counts == [4, 8]


class Stopping(Told):
    """Ctrl-C at a step."""

    def __init__(self, at: int) -> None:
        self._at = at

    def step(self, name: str, step: int, steps: int) -> None:
        if step == self._at:
            os.kill(os.getpid(), signal.SIGINT)


def stopped(path: Path, *changes: str, at: int = 3) -> RunResult:
    """Run a plan until a step, and then to its end."""
    assert plans.run(path, *changes, console=Stopping(at)).interrupted
    result = plans.run(path, *changes)
    assert result.stages[-1].why == f"went on from step {at}"
    return result


def test_a_stream_goes_on_at_the_example_that_is_next(base: Path, tmp_path: Path) -> None:
    rows = [{"text": texts.sentence(row, 10)} for row in range(60)]
    for name, part in (("one.jsonl", rows[:30]), ("two.jsonl", rows[30:])):
        plans.write_rows(tmp_path / name, part)
    data = [{"path": f"{name}.jsonl", "streaming": True, "weight": 1} for name in ("one", "two")]
    stage = {**STAGE, "datasets": data, "max_steps": 8, "lora_dropout": 0.2}
    path = plans.write_plan(tmp_path, [stage], base=base)
    whole = plans.run(path, f"output_dir={tmp_path / 'whole'}")
    mine = plans.tensors(stopped(path).path)
    for name, tensor in plans.tensors(whole.path).items():
        assert torch.equal(mine[name], tensor), name


def curves(folder: Path) -> dict[int, float]:
    """Step -> loss, of all files of events in a folder."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[int, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                if value.tag == "train/loss":
                    found[event.step] = value.simple_value
    return found


def test_curves_are_those_of_the_log_also_where_it_went_on(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    path = plans.write_plan(tmp_path, [STAGE], base=base)
    stopped(path, "report_to=tensorboard", "max_steps=5")
    log = {line["step"]: line["loss"] for line in plans.log_of(tmp_path, "a") if "loss" in line}
    told = curves(tmp_path / "out" / "logs" / "a")
    assert told.keys() == log.keys() == {1, 2, 3, 4, 5}
    assert all(told[step] == pytest.approx(loss, rel=1e-3) for step, loss in log.items())
    assert not list((tmp_path / "out" / "a").rglob("events*"))


@pytest.mark.parametrize(
    ("name", "told"),
    [("wandb", "'wandb' isn't installed: pip install wandb"), ("tensorbord", "'tensorboard'?")],
)
def test_a_report_that_cannot_be_made_is_a_fault_first(
    name: str, told: str, base: Path, tmp_path: Path
) -> None:
    path = plans.write_plan(tmp_path, [STAGE], base=base)
    with pytest.raises(PlanError) as error:
        plans.run(path, f"report_to={name}")
    assert told in str(error.value)
    assert not (tmp_path / "out").exists()
