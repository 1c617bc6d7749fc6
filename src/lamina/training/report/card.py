"""A model card in the hub's format: what a run came to, in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lamina._version import __version__
from lamina.errors import escaped
from lamina.extras import require
from lamina.training.evaluate.scores import Score
from lamina.training.report import sections
from lamina.training.report.facts import RunFacts
from lamina.training.report.heat import ShownMatrix, shown_matrix
from lamina.training.report.page import environment
from lamina.training.report.settings import settings_of
from lamina.training.report.usage import uses_of
from lamina.training.report.verdict import sentence_of

MARK = "<!-- By `lamina report`, which may replace it. Without this line the text is yours. -->"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?")
# What Markdown, the HTML in it, or what finds links and names in it, takes for more than a letter.
_SPECIAL = re.compile(
    r"[\\`*\[\]~$<>&|]|(?<!\w)_|_(?!\w)|:(?=//)|@(?=\w)|(?<=www)\.|^[-+#](?=[\s#]|$)", re.IGNORECASE
)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;"}
_ENTITIES |= {":": "&#58;", "@": "&#64;", ".": "&#46;"}
_TICKS = re.compile("`+")


def card_of(facts: RunFacts) -> str:
    """The card, with its metadata."""
    matrix = shown_matrix(facts)
    templates = environment()
    # What these make is Markdown, which the escapes of HTML would spoil.
    markup = require("markupsafe", "report").Markup
    templates.filters["md"] = lambda text: markup(markdown(str(text)))
    templates.filters["fenced"] = lambda text, language: markup(fenced(str(text), language))
    body = templates.get_template("card.md.j2").render(
        facts=facts,
        mark=MARK,
        base=_base_on_hub(facts),
        verdict=sentence_of(facts, matrix.matrix),
        matrix=matrix,
        lines=[each for each in sections.stage_lines(facts) if each.stage.in_chain],
        left_out=[each for each in facts.stages if each.is_dead_end],
        settings=settings_of(facts.stages),
        begun=[each for each in facts.stages if each.inputs],
        data=[(each, sections.sources_of(each)) for each in facts.stages if each.in_chain],
        versions=sections.versions_of(facts),
        uses=uses_of(facts, "PATH", _base_on_hub(facts) or "BASE") if facts.end else [],
        missing=sections.missing(facts),
        version=__version__,
    )
    return f"---\n{_metadata(facts, matrix).to_yaml()}\n---\n{body}"


def is_ours(file: Path) -> bool:
    """Whether a card was written by Lamina, and nobody has taken it over since."""
    try:
        return MARK in file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def is_hub_name(name: str | None) -> bool:
    """Whether this can be a repository's name, and is no path."""
    return name is not None and bool(_HUB_NAME.fullmatch(name))


def _base_on_hub(facts: RunFacts) -> str | None:
    return facts.base_name if is_hub_name(facts.base_name) else None


def _metadata(facts: RunFacts, matrix: ShownMatrix) -> ModelCardData:
    base = _base_on_hub(facts)
    known: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    datasets = sorted(set(_datasets(facts)))
    results = list(_results(facts, matrix))
    if results:
        known |= {"eval_results": results, "model_name": _plain(facts.name)}
    return ModelCardData(
        library_name="peft",
        pipeline_tag="text-classification" if facts.is_reward_model else "text-generation",
        tags=sorted({"lora", "lamina", *_methods(facts)}),
        datasets=datasets or None,
        **known,
    )


def _methods(facts: RunFacts) -> Iterator[str]:
    """The methods of the chain, as the hub's tags have them."""
    for name in facts.chain:
        method = facts.stage(name).method
        if method is not None and re.fullmatch("[a-z0-9-]{1,20}", method):
            yield {"pt": "continued-pretraining", "reward": "reward-model"}.get(method, method)


def _datasets(facts: RunFacts) -> Iterator[str]:
    """Those of the hub, by what the record says of them: a path may look like a name."""
    for name in facts.chain:
        told = facts.stage(name).data.get("sources")
        for source in told if isinstance(told, list) else []:
            path = source.get("path") if isinstance(source, dict) else None
            if isinstance(path, str) and source.get("hub") is True and is_hub_name(path):
                yield path


def _results(facts: RunFacts, matrix: ShownMatrix) -> Iterator[EvalResult]:
    # Without a stage that counts, the last value is the base's, which is no result of this.
    for shown in matrix.rows if facts.end is not None else ():
        score = shown.row.cells[-1].score
        if score is None or not math.isfinite(score.value):
            continue
        name = _plain(shown.row.name)
        for metric, value in _values(score):
            yield EvalResult(
                task_type="text-classification" if facts.is_reward_model else "text-generation",
                dataset_type=re.sub(r"[^\w.-]+", "-", name) or "eval",
                dataset_name=name,
                metric_type=metric,
                metric_value=value,
            )


def _values(score: Score) -> Iterator[tuple[str, float]]:
    yield _plain(score.metric), round(score.value, 6)
    perplexity = score.details.get("perplexity")
    if perplexity is not None and math.isfinite(perplexity):
        yield "perplexity", round(perplexity, 6)


def _plain(text: str) -> str:
    return escaped(text).replace("\n", " ").strip()


def markdown(text: str) -> str:
    """A text as it is, whatever it holds, in a paragraph or a cell of a table."""
    told = re.sub(r"\s*[\r\n]\s*", " ", escaped(text).strip())
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), told)


def fenced(text: str, language: str = "") -> str:
    """A text as a block of code, which nothing in it ends."""
    longest = max((len(run) for run in _TICKS.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{escaped(text)}\n{fence}"
