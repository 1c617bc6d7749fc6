from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_script_trains_saves_and_scores_a_base(tmp_path: Path) -> None:
    out = tmp_path / "base"
    script = ROOT / "scripts" / "train_demo_base.py"
    done = subprocess.run(
        [sys.executable, script, "--out", out, "--steps", "3", "--chars", "60000"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scored = re.search(r"held-out perplexity (\S+)", done.stdout)
    assert scored is not None
    # Three steps: better than guessing among the 4,096 tokens, far from good.
    assert 100 < float(scored[1]) < 4096

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(tokenizer) == model.config.vocab_size <= 4096
