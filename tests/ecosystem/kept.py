"""Adapters that scenarios leave behind, with what their models answered, for the real peft."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import models

# Where the test that started the scenario wants them.
PLACE = "ECOSYSTEM_KEPT"


def reward_model() -> nn.Module:
    """A Llama with one score."""
    from transformers import LlamaForSequenceClassification

    with models.seeded(0):
        return LlamaForSequenceClassification(models.tiny_llama(num_labels=1).config).eval()


BASES = {"llama": models.tiny_llama, "gpt2": models.tiny_gpt2, "reward": reward_model}


@torch.no_grad()
def answer(model: Any) -> Tensor:
    """The logits for fixed ids, without dropout."""
    was = model.training
    try:
        return model.eval()(input_ids=models.token_ids()).logits
    finally:
        model.train(was)


def keep(directory: Path, base: str, expected: Tensor) -> None:
    """Leave an adapter directory behind, with the base's name and the logits."""
    note = {"directory": str(directory), "base": base}
    place = Path(os.environ[PLACE])
    name = f"{len(list(place.glob('*.json')))}-{directory.parent.name}-{directory.name}"
    save_file({"logits": expected.contiguous()}, place / f"{name}.safetensors")
    (place / f"{name}.json").write_text(json.dumps(note), encoding="utf-8")


def reopen(place: Path) -> int:
    """Open all of them with the real peft; returns how many.

    Raises:
        AssertionError: one answers something else.
    """
    from peft import PeftModel

    assert not PeftModel.__module__.startswith("lamina")
    notes = sorted(place.glob("*.json"))
    for path in notes:
        note = json.loads(path.read_text(encoding="utf-8"))
        model = PeftModel.from_pretrained(BASES[note["base"]](), note["directory"])
        expected = load_file(path.with_suffix(".safetensors"))["logits"]
        torch.testing.assert_close(answer(model), expected, rtol=1e-5, atol=1e-5, msg=path.name)
    return len(notes)


if __name__ == "__main__":
    print(reopen(Path(sys.argv[1])))
