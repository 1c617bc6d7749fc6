from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import ArrowConfig as PeftArrowConfig
from peft.tuners.lora import create_arrow_model as create_with_peft
from torch import nn

import lamina
from lamina.config import ArrowConfig
from lamina.model.arrow import create_arrow_model
from tests import models
from tests.parity.pairs import answer, assert_close

# What peft warns of is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
IDS = models.token_ids()
MAKERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (models.tiny_llama, ["q_proj", "up_proj"]),
    "gpt2": (models.tiny_gpt2, ["c_attn"]),
}


def write(directory: Path, kind: str, count: int, first: int = 0) -> list[str]:
    """Adapters that differ, one after the other, each with a scaling of its own."""
    make, targets = MAKERS[kind]
    paths = []
    for index in range(first, first + count):
        with models.seeded(index + 1):
            config = lamina.LoraConfig(
                r=3, lora_alpha=4 + index, target_modules=targets, init_lora_weights=False
            )
            lamina.get_peft_model(make(), config).save_pretrained(directory / str(index))
        paths.append(str(directory / str(index)))
    return paths


def both(
    kind: str, task: list[str], general: list[str], **settings: Any
) -> tuple[nn.Module, nn.Module]:
    make, _ = MAKERS[kind]
    settings = {"rng_seed": 3, "use_gks": bool(general), **settings}
    ours = create_arrow_model(make(), task, ArrowConfig(**settings), general)
    theirs = create_with_peft(make(), task, PeftArrowConfig(**settings), general)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_tokens_are_routed_as_by_peft(kind: str, top_k: int, tmp_path: Path) -> None:
    task = write(tmp_path, kind, 3)
    ours, theirs = both(kind, task, [], top_k=top_k, router_temperature=0.7)
    assert_close(answer(ours, IDS), answer(theirs, IDS), 1e-5)
    assert not torch.allclose(answer(ours, IDS), answer(MAKERS[kind][0](), IDS), atol=1e-4)


def test_general_knowledge_is_subtracted_as_by_peft(tmp_path: Path) -> None:
    task, general = write(tmp_path, "llama", 3), write(tmp_path, "llama", 2, first=3)
    ours, theirs = both("llama", task, general, top_k=2)
    plain, _ = both("llama", task, [], top_k=2)
    assert_close(answer(ours, IDS), answer(theirs, IDS), 1e-5)
    assert not torch.allclose(answer(ours, IDS), answer(plain, IDS), atol=1e-4)


def test_an_expert_loaded_later_is_mixed_as_by_peft(tmp_path: Path) -> None:
    task, general = write(tmp_path, "llama", 3), write(tmp_path, "llama", 1, first=3)
    ours, theirs = both("llama", task[:2], general, top_k=2)
    answer(ours, IDS), answer(theirs, IDS)
    for model in (ours, theirs):
        model.load_adapter(task[2], adapter_name="later")
    model = both("llama", task, general, top_k=2)[0]
    assert_close(answer(ours, IDS), answer(theirs, IDS), 1e-5)
    assert_close(answer(ours, IDS), answer(model, IDS), 1e-6)


def test_the_router_itself_is_read_and_written(tmp_path: Path) -> None:
    task = write(tmp_path, "llama", 2)
    ours, theirs = both("llama", task, [], top_k=1)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name, selected_adapters=["arrow_router"])
        where = tmp_path / name / "arrow_router"
        for library in (lamina, peft):
            config = library.PeftConfig.from_pretrained(where)
            assert config.target_modules == model.peft_config["arrow_router"].target_modules
            assert (config.arrow_config.top_k, config.arrow_config.rng_seed) == (1, 3)
