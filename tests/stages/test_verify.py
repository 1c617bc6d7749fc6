"""Every fault that a stage directory can have by the time it is opened is caught, and named."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from lamina import begin_stage, load, save_stage
from lamina.checkpoint.probe import answers_of, ask
from lamina.demo.run import SHIPPED_BASE
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
from lamina.stages.verify import VerifyReport
from tests import adapters, models
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    Snapshot,
    answer,
    config_of,
    fill_trainable,
    llama_lora,
    metadata_of,
    run_chain,
    run_stage,
    tensors_of,
)

DOMAIN = llama_lora(r=4, lora_alpha=8)
CHAT = llama_lora(r=6, lora_alpha=9, target_modules=["v_proj", "o_proj"])
V_PROJ = "base_model.model.model.layers.0.self_attn.v_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of two stages over a tiny Llama, with a tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    run_stage(folder / "domain", DOMAIN)
    model = begin_stage(
        models.tiny_llama(), name="chat", parent=folder / "domain", mode="stack", config=CHAT
    )
    fill_trainable(model.eval(), seed=5)
    save_stage(model, folder / "chat", tokenizer=words())
    return folder


def words(count: int = models.VOCABULARY, prefix: str = "w") -> PreTrainedTokenizerFast:
    vocabulary = {f"{prefix}{index}": index for index in range(count)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=f"{prefix}0"))
    )


def changed(
    path: Path,
    to: Path,
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    config: Callable[[dict[str, Any]], None] = lambda config: None,
    record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Path:
    """A copy of an adapter in which something is different."""
    shutil.copytree(path, to)
    metadata = metadata_of(path)
    if "lamina" in metadata:
        values = json.loads(metadata["lamina"])
        record(values)
        metadata["lamina"] = json.dumps(values)
    save_file(tensors(tensors_of(path)), to / WEIGHTS, metadata=metadata)
    settings = config_of(path)
    config(settings)
    (to / CONFIG).write_text(json.dumps(settings))
    return to


def verdicts(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def blamed(report: VerifyReport, *kinds: str) -> str:
    """It failed, for exactly these causes; the sentence of the first."""
    assert not report.passed
    assert not report.proved
    assert [cause.kind for cause in report.causes] == list(kinds), report
    assert all(cause.sentence and cause.cure for cause in report.causes)
    json.dumps(report.to_dict(), allow_nan=False)
    return report.causes[0].sentence


# --- honest -------------------------------------------------------------------------------------


def test_an_honest_stage_is_proved(runs: Path) -> None:
    report = verify(runs / "chat", models.tiny_llama(), tokenizer=words())
    assert report.passed
    assert report.proved
    assert report.causes == ()
    assert report.notes == ()
    assert set(verdicts(report).values()) == {"passed"}
    assert report.stages == ("domain", "chat")
    answers, base = report.answers, report.base_answers
    assert answers is not None
    assert base is not None
    assert answers.top1_agreement == base.top1_agreement == 1.0
    assert answers.kl is not None
    assert answers.kl < 1e-6
    assert answers.tolerance is not None
    assert answers.max_difference < answers.tolerance / 5
    assert base.max_difference == 0.0
    assert report.effect is not None
    assert report.effect.size == pytest.approx(1, abs=1e-3)


def test_the_answers_are_those_of_the_model_that_was_saved(tmp_path: Path) -> None:
    model = run_stage(tmp_path / "sft", DOMAIN)
    record = save_stage(model, tmp_path / "sft")
    probe = record.newest.probe
    assert probe is not None
    here, alone = ask(model), ask(models.tiny_llama())
    assert here is not None
    assert alone is not None
    assert (probe.chain, probe.base) == (answers_of(here), answers_of(alone))
    largest = answer(model).abs().max()
    assert 0.5 * float(largest) < probe.chain.largest < 2 * float(largest)


def on_disk(path: Path) -> Path:
    """The demo's base, whose weights were trained."""
    shutil.copytree(SHIPPED_BASE, path)
    return path


def demo_stage(folder: Path, dtype: torch.dtype = torch.float32, size: float = 0.05) -> Path:
    base = AutoModelForCausalLM.from_pretrained(str(SHIPPED_BASE), dtype=dtype)
    model = begin_stage(base, name="sft", config=llama_lora(target_modules="all-linear"))
    fill_trainable(model.eval(), size=size)
    save_stage(model, folder / "sft")
    return folder / "sft"


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("opened", [torch.float32, torch.bfloat16, torch.float16])
def test_honest_in_every_dtype(tmp_path: Path, saved: torch.dtype, opened: torch.dtype) -> None:
    path = demo_stage(tmp_path, saved)
    report = verify(path, dtype=opened, attn_implementation="eager")
    assert report.proved, report
    assert report.answers is not None
    assert report.answers.tolerance is not None
    assert report.answers.max_difference <= report.answers.tolerance / 3
    coarsest = max((saved, opened), key=lambda dtype: torch.finfo(dtype).eps)
    assert report.answers.judged_by == str(coarsest).removeprefix("torch.")


def four_bits(dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def qlora_stage(folder: Path, size: float = 0.05) -> Path:
    base = AutoModelForCausalLM.from_pretrained(
        str(SHIPPED_BASE), quantization_config=four_bits(), dtype=torch.float32
    )
    model = begin_stage(base, name="sft", config=llama_lora(target_modules="all-linear"))
    fill_trainable(model.eval(), size=size)
    save_stage(model, folder / "sft")
    return folder / "sft"


def test_honest_in_4_bits(tmp_path: Path) -> None:
    path = qlora_stage(tmp_path)
    # As it was saved, without being told.
    report = verify(path)
    assert report.proved, report
    assert report.answers is not None
    assert report.answers.judged_by == "bitsandbytes nf4 in float32"
    assert report.answers.tolerance is not None
    dense = verify(path, load_in_4bit=False)
    assert dense.proved, dense
    assert dense.answers is not None
    assert dense.answers.judged_by == "bitsandbytes nf4 against dense"
    assert dense.answers.tolerance is None
    assert dense.answers.kl is not None
    assert 0 < dense.answers.kl < 0.1
    assert dense.effect is not None
    assert dense.effect.size == pytest.approx(1, abs=0.2)


def test_honest_from_dense_to_4_bits(tmp_path: Path) -> None:
    path = demo_stage(tmp_path)
    report = verify(path, load_in_4bit=True)
    assert report.proved, report
    assert report.answers is not None
    assert report.answers.judged_by == "dense against bitsandbytes nf4"
    assert any("instead of dense" in note for note in report.notes)


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_honest_in_every_mode(tmp_path: Path, mode: str) -> None:
    config = None if mode == "continue" else CHAT
    _, path = run_chain(tmp_path, [("domain", None, DOMAIN), ("chat", mode, config)])
    report = verify(path, models.tiny_llama())
    assert report.proved, report
    assert report.base_answers is not None
    assert report.base_answers.max_difference == 0.0


def test_a_base_that_was_folded_for_good_has_no_answers_of_its_own(tmp_path: Path) -> None:
    run_stage(tmp_path / "domain", DOMAIN)
    run_stage(
        tmp_path / "chat", CHAT, parent=tmp_path / "domain", mode="merge", keep_unfolded=False
    )
    report = verify(tmp_path / "chat", models.tiny_llama())
    assert report.proved
    assert report.base_answers is None
    assert report.effect is not None
    assert report.effect.size == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_honest_with_every_kind_of_adapter(tmp_path: Path, changes: dict[str, Any]) -> None:
    run_stage(tmp_path / "sft", llama_lora(**changes))
    report = verify(tmp_path / "sft", models.tiny_llama())
    assert report.proved, report
    assert report.base_answers is not None
    assert report.base_answers.passed


def test_a_new_head_is_drawn_anew_each_time_so_the_base_alone_is_not_asked(tmp_path: Path) -> None:
    config = llama_lora(target_modules=["query"])
    config.task_type = "SEQ_CLS"
    run_stage(tmp_path / "sft", config, build=models.tiny_bert_classifier)
    base = models.tiny_bert_classifier()
    nn.init.normal_(base.classifier.weight)
    report = verify(tmp_path / "sft", base)
    assert report.proved, report
    assert report.base_answers is None


def test_a_model_that_takes_no_tokens_is_not_proved(tmp_path: Path) -> None:
    config = llama_lora(target_modules=["up"])
    config.task_type = None
    run_stage(tmp_path / "sft", config, build=models.perceptron)
    report = verify(tmp_path / "sft", models.perceptron())
    assert report.passed
    assert not report.proved
    (answers,) = (check for check in report.checks if check.name == "answers")
    assert "doesn't take tokens" in answers.detail
    wrong = verify(tmp_path / "sft", models.perceptron(seed=1))
    assert "another base" in [cause.kind for cause in wrong.causes]


def test_the_base_comes_back_as_it_was(runs: Path) -> None:
    base = models.tiny_llama()
    base.model.layers[0].train()
    before = Snapshot(base)
    verify(runs / "chat", base)
    before.check()
    verify(runs / "chat", base)


# --- the base -----------------------------------------------------------------------------------


def test_another_base_of_the_same_shape(runs: Path) -> None:
    report = verify(runs / "chat", models.tiny_llama(seed=1))
    sentence = blamed(report, "another base")
    assert "another model" in sentence
    found = verdicts(report)
    assert [found[name] for name in ("base", "base answers", "answers")] == ["failed"] * 3
    assert "effect" not in found, "nothing is said of the adapter"


def without_sketch(record: dict[str, Any]) -> None:
    for stage in record["stages"]:
        stage["base"].pop("sketch", None)


def test_another_base_is_known_by_its_answers_alone(runs: Path, tmp_path: Path) -> None:
    path = changed(runs / "chat", tmp_path / "chat", record=without_sketch)
    report = verify(path, models.tiny_llama(seed=1))
    assert "alone, it answers otherwise" in blamed(report, "another base")
    assert verdicts(report)["base"] == "passed", "its name and shapes are the same"


@pytest.mark.parametrize("stage", ["chat", "domain"])
@pytest.mark.parametrize("sketched", [True, False])
def test_a_base_that_has_the_adapter_folded_in(
    runs: Path, tmp_path: Path, stage: str, sketched: bool
) -> None:
    merged = load(runs / stage, models.tiny_llama()).merge_and_unload()
    path = runs / "chat"
    if not sketched:
        path = changed(path, tmp_path / "chat", record=without_sketch)
    report = verify(path, merged)
    sentence = blamed(report, "base already merged")
    assert "folded in" in sentence
    assert stage == "chat" or "'domain'" in sentence


def test_a_merged_base_in_other_dtypes(tmp_path: Path) -> None:
    path = demo_stage(tmp_path)
    merged = load(path).merge_and_unload().to(torch.bfloat16)
    blamed(verify(path, merged), "base already merged")
    bare = changed(path, tmp_path / "bare", record=without_sketch)
    blamed(verify(bare, merged), "base already merged")


def test_a_base_of_other_shapes(runs: Path) -> None:
    report = verify(runs / "chat", models.tiny_llama(hidden_size=64))
    assert "another base" in [cause.kind for cause in report.causes]
    assert verdicts(report)["loading"] == "failed"
    smaller = verify(runs / "chat", models.tiny_llama(vocab_size=32))
    assert "another base" in [cause.kind for cause in smaller.causes]


def test_another_base_from_the_disk(runs: Path, tmp_path: Path) -> None:
    models.tiny_llama(seed=1).save_pretrained(tmp_path / "base")
    blamed(verify(runs / "chat", str(tmp_path / "base")), "another base")
    with pytest.raises(CheckpointError, match="can't be opened"):
        verify(runs / "chat", str(tmp_path / "nowhere"))


# --- the adapter --------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_tensor_that_was_dropped(runs: Path, tmp_path: Path, half: str) -> None:
    key = f"{V_PROJ}.{half}.weight"
    path = changed(
        runs / "chat", tmp_path / "chat", lambda x: {k: v for k, v in x.items() if k != key}
    )
    report = verify(path, models.tiny_llama())
    assert key in blamed(report, "incomplete file")
    found = verdicts(report)
    assert (found["record"], found["answers"]) == ("failed", "not checked")
    assert (found["base"], found["base answers"]) == ("passed", "passed")


def test_a_module_that_was_dropped(runs: Path, tmp_path: Path) -> None:
    path = changed(
        runs / "chat", tmp_path / "chat", lambda x: {k: v for k, v in x.items() if V_PROJ not in k}
    )
    report = verify(path, models.tiny_llama())
    sentence = blamed(report, "incomplete file")
    assert f"{V_PROJ}.lora_A.weight, {V_PROJ}.lora_B.weight" in sentence


def double_b(tensors: Tensors) -> Tensors:
    return {key: value * 2 if "lora_B" in key else value for key, value in tensors.items()}


def double_alpha(config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2
    config["alpha_pattern"] = {key: value * 2 for key, value in config["alpha_pattern"].items()}


def test_an_adapter_that_is_scaled_twice_by_its_weights(runs: Path, tmp_path: Path) -> None:
    report = verify(changed(runs / "chat", tmp_path / "chat", double_b), models.tiny_llama())
    assert "scaled by 2" in blamed(report, "adapter scaled")
    assert verdicts(report)["weights"] == "failed"


def test_an_adapter_that_is_scaled_twice_by_its_config(runs: Path, tmp_path: Path) -> None:
    path = changed(runs / "chat", tmp_path / "chat", config=double_alpha)
    report = verify(path, models.tiny_llama())
    assert "adapter_config.json gives another scaling" in blamed(report, "adapter scaled")
    right, wrong = (config_of(each)["lora_alpha"] for each in (runs / "chat", path))
    cure = report.causes[0].cure
    assert f"set lora_alpha to {right:g}, not {wrong:g}, and divide what is in alpha_" in cure
    assert verdicts(report)["weights"] == "passed"


def test_rslora_that_was_turned_on(runs: Path, tmp_path: Path) -> None:
    def turn_on(config: dict[str, Any]) -> None:
        config["use_rslora"] = True
        config["alpha_pattern"] = config["rank_pattern"] = {}

    run_stage(tmp_path / "sft", DOMAIN)
    path = changed(tmp_path / "sft", tmp_path / "chat", config=turn_on)
    report = verify(path, models.tiny_llama())
    assert "scaled by 2" in blamed(report, "adapter scaled")
    assert "set use_rslora to false" in report.causes[0].cure


def times(factor: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v * factor if "lora_B" in k else v for k, v in tensors.items()}


# alpha / r and r are forgotten, or rsLoRA: 1.5, 6 and its root, upside down too.
@pytest.mark.parametrize("factor", [0.5, 3.0, -1.0, 1.5, 6.0, 6**-0.5])
def test_an_adapter_of_another_scale(runs: Path, tmp_path: Path, factor: float) -> None:
    path = changed(runs / "chat", tmp_path / "chat", times(factor))
    report = verify(path, models.tiny_llama())
    assert f"scaled by {factor:.3g}" in blamed(report, "adapter scaled")


def _edited(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lora_alpha", 30, "v_proj: scaled by 3 by the config, by 1.5 on record"),
        ("use_rslora", True, "by the config, by 1.5 on record"),
        ("alpha_pattern", {}, "by the config, by 1.5 on record"),
        ("rank_pattern", {}, "rank 10 by the config, 4 on record"),
        ("r", 20, "v_proj: rank 20 by the config, 10 on record"),
        ("target_modules", ["q_proj", "v_proj"], "o_proj: not in target_modules"),
    ],
)
def test_a_config_that_was_edited_is_named_and_the_cure_mends_it(
    name: str, value: Any, said: str, runs: Path, tmp_path: Path
) -> None:
    path = changed(runs / "chat", tmp_path / "chat", config=_edited(name, value))
    report = verify(path, models.tiny_llama())
    assert said in blamed(report, "changed config")
    cure = report.causes[0].cure
    before = config_of(runs / "chat")[name]
    if name == "target_modules":
        assert cure == "in adapter_config.json, add to target_modules 'o_proj'"
    else:
        assert cure == f"in adapter_config.json, set {name} to {json.dumps(before)}"
    mended = changed(path, tmp_path / "mended", config=_edited(name, before))
    assert verify(mended, models.tiny_llama()).proved


def test_a_scale_that_nobody_would_guess(tmp_path: Path) -> None:
    report = verify(changed(demo_stage(tmp_path), tmp_path / "chat", times(1.37)))
    assert "scaled by 1.37" in blamed(report, "adapter scaled")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_effect_that_is_doubled_is_seen_below_the_tolerance(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = demo_stage(tmp_path, dtype, size=0.03)
    report = verify(changed(path, tmp_path / "twice", config=double_alpha))
    assert report.answers is not None
    assert report.answers.passed or dtype == torch.float16
    assert report.effect is not None
    assert report.effect.size == pytest.approx(2, abs=0.3)
    blamed(report, "adapter scaled")
    assert verify(path).proved


def test_an_adapter_that_does_nothing(runs: Path, tmp_path: Path) -> None:
    def empty(tensors: Tensors) -> Tensors:
        return {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}

    report = verify(changed(runs / "chat", tmp_path / "chat", empty), models.tiny_llama())
    assert "changes nothing" in blamed(report, "adapter not applied")
    assert any("all B matrices are zero" in note for note in report.notes)


def test_a_stage_whose_ranks_are_gone(runs: Path, tmp_path: Path) -> None:
    def older_only(tensors: Tensors) -> Tensors:
        kept = dict(tensors)
        for key, value in tensors.items():
            if "o_proj.lora_B" in key:
                kept[key] = value * 0
            if "v_proj.lora_B" in key:
                kept[key] = torch.cat([value[:, :4], 0 * value[:, 4:]], 1)
        return kept

    report = verify(changed(runs / "chat", tmp_path / "chat", older_only), models.tiny_llama())
    assert "up to stage 'domain'" in blamed(report, "other stages")


def test_a_stage_whose_ranks_are_there_and_were_not(runs: Path, tmp_path: Path) -> None:
    domain = json.loads(metadata_of(runs / "domain")["lamina"])

    def older_answers(record: dict[str, Any]) -> None:
        record["stages"][-1]["probe"] = domain["stages"][0]["probe"]
        record["stages"][0].pop("probe")

    path = changed(runs / "chat", tmp_path / "chat", record=older_answers)
    report = verify(path, models.tiny_llama())
    assert "without the ranks of stage 'chat'" in blamed(report, "other stages")


def test_nan(runs: Path, tmp_path: Path) -> None:
    def broken(tensors: Tensors) -> Tensors:
        tensors[f"{V_PROJ}.lora_B.weight"][3, 3] = math.nan
        return tensors

    report = verify(changed(runs / "chat", tmp_path / "chat", broken), models.tiny_llama())
    assert f"{V_PROJ}.lora_B.weight" in blamed(report, "not finite")


def test_one_bit_that_changes_no_answer(runs: Path, tmp_path: Path) -> None:
    def flip(tensors: Tensors) -> Tensors:
        tensors[f"{V_PROJ}.lora_B.weight"].view(torch.int32)[3, 3] ^= 1
        return tensors

    report = verify(changed(runs / "chat", tmp_path / "chat", flip), models.tiny_llama())
    assert "byte for byte" in blamed(report, "changed weights")
    assert verdicts(report)["answers"] == "passed"


def test_a_record_that_is_damaged(runs: Path, tmp_path: Path) -> None:
    path = changed(runs / "chat", tmp_path / "chat", record=lambda record: record.pop("laminae"))
    report = verify(path, models.tiny_llama())
    blamed(report, "damaged record")


def test_several_faults_are_told_at_once(runs: Path, tmp_path: Path) -> None:
    key = f"{V_PROJ}.lora_B.weight"
    path = changed(
        runs / "chat", tmp_path / "chat", lambda x: {k: v for k, v in x.items() if k != key}
    )
    report = verify(path, models.tiny_llama(seed=1), tokenizer=words(prefix="v"))
    blamed(report, "incomplete file", "another base", "another tokenizer")


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_faults_are_caught_where_all_is_rounded(tmp_path: Path, kind: str) -> None:
    # The base with two blocks in each other's place: the same shapes, and the same values in all.
    base = AutoModelForCausalLM.from_pretrained(str(SHIPPED_BASE))
    layers = base.model.layers
    layers[0], layers[2] = layers[2], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    base.save_pretrained(tmp_path / "other")
    path = qlora_stage(tmp_path, 0.1) if kind == "nf4" else demo_stage(tmp_path, torch.bfloat16)
    assert verify(path).proved
    blamed(verify(path, str(tmp_path / "other")), "another base")
    bare = changed(path, tmp_path / "bare", record=without_sketch)
    blamed(verify(bare, str(tmp_path / "other")), "another base")
    load(path, dtype=torch.float32, allow_base_mismatch=True).merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    blamed(verify(path, str(tmp_path / "merged")), "base already merged")
    twice = changed(path, tmp_path / "twice", config=double_alpha)
    assert "scaled by 2" in blamed(verify(twice), "adapter scaled")
    doubled = changed(path, tmp_path / "doubled", double_b)
    assert "scaled by 2" in blamed(verify(doubled), "adapter scaled")
    empty = changed(path, tmp_path / "empty", times(0.0))
    blamed(verify(empty), "adapter not applied")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    dropped = changed(path, tmp_path / "x", lambda x: {k: v for k, v in x.items() if k != key})
    assert key in blamed(verify(dropped), "incomplete file")


# --- the tokenizer ------------------------------------------------------------------------------


def test_another_tokenizer(runs: Path) -> None:
    report = verify(runs / "chat", models.tiny_llama(), tokenizer=words(prefix="v"))
    assert "vocabulary" in blamed(report, "another tokenizer")
    assert verdicts(report)["answers"] == "passed"


def test_the_tokenizer_that_lies_with_adapter_or_base_is_looked_at(
    runs: Path, tmp_path: Path
) -> None:
    assert verdicts(verify(runs / "chat", models.tiny_llama()))["tokenizer"] == "not checked"
    models.tiny_llama().save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    report = verify(runs / "chat", str(tmp_path / "base"))
    assert verdicts(report)["tokenizer"] == "passed"
    shutil.copytree(runs / "chat", tmp_path / "chat")
    words(prefix="v").save_pretrained(tmp_path / "chat")
    blamed(verify(tmp_path / "chat", str(tmp_path / "base")), "another tokenizer")


def test_another_chat_template(runs: Path, tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.chat_template = "{{ messages }}"
    report = verify(runs / "chat", models.tiny_llama(), tokenizer=tokenizer)
    assert "a chat template, and the one that" in blamed(report, "another chat template")
    # The tokenizer that lies with the adapter counts, too, and that of the base for want of one.
    shutil.copytree(runs / "chat", tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    blamed(verify(tmp_path / "chat", models.tiny_llama()), "another chat template")
    models.tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    of_base = verify(runs / "chat", str(tmp_path / "base"))
    assert of_base.proved
    assert any("chat template" in note for note in of_base.notes)


def test_a_base_whose_values_were_rounded_is_told_and_the_cure_helps(
    runs: Path, tmp_path: Path
) -> None:
    models.tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    report = verify(runs / "chat", str(tmp_path / "base"))
    assert "rounded to bfloat16" in blamed(report, "dtype")
    assert "--dtype bfloat16" in report.causes[0].cure
    assert verify(runs / "chat", str(tmp_path / "base"), dtype="bfloat16").proved


# --- without a record ---------------------------------------------------------------------------


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


# --- errors, and loading ------------------------------------------------------------------------


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


# --- saving -------------------------------------------------------------------------------------


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
