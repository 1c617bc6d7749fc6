"""Train the demo's base model from nothing: a BPE tokenizer and a small Llama, on one thread.

It reads the part of the standard library that no stage of the demo reads. The text depends on the
Python that runs this; the model in the package was made under Python 3.11 with the defaults below.

    python scripts/train_demo_base.py --out src/lamina/demo/base
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from rich.progress import Progress, TextColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lamina.demo.blocks import blocks, perplexity
from lamina.demo.corpus import base_text

VOCABULARY = 4096
CONTEXT = 256
BATCH = 8
LEARNING_RATE = 3e-3
WARMUP = 0.05
END_TOKEN, PAD_TOKEN = "<|end|>", "<|pad|>"


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text at all has tokens, and decoding gives it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about 2.6 million parameters, output tied to the embedding."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def learning_rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the full rate to a hundredth; a factor in (0, 1]."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: LlamaForCausalLM, data: torch.Tensor, steps: int) -> None:
    """AdamW on `steps` batches, the blocks shuffled anew each time all have been read."""
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_at(step, steps)
    )
    model.train()
    order = torch.empty(0, dtype=torch.long)
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.randperm(len(data))
            picked, order = order[:BATCH], order[BATCH:]
            loss = model(input_ids=data[picked], labels=data[picked]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss.item())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights in fp16 to halve the file; the config says float32, which is what they load as."""
    weights = {name: value.half() for name, value in model.state_dict().items()}
    # Rounding gives the tied head a tensor of its own, which would be written a second time.
    del weights["lm_head.weight"]
    model.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that 4 doesn't know; both know this one.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train, save, and print the perplexity of the saved model on text it has not read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    parser.add_argument("--chars", type=int, default=None, help="read only this much of the text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    text = base_text()
    train_text = text.train[: arguments.chars]
    tokenizer = train_tokenizer(train_text, VOCABULARY)
    model = new_model(tokenizer)
    data = blocks(tokenizer, train_text, CONTEXT)
    print(f"{model.num_parameters():,} parameters, {data.numel():,} tokens")
    train(model, data, arguments.steps)
    save(model, tokenizer, arguments.out)

    saved = LlamaForCausalLM.from_pretrained(arguments.out)
    held_out = blocks(tokenizer, text.held_out, CONTEXT, limit=100)
    print(f"held-out perplexity {perplexity(saved, held_out):.2f}")


if __name__ == "__main__":
    main()
