"""Write docs/plan.md and docs/plan.schema.json: every key of a plan, from the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lamina.training.plan import Plan, StagePlan, json_schema
from lamina.training.plan.aliases import OF_DATA, OF_PLAN, OF_SETTINGS
from lamina.training.plan.explained import described, expected
from lamina.training.plan.schema import BUILT_IN, LEARNING_RATES, Eval, Prompt
from lamina.training.plan.settings import Data, Gate, Settings

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE, SCHEMA = DOCS / "plan.md", DOCS / "plan.schema.json"
_ALIASES = {**OF_PLAN, **OF_SETTINGS, **OF_DATA}
_HEAD = """# The keys of a plan

A plan is a YAML file that takes a base model through stages. `lamina init` writes one,
`lamina import FILE` makes one of a configuration of LLaMA-Factory or Axolotl or of a script that
uses peft and TRL, and `lamina validate PLAN` says everything that is wrong with one, with lines:
first with what it says, then with what it means to the base, the data and the machine.

```yaml
model_name_or_path: Qwen/Qwen3-0.6B
output_dir: runs/bot
defaults: {lora_r: 16}
stages:
  - {name: domain, method: pt, datasets: manual.txt}
  - {name: chat, method: sft, mode: stack, datasets: talks.jsonl}
  - {name: preference, method: dpo, mode: stack, datasets: pairs.jsonl}
```

- A setting is taken from the stage, else from `defaults`, else from the tables below. What a key
  can't mean is an error; nothing is ignored.
- `KEY=VALUE` on the command line overrules the file: `stages.chat.lora_r=4`,
  `defaults.learning_rate=1e-4`, or `learning_rate=1e-4` for the same.
- Base, tokenizer, data, chat template and functions are looked for beside the plan's file first,
  then in the working directory, whichever verb reads the plan. `output_dir` is a folder of the
  working directory.
- Before anything is trained, `lamina run` makes sure of all that `lamina validate` looks at: every
  stage is begun once on a base without weights, and its trainer, optimizer and schedule are made
  once on a stand-in, so that what one of them would refuse is told with its line.
- A gate in `defaults` is one of every stage. What may be rolled back can't be another stage's
  `reference`, nor all that is before a stage that goes on with `mode: continue`.
- Editors complete and check a plan by `plan.schema.json` (`lamina init --schema` puts it beside
  the plan, with the line that names it).

Written by `python scripts/plan_table.py` from the classes and their docstrings.
"""


def table(part: type[BaseModel], without: type[BaseModel] | None = None) -> list[str]:
    """A row for each key of a part of the plan."""
    texts = described(part)
    rows = ["| key | takes | default | what it is |", "|---|---|---|---|"]
    for name, field in part.model_fields.items():
        if without is None or name not in without.model_fields:
            kinds = expected(_annotation(part, name))
            rows.append(
                f"| `{name}` | {_cell(kinds)} | {_default(part, name, field)} "
                f"| {_cell(texts[name])} |"
            )
    return rows


def _annotation(part: type[BaseModel], name: str) -> Any:
    """A field's type with all that is said of it."""
    field = part.model_fields[name]
    return field.rebuild_annotation()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(part: type[BaseModel], name: str, field: Any) -> str:
    if field.is_required():
        return "required"
    if issubclass(part, Settings) and name in BUILT_IN:
        return f"`{_written(BUILT_IN[name])}`"
    if name == "learning_rate":
        return "by method: " + ", ".join(
            f"{key} `{rate:g}`" for key, rate in LEARNING_RATES.items()
        )
    value = field.get_default(call_default_factory=True)
    return (
        "" if value is None or value in ([], {}) or name == "defaults" else f"`{_written(value)}`"
    )


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def page() -> str:
    """docs/plan.md."""
    lines = [_HEAD, "## The plan", "", *table(Plan)]
    lines += ["", "## A stage", "", *table(StagePlan, without=Settings)]
    lines += ["", "And any of the following, which `defaults` may have for all stages:", ""]
    lines += table(Settings)
    lines += ["", "## Data: `datasets`, `eval_datasets`", "", *table(Data)]
    lines += ["", "## An eval", "", *table(Eval), "", "## A gate", "", *table(Gate)]
    lines += ["", "## A prompt", "", *table(Prompt)]
    lines += [
        "",
        "## Other names",
        "",
        "Names of other tools that mean the same are understood:",
        "",
    ]
    lines += ["| name | means |", "|---|---|"]
    lines += [f"| `{alias}` | `{own}` |" for alias, own in sorted(_ALIASES.items())]
    return "\n".join(lines) + "\n"


def schema() -> str:
    """docs/plan.schema.json."""
    return json.dumps(json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    TABLE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
    print(TABLE, SCHEMA)
