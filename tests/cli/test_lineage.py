"""`lamina lineage`: the tree, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import peft

from tests import models
from tests.cli.made import lamina, write_chain

TREE = """\
models/small (LlamaForCausalLM, vocabulary 64, float32)
└── domain  fresh  2026-11-24 08:10
    ├── added rank 4 to 6 modules (q_proj, v_proj), trained on by more
    └── more  continue
        ├── went on training domain's rank 4 in 6 modules
        ├── measured: eval_loss 1.25
        └── chat  stack
            ├── added rank 6 to 3 modules (q_proj)
            └── trained on: {"files": ["a.jsonl"]}
"""


def test_every_stage_grows_out_of_the_one_before(tmp_path: Path) -> None:
    done = lamina("lineage", write_chain(tmp_path / "chat"))
    assert "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n" == TREE


def test_json_is_the_chain_alone(tmp_path: Path) -> None:
    told = json.loads(lamina("lineage", write_chain(tmp_path / "chat"), "--json").stdout)
    assert set(told) == {"source", "base", "has_record", "chain"}
    assert [stage["trained"] for stage in told["chain"]["stages"]] == [0, 0, 1]


def test_a_plain_adapter_has_an_unknown_origin(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=".*q_proj")
    peft.get_peft_model(models.tiny_llama(), config).save_pretrained(tmp_path)
    text = lamina("lineage", tmp_path).stdout
    assert "(not named)" in text
    assert "imported  unknown origin" in text
    assert "added rank 4 to 2 modules (.*q_proj)" in text
