"""A base with a tokenizer, and a chain over it, as a run leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM

from lamina import begin_stage, save_stage
from lamina.training.evaluate.scores import Answer, Evaluation, Judged
from lamina.training.run.state import Judgement, RunState, StageState
from tests import models
from tests.stages.chains import fill_trainable, llama_lora
from tests.stages.verifying import words

TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': 'w10', 'user': 'w11', 'assistant': 'w12'}[m['role']] }} {{ m['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}w12{% endif %}"
)
CHAIN = [
    ("domain", None, llama_lora()),
    ("chat", "stack", llama_lora(r=6, lora_alpha=9, target_modules=["q_proj", "k_proj"])),
    ("dpo", "continue", None),
]


def tokenizer(template: str | None = TEMPLATE, *, ends: bool = True) -> Any:
    made = words()
    made.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    # No other word begins so: a special token would be found inside of it.
    made.eos_token = "w63" if ends else None
    made.chat_template = template
    return made


def make_run(folder: Path, *, ends: bool = True, **changes: Any) -> Path:
    """OUT, with a directory for each stage of `CHAIN`; the base is beside it."""
    tok = tokenizer(ends=ends)
    if not (folder / "base").exists():
        models.tiny_llama(**changes).save_pretrained(folder / "base")
        tok.save_pretrained(folder / "base")
    parent = None
    for name, mode, config in CHAIN:
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = begin_stage(base, name=name, parent=parent, mode=mode, config=config)
        fill_trainable(model.eval(), seed=len(name), size=0.3)
        parent = folder / "out" / name
        save_stage(model, parent, tokenizer=tok)
        tok.save_pretrained(parent)
    return folder / "out"


def write_state(out: Path, *, rolled_back: tuple[str, ...] = ()) -> None:
    stages, before = {}, None
    for name, _, _ in CHAIN:
        refused = name in rolled_back
        stages[name] = StageState(
            status="finished",
            hash="",
            inputs={},
            built_on=before,
            gate=Judgement(not refused, "rollback"),
        )
        before = before if refused else name
    RunState(stages, tuple(stages), "base").write(out)


def write_answers(out: Path, texts: dict[str, list[str]], prompts: list[str]) -> None:
    """`evaluation.json`, of these answers of base and stages."""

    def judged(name: str) -> Judged:
        answers = [Answer(p, t, 3, True) for p, t in zip(prompts, texts[name], strict=True)]
        return Judged(answers=tuple(answers))

    stages = {name: judged(name) for name in texts if name != "base"}
    Evaluation(judged("base"), stages).write(out)
