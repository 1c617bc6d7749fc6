"""Open a stage's directory in a fresh process, with Lamina and with the real PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PROBE = "input_ids"
EXPECTED = "logits"


def reopen(stage: Path, base: str, out: Path) -> dict[str, float | None]:
    """Library -> the largest absolute difference from the logits that were written down.

    None stands for a library that is not installed.
    """
    found: dict[str, float | None] = {}
    for library in ("lamina", "peft"):
        if find_spec(library) is None:
            found[library] = None
            continue
        command = [sys.executable, "-m", __name__, library, str(stage), base, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"opening {stage} with {library} failed:\n{done.stderr}")
        found[library] = float(json.loads(done.stdout.splitlines()[-1]))
    return found


def _difference(library: str, stage: str, base: str, out: str) -> float:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    expected = load_file(Path(out) / "expected.safetensors")
    if library == "lamina":
        from lamina.stages import load

        model = load(stage, base)
    else:
        from peft import PeftModel

        plain = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(plain, stage).eval()
    with torch.no_grad():
        logits = model(input_ids=expected[PROBE]).logits
    return float((logits.float() - expected[EXPECTED]).abs().max())


if __name__ == "__main__":
    print(json.dumps(_difference(*sys.argv[1:5])))  # noqa: T201
