"""The demo: a small model taken through three stages on three kinds of real text.

Stage 1 begins fresh on prose, stage 2 stacks a new adapter on code, stage 3 continues that one on
docstrings. After each stage the model is measured on the held-out part of every text.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from lamina import __version__
from lamina.config import LoraConfig
from lamina.demo.blocks import blocks, perplexity
from lamina.demo.corpus import stage_texts
from lamina.demo.reopen import EXPECTED, PROBE, reopen
from lamina.demo.show import draw_matrix, matrix_table, samples_table, stage_summary
from lamina.demo.train import train_stage
from lamina.errors import CheckpointError
from lamina.model import PeftModel
from lamina.model.auto import open_model
from lamina.stages import begin_stage, save_stage

SHIPPED_BASE = Path(__file__).parent / "base"
LENGTH = 128
HELD_OUT_BLOCKS = 80
RANK = 16
NEW_TOKENS = 40
STEPS = 120
MODES = ("fresh", "stack", "continue")


@dataclass
class Results:
    """What the demo found.

    Attributes:
        columns: the texts.
        matrix: row ("base" or a stage) -> text -> held-out perplexity.
        reload: library -> largest absolute difference of the logits in a fresh process.
        seconds: duration of everything after the imports.
        stages: stage -> its directory.
        samples: text -> {"prompt", "before", "after"}.
    """

    columns: list[str]
    matrix: dict[str, dict[str, float]] = field(default_factory=dict)
    reload: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    stages: dict[str, str] = field(default_factory=dict)
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    lamina: str = __version__


_OTHER_MODEL = "give a directory or hub id with a model and its tokenizer, or no --model"


@dataclass(frozen=True)
class _Text:
    name: str
    train: torch.Tensor
    held_out: torch.Tensor


def run_demo(
    output_dir: str | Path = "runs/demo",
    model_name_or_path: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Results:
    """Run the demo and show it.

    Args:
        output_dir: gets a directory for each stage, `matrix.png`, `results.json`, `demo.txt`.
        model_name_or_path: a causal language model; None takes the small one that is shipped.
        steps: of training per stage, 8 x 128 tokens each; None means 120.
        seed: of initial weights and the order of the data.
        console: where to show it.
    """
    began = time.monotonic()
    console = console or Console()
    disable_progress_bar()
    out = Path(output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"'{out}' can't be made a directory: {error.strerror}.", cure="choose another --output"
        ) from error
    name = model_name_or_path or str(SHIPPED_BASE)
    tokenizer = open_model(AutoTokenizer, name, cure=_OTHER_MODEL)
    texts = _tokenize(tokenizer)
    base = _load(name)
    results = Results(columns=[text.name for text in texts])
    console.print(_opening(base, name, texts))
    results.matrix["base"] = _measure(base, texts)
    before = {text.name: _continuation(base, tokenizer, text) for text in texts}

    model: Any = base
    parent: Path | None = None
    for text, mode in zip(texts, MODES, strict=True):
        row = f"{text.name} ({mode})"
        torch.manual_seed(seed)
        model = _begin(_load(name), text.name, mode, parent)
        train_stage(model, text.train, steps=steps or STEPS, seed=seed, title=row, console=console)
        results.matrix[row] = _measure(model, texts)
        parent = out / text.name
        save_stage(
            model,
            parent,
            metrics={f"perplexity/{key}": value for key, value in results.matrix[row].items()},
            data={"text": f"Python standard library: {text.name}", "blocks": len(text.train)},
            tokenizer=tokenizer,
        )
        results.stages[text.name] = str(parent)
        console.print(stage_summary(text.name, results.matrix))

    for text in texts:
        results.samples[text.name] = {
            "prompt": _prompt(tokenizer, text),
            "before": before[text.name],
            "after": _continuation(model, tokenizer, text),
        }
    assert parent is not None
    _write_expected(model, texts, out)
    results.reload = reopen(parent, name, out)
    results.seconds = time.monotonic() - began
    _finish(results, out, console)
    return results


def _load(name: str) -> Any:
    return open_model(AutoModelForCausalLM, name, cure=_OTHER_MODEL).eval()


def _tokenize(tokenizer: Any) -> list[_Text]:
    return [
        _Text(
            text.name,
            blocks(tokenizer, text.train, LENGTH),
            blocks(tokenizer, text.held_out, LENGTH, HELD_OUT_BLOCKS),
        )
        for text in stage_texts()
    ]


def _begin(base: Any, name: str, mode: str, parent: Path | None) -> PeftModel:
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if mode == "fresh":
        return begin_stage(base, name=name, config=config)
    return begin_stage(
        base, name=name, parent=parent, mode=mode, config=None if mode == "continue" else config
    )


def _measure(model: Any, texts: list[_Text]) -> dict[str, float]:
    return {text.name: perplexity(model, text.held_out) for text in texts}


def _prompt(tokenizer: Any, text: _Text) -> str:
    return str(tokenizer.decode(text.held_out[0][:16]))


@torch.no_grad()
def _continuation(model: Any, tokenizer: Any, text: _Text) -> str:
    """What the model writes after the first words of a held-out text; greedy, so repeatable."""
    model.eval()
    prompt = text.held_out[:1, :16]
    written = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        repetition_penalty=1.3,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))


@torch.no_grad()
def _write_expected(model: Any, texts: list[_Text], out: Path) -> None:
    probe = torch.cat([text.held_out[:1] for text in texts])
    logits = model(input_ids=probe).logits
    save_file({PROBE: probe, EXPECTED: logits.float().contiguous()}, out / "expected.safetensors")


def _opening(base: Any, name: str, texts: list[_Text]) -> str:
    count = sum(parameter.numel() for parameter in base.parameters())
    shown = "the shipped base" if name == str(SHIPPED_BASE) else name
    sizes = ", ".join(f"{text.name} {text.train.numel() // 1000}k" for text in texts)
    return (
        f"[bold]{shown}[/bold]: {type(base).__name__}, {count / 1e6:.2f} M parameters. "
        f"Training texts in tokens: {sizes}."
    )


def _finish(results: Results, out: Path, console: Console) -> None:
    (out / "results.json").write_text(json.dumps(asdict(results), indent=2) + "\n", "utf-8")
    draw_matrix(results.matrix, results.columns, out / "matrix.png")
    with (out / "demo.txt").open("w", encoding="utf-8") as written:
        for target in (console, Console(width=100, file=written)):
            target.print(matrix_table(results.matrix, results.columns))
            target.print(samples_table(results.samples))
            for library, difference in results.reload.items():
                target.print(_reload_line(library, difference))
    newest = list(results.stages.values())[-1]
    console.print(f"Plot: {out / 'matrix.png'}. Took {results.seconds:.0f} s.")
    console.print(f"To see that it still answers so: lamina verify {newest}", highlight=False)


def _reload_line(library: str, difference: float | None) -> str:
    if difference is None:
        return f"{library} is not installed here, so the directory was not opened with it."
    return (
        f"Opened by {library} in a fresh process: largest difference of a logit {difference:.1e}."
    )
