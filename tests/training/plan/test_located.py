"""What a plan names is looked for beside its file first, by every verb alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lamina
from lamina.errors import PlanError
from lamina.training.data.preview import preview
from lamina.training.plan import open_plan, read_plan
from lamina.training.plan.located import located, place_of
from lamina.training.preflight import check_plan
from lamina.training.run import run_plan
from tests.training.run import plans

PLAN = """\
model_name_or_path: {base}
tokenizer_name_or_path: words
chat_template: template.jinja
output_dir: {out}
defaults: {{lora_r: 2, lora_target_modules: [q_proj], max_steps: 2, max_length: 32}}
stages:
  - {{name: talk, method: sft, datasets: "data/*.jsonl"}}
"""
TEMPLATE = "{% for each in messages %}w1 {{ each.content }} {% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a plan needs, which nobody works in."""
    made = tmp_path / "plans"
    plans.write_base(made / "base")
    (made / "words").mkdir()
    for file in (*(made / "base").glob("tokenizer*"), *(made / "base").glob("special*")):
        file.rename(made / "words" / file.name)
    (made / "template.jinja").write_text(TEMPLATE)
    (made / "data").mkdir()
    talk = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]
    plans.write_rows(made / "data" / "talks.jsonl", [{"messages": talk}] * 4)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return made


@pytest.mark.parametrize("base", ["base", "./base", "../plans/base"])
def test_every_verb_finds_what_lies_beside_the_plan(base: str, folder: Path) -> None:
    file = folder / "plan.yaml"
    file.write_text(PLAN.format(base=base, out="out"))
    opened = open_plan(file)
    report = check_plan(opened.plan, document=opened.document)
    assert report.faults == ()
    assert (report.base, report.stages[0].examples) == (base, 4)
    (shown,) = preview(file).stages
    assert "w1 w3 w4 w1 w5" in "".join(span.text for span in shown.examples[0][""])
    result = run_plan(opened.plan, root=folder)
    assert Path(result.path) == Path("out/talk").resolve()
    named = json.loads((Path(result.path) / "adapter_config.json").read_text())
    # From anywhere the base is found again.
    assert named["base_model_name_or_path"] == str((folder / "base").resolve())
    lamina.load(result.path)


def test_the_working_directory_comes_second(folder: Path) -> None:
    here = Path("base")
    plans.write_base(here)
    (folder / "plan.yaml").write_text(PLAN.format(base="base", out="out"))
    plan = read_plan(folder / "plan.yaml")
    assert located(plan, folder).model_name_or_path == str((folder / "base").resolve())
    (folder / "base").rename(folder / "other")
    assert located(plan, folder).model_name_or_path == str(here.resolve())
    here.rename("none")
    assert located(plan, folder) == plan.model_copy(
        update={"tokenizer_name_or_path": str((folder / "words").resolve())}
    )
    assert place_of("data/t*.jsonl", folder) == folder / "data" / "t*.jsonl"
    assert place_of("data/x*.jsonl", folder) == folder / "data" / "x*.jsonl"
    Path("data").mkdir()
    Path("data/x.jsonl").touch()
    assert place_of("data/x*.jsonl", folder) == Path("data/x*.jsonl")


def test_what_can_only_be_a_folder_is_not_asked_the_hub_for(folder: Path) -> None:
    (folder / "plan.yaml").write_text(PLAN.format(base="./bass", out="out"))
    opened = open_plan(folder / "plan.yaml", ["tokenizer_name_or_path=/nowhere/words"])
    report = check_plan(opened.plan, document=opened.document)
    with pytest.raises(PlanError):
        report.check()
    assert report.faults == (
        "command line: tokenizer_name_or_path: There is no folder '/nowhere/words'",
        "line 1: model_name_or_path: There is no folder './bass'; did you mean 'base'?",
    )


def test_a_template_that_is_not_there_is_a_fault_at_its_line(folder: Path) -> None:
    (folder / "template.jinja").unlink()
    (folder / "plan.yaml").write_text(PLAN.format(base="base", out="out"))
    opened = open_plan(folder / "plan.yaml")
    (fault,) = check_plan(opened.plan, document=opened.document).faults
    assert fault.startswith(
        "line 3: chat_template: template.jinja is neither a template nor a file"
    )
