"""Save a stage over itself, again and again, until killed: `python save_forever.py DIRECTORY`.

Each line of its input begins a child that is forked from this process, with torch loaded. Of each
save the data, and one value in every tensor, are the same number.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from dataclasses import replace

import torch

from lamina.config import LoraConfig
from lamina.stages import begin_stage, save_stage
from tests.stages.chains import wide

torch.set_num_threads(1)
directory = sys.argv[1]
model = begin_stage(wide(), name="chat", config=LoraConfig(r=256, target_modules=["0"]))
to_json = LoraConfig.to_json


def slowly(config: LoraConfig) -> str:
    # The config is made after the weights are written: time to be killed between the two.
    time.sleep(0.01)
    return to_json(config)


LoraConfig.to_json = slowly  # type: ignore[method-assign]


def save(number: int) -> None:
    # The config tells the versions apart too.
    config = {**model.stage.config, "lora_dropout": number / 1e6}
    model.stage = replace(model.stage, config=config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(number)
    save_stage(model, directory, metrics={"number": number}, data=number)


save(1)
began = time.perf_counter()
save(2)
print(time.perf_counter() - began, flush=True)
start = 3
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        for number in itertools.count(start):
            save(number)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
    start += 10_000
