"""What begin_stage refuses: everything that is wrong, at once, and nothing is changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor, nn

from lamina.config import LoraConfig
from lamina.errors import (
    AlreadyAdaptedError,
    KeyMismatchError,
    MissingFileError,
    StageError,
    TargetError,
)
from lamina.model import get_peft_model
from lamina.stages import begin_stage, load
from tests import models
from tests.stages.chains import (
    llama_lora,
    rewrite_record,
    run_stage,
    save_plain_peft,
)
from tests.stages.refusing import named, refused


def test_an_unknown_mode(domain: Path) -> None:
    error = refused(named(), StageError, name="x", parent=domain, mode="stak", config=llama_lora())
    assert "'stak' is none of 'continue', 'stack', 'merge'; did you mean 'stack'?" in str(error)


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_a_mode_without_a_parent(mode: str) -> None:
    error = refused(named(), StageError, name="x", mode=mode, config=llama_lora())
    assert f"mode='{mode}' needs a parent" in str(error)


def test_fresh_is_said_by_leaving_the_parent_out() -> None:
    error = refused(named(), StageError, name="x", mode="fresh", config=llama_lora())
    assert "'fresh' is none of" in str(error)


def test_a_parent_without_a_mode(domain: Path) -> None:
    error = refused(named(), StageError, name="x", parent=domain, config=llama_lora())
    assert "mode='continue' or 'stack' or 'merge'" in str(error)


@pytest.mark.parametrize("mode", ["stack", "merge", None])
def test_no_config(domain: Path, mode: str | None) -> None:
    parent = domain if mode else None
    error = refused(named(), StageError, name="x", parent=parent, mode=mode)
    assert "config is missing" in str(error)


def test_a_config_of_another_kind(domain: Path) -> None:
    error = refused(named(), StageError, name="x", config={"r": 4})
    assert "config is a dict" in str(error)


@pytest.mark.parametrize("name", ["a.b", "", ".", "runs/chat", "keys", "__base__", 7, None])
def test_names_that_cant_be_part_of_parameter_names(domain: Path, name: Any) -> None:
    if name == "runs/chat":
        # A slash is no obstacle to torch.
        begin_stage(named(), name=name, config=llama_lora())
        return
    for call in (
        {"config": llama_lora()},
        {"parent": domain, "mode": "continue"},
        {"parent": domain, "mode": "stack", "config": llama_lora()},
    ):
        error = refused(named(), StageError, name=name, **call)
        assert len(error.faults) == 1
        assert repr(name) in error.faults[0]


def test_a_config_of_another_library() -> None:
    error = refused(named(), StageError, name="x", config=peft.LoraConfig(r=4))
    assert "config is a peft.LoraConfig, not a lamina.LoraConfig" in str(error)


def test_a_base_that_is_no_model() -> None:
    base: Any = "someone/tiny"
    with pytest.raises(StageError, match="base is a str, not a model"):
        begin_stage(base, name="x", config=llama_lora())


def test_a_misspelt_word_begins_no_other_stage(domain: Path) -> None:
    call = {"name": "x", "config": llama_lora()}
    error = refused(named(), StageError, **call, parrent=domain)
    assert "'parrent' is no argument of begin_stage; did you mean 'parent'?" in str(error)
    error = refused(named(), StageError, **call, parent=domain, mode="stack", keep_folded=True)
    assert "did you mean 'keep_unfolded'?" in str(error)
    error = refused(named(), StageError, **call, subfolder="a")
    assert "there is no parent" in str(error)
    begin_stage(named(), **call, parent=domain.parent, subfolder=domain.name, mode="stack")


def test_everything_wrong_with_the_words_in_one_error() -> None:
    error = refused(named(), StageError, name="a.b", mode="mrege")
    assert [fault.partition(" ")[0] for fault in error.faults] == [
        "mode='mrege'",
        "config",
        "name='a.b'",
    ]
    assert "did you mean 'merge'" in str(error)


def test_continue_with_another_config_lists_the_fields(domain: Path) -> None:
    other = llama_lora(r=5, lora_alpha=9, use_rslora=True, target_modules=["q_proj"])
    error = refused(named(), StageError, name="x", parent=domain, mode="continue", config=other)
    assert len(error.faults) == 4
    for line in (
        "r stays 4, not 5",
        "lora_alpha stays 8, not 9",
        "use_rslora stays False, not True",
        "target_modules stays ['q_proj', 'v_proj'], not ['q_proj']",
    ):
        assert line in str(error)
    assert 'mode="stack"' in str(error)


def test_continue_with_other_modules_to_save(domain: Path) -> None:
    error = refused(
        named(),
        StageError,
        name="x",
        parent=domain,
        mode="continue",
        config=llama_lora(modules_to_save=["lm_head"]),
    )
    assert "modules_to_save stays [], not ['lm_head']" in str(error)


def test_continue_a_classifier_with_the_config_it_was_begun_with(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    build = models.tiny_bert_classifier
    run_stage(tmp_path / "one", config, build=build)
    begin_stage(build(), name="two", parent=tmp_path / "one", mode="continue", config=config)


def test_continue_a_plain_gpt2_with_the_config_it_was_begun_with(tmp_path: Path) -> None:
    save_plain_peft(tmp_path / "plain", {"r": 4, "target_modules": ["c_attn"]}, models.tiny_gpt2)
    config = LoraConfig(r=4, target_modules=["c_attn"])
    begin_stage(
        models.tiny_gpt2(), name="x", parent=tmp_path / "plain", mode="continue", config=config
    )


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_a_name_that_the_chain_has(domain: Path, tmp_path: Path, mode: str) -> None:
    run_stage(tmp_path / "chat", parent=domain, mode="continue", build=named)
    config = None if mode == "continue" else llama_lora()
    for name in ("domain", "chat"):
        error = refused(
            named(), StageError, name=name, parent=tmp_path / "chat", mode=mode, config=config
        )
        assert f"the chain domain -> chat already has a stage '{name}'" in str(error)


def test_names_are_compared_whole(domain: Path) -> None:
    begin_stage(named(), name="domain2", parent=domain, mode="stack", config=llama_lora())
    begin_stage(named(), name="main", parent=domain, mode="stack", config=llama_lora())


STACK = {"name": "x", "mode": "stack"}


def test_another_base_of_the_same_shape(domain: Path) -> None:
    base = named("someone/other", seed=1)
    error = refused(base, StageError, **STACK, parent=domain, config=llama_lora())
    sentence = "'someone/other' is another model than 'someone/tiny', the recorded base"
    assert f"base: {sentence}: 16 of 21 weights have other values" in str(error)
    with pytest.raises(StageError, match=sentence):
        load(domain, base)
    options = {"allow_base_mismatch": True}
    assert begin_stage(base, **STACK, parent=domain, config=llama_lora(), **options)


def test_another_base_of_the_same_name(domain: Path) -> None:
    error = refused(named(seed=1), StageError, **STACK, parent=domain, config=llama_lora())
    assert "this is another model than 'someone/tiny', the recorded base" in str(error)


@pytest.mark.parametrize("name", ["/models/tiny", "someone/other"])
def test_the_same_base_under_another_name(domain: Path, name: str) -> None:
    assert begin_stage(named(name), **STACK, parent=domain, config=llama_lora())
    load(domain, named(name))


def test_a_base_of_another_name_where_its_weights_are_not_on_record(
    domain: Path, tmp_path: Path
) -> None:
    old = tmp_path / "domain"
    shutil.copytree(domain, old)
    rewrite_record(old, lambda record: record["stages"][-1]["base"].pop("sketch"))
    base = named("someone/other")
    error = refused(base, StageError, **STACK, parent=old, config=llama_lora())
    assert "trained on 'someone/tiny', this base is 'someone/other'" in str(error)
    with pytest.raises(StageError, match="someone/other"):
        load(old, base)
    error = refused(
        named(num_hidden_layers=3), StageError, **STACK, parent=old, config=llama_lora()
    )
    assert "names or shapes differ" in str(error)
    options = {"allow_base_mismatch": True}
    assert begin_stage(base, **STACK, parent=old, config=llama_lora(), **options)


def test_a_base_of_another_shape(domain: Path) -> None:
    base = named(num_hidden_layers=3)
    error = refused(base, StageError, **STACK, parent=domain, config=llama_lora())
    assert "is another model than" in str(error)
    base = named(hidden_size=16)
    refused(base, StageError, **STACK, parent=domain, config=llama_lora())
    # Allowed, it still doesn't fit: that is told too, and changes nothing.
    options = {"allow_base_mismatch": True}
    refused(base, KeyMismatchError, **STACK, parent=domain, config=llama_lora(), **options)


def test_a_base_of_another_vocabulary(domain: Path) -> None:
    error = refused(named(vocab_size=70), StageError, **STACK, parent=domain, config=llama_lora())
    assert "trained with a vocabulary of 64, this base has 70" in str(error)


def test_a_base_in_another_dtype_is_the_same_base(domain: Path) -> None:
    assert begin_stage(named().bfloat16(), **STACK, parent=domain, config=llama_lora())


def test_everything_wrong_with_the_parent_in_one_error(domain: Path) -> None:
    error = refused(
        named("someone/other", vocab_size=70),
        StageError,
        name="domain",
        parent=domain,
        mode="continue",
        config=llama_lora(r=5),
    )
    assert [fault.partition(":")[0] for fault in error.faults] == [
        "name",
        "config",
        "base",
        "base",
    ]
    for way in ("choose a name", "leave config out", "allow_base_mismatch=True"):
        assert way in str(error.cure)


def test_no_parent_there(tmp_path: Path) -> None:
    call = {"name": "x", "parent": tmp_path / "nowhere", "mode": "continue"}
    refused(named(), MissingFileError, **call)


def test_targets_that_arent_there(domain: Path) -> None:
    config = llama_lora(target_modules=["q_proj", "q_prj"])
    for mode, parent in ((None, None), ("stack", domain), ("merge", domain)):
        error = refused(named(), TargetError, name="x", parent=parent, mode=mode, config=config)
        assert "q_prj" in str(error)


def test_a_base_with_adapters(domain: Path) -> None:
    adapted = get_peft_model(named(), llama_lora())
    for base in (adapted, adapted.get_base_model()):
        error = refused(
            base, AlreadyAdaptedError, name="x", parent=domain, mode="merge", config=llama_lora()
        )
        assert "'default'" in str(error)


def test_what_one_file_cant_hold(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", LoraConfig(r=4, target_modules=["up"], lora_bias=True), build=mlp)
    embedding = LoraConfig(r=4, target_modules=["embed"])
    call = {"name": "x", "parent": tmp_path / "one", "mode": "stack", "config": embedding}
    error = refused(mlp(), StageError, **call)
    assert "can't be saved in one file" in str(error)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.up = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.embed(ids))


def mlp() -> nn.Module:
    with models.seeded(0):
        return Lookup().eval()
