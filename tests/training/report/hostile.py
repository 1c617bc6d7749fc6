"""A run whose every text tries to get out of where it is put."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lamina.training.evaluate.scores import Answer, Evaluation, Judged, Measured, ModuleDrift, Score
from lamina.training.run.state import Judgement, Retry, RunState, StageState
from tests.stages import chains
from tests.training.report import made

STRINGS = (
    "<script>alert(1)</script>",
    "</style><script>alert(2)</script>",
    "\"><img src=x onerror='alert(3)'>",
    "' onmouseover='alert(4)",
    "</title><svg onload=alert(5)>",
    "</svg></picture>--><iframe src=//evil.example>",
    "javascript:alert(6)",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0}$ & <b> \x00\x1b[31m \u202e HALF",
    "``` | [x](javascript:alert(8)) ![x](https://evil.example/x.png) www.evil.example\n# x\n---",
)


def write_run(folder: Path) -> Path:
    """A directory as no run would leave it."""
    folder = folder / "<img src=x onerror=alert(9)>"
    made.write_run(folder, made.CHAIN[:1])
    chains.rewrite_record(folder / "domain", _poison)
    state = RunState.read(folder)
    names = [*state.order, *STRINGS]
    stages = {"domain": replace(state.stages["domain"], gate=Judgement(True, STRINGS[0], STRINGS))}
    below = "domain"
    for number, name in enumerate(STRINGS):
        passed = number % 2 == 0
        stages[name] = StageState(
            "finished",
            "",
            {"method": name, "mode": name, "optim": name, "trainer_args": {name: [name]},
             f"version of {name}": name},
            why=name,
            built_on=below,
            retries=(Retry(1e-3, STRINGS),),
            gate=Judgement(passed, name if passed else "rollback", STRINGS, STRINGS),
        )  # fmt: skip
        below = name if passed else below
        made.write_log(folder, replace(made.CHAIN[0], name=f"n{number}"))
    RunState(stages, tuple(names), base=STRINGS[2]).write(folder)
    judged = _judged()
    of_stages = dict.fromkeys(names, replace(judged, drift=()))
    of_stages[STRINGS[9]] = judged
    Evaluation(judged, of_stages, STRINGS, {STRINGS[0]: names[1]}).write(folder)
    for name in ("run.json", "evaluation.json"):
        # Half a character, which JSON can say and UTF-8 can't.
        file = folder / name
        file.write_text(file.read_text().replace("HALF", "\\ud800"))
    return folder


def _poison(record: dict[str, object]) -> None:
    stages = record["stages"]
    assert isinstance(stages, list)
    sources = [{"path": each, "rows": each, "digest": each, "hub": True} for each in STRINGS]
    stages[-1]["data"] = {"method": "pt", "format": STRINGS[0], "rows": STRINGS, "sources": sources}
    stages[-1]["base"]["model_class"] = STRINGS[1]


def _judged() -> Judged:
    scores = {
        name: Measured("", Score(name, 0.5, True, 3, details={name: 1.0})) for name in STRINGS
    }
    answers = tuple(Answer(each, each, 3, True) for each in STRINGS)
    drift = tuple(ModuleDrift(f"model.layers.0.{each}", 1.0, 3.0, 2.0, 4) for each in STRINGS)
    return Judged("", scores, answers, "", drift)
