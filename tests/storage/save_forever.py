"""Save a directory in a loop until killed: `python save_forever.py TARGET exchange|renames`."""

from __future__ import annotations

import sys

from lamina.storage import exchange
from lamina.storage.atomic import atomic_directory

target, way = sys.argv[1:]
if way == "renames":
    exchange._swap_call = lambda libc: None

version = 0
while True:
    version += 1
    with atomic_directory(target) as staging:
        (staging / "adapter_model.safetensors").write_text(f"{version} " * 20_000)
        (staging / "adapter_config.json").write_text(f"{version}")
    if version == 1:
        print("begun", flush=True)
