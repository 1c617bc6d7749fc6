from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lamina.training.evaluate.scores import Evaluation
from lamina.training.report import ReportResult, write_report
from tests.training.report import hostile, made
from tests.training.report.parsed import Tag, parse

TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "p", "h1", "dl", "div", "dt", "dd",
    "nav", "a", "main", "section", "h2", "svg", "path", "text", "g", "rect", "table", "thead",
    "tbody", "tr", "th", "td", "span", "abbr", "i", "ul", "li", "figure", "figcaption", "picture",
    "source", "img", "details", "summary", "pre", "code", "footer", "root",
}  # fmt: skip


@pytest.fixture(scope="module")
def page(reported: ReportResult) -> Tag:
    return parse(reported.html.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> ReportResult:
    return write_report(hostile.write_run(tmp_path_factory.mktemp("runs")))


def tags_in(tag: Tag) -> Iterator[Tag]:
    yield tag
    for child in tag.children:
        yield from tags_in(child)


def table_of(section: Tag) -> list[list[str]]:
    return [
        [cell.words for cell in row.children if cell.name in {"td", "th"}]
        for row in section.all("table")[0].all("tr")
    ]


def section(page: Tag, name: str) -> Tag:
    return page.all("section", id=name)[0]


def test_the_policy_lets_in_one_style_and_pictures_in_the_file(reported: ReportResult) -> None:
    text = reported.html.read_text(encoding="utf-8")
    page = parse(text)
    policy = [m for m in page.all("meta") if m.attributes.get("http-equiv")]
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    allowed = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert [each.attributes["content"] for each in policy] == [allowed]
    assert text.count("<style") == 1


def assert_loads_nothing(text: str) -> None:
    page = parse(text)
    assert {each.name for each in tags_in(page)} <= TAGS
    for tag in tags_in(page):
        for name, value in tag.attributes.items():
            assert not name.startswith("on"), name
            assert name not in {"style", "action", "formaction", "xlink:href", "background"}
            if name in {"src", "srcset"}:
                assert (value or "").startswith("data:image/svg+xml;base64,")
            if name == "href":
                assert re.fullmatch("#[a-z]+", value or "")


def test_nothing_is_loaded_from_anywhere(reported: ReportResult) -> None:
    assert_loads_nothing(reported.html.read_text(encoding="utf-8"))


def test_no_text_gets_out_of_its_place(hostile_page: ReportResult) -> None:
    text = hostile_page.html.read_text(encoding="utf-8")
    assert_loads_nothing(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    page = parse(text)
    prompts = [each.text for each in page.all("p", class_="asked")]
    assert prompts[:8] == list(hostile.STRINGS[:8])
    assert "49" not in prompts[7]
    assert page.all("h1")[0].words == "<img src=x onerror=alert(9)>"


def test_pictures_are_whole_whatever_the_names_in_them(hostile_page: ReportResult) -> None:
    page = parse(hostile_page.html.read_text(encoding="utf-8"))
    uris = [each.attributes["src"] for each in page.all("img")]
    uris += [each.attributes["srcset"] for each in page.all("source")]
    # The losses of the one stage that has a directory, and the drift of another.
    assert len(uris) == 2 * 2
    for uri in uris:
        drawn = ElementTree.fromstring(base64.b64decode((uri or "").partition(",")[2]))
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
        names = {each.tag.rpartition("}")[2] for each in drawn.iter()}
        assert not names & {"script", "foreignObject", "iframe", "a"}


def test_the_matrix_is_a_table(page: Tag) -> None:
    rows = table_of(section(page, "evals"))
    assert rows[0] == [
        "eval", "base", "domain", "chat", "slangrolled back", "prefer", "gain", "forgetting",
        "backward transfer", "learnt in",
    ]  # fmt: skip
    assert rows[1] == [
        "docsloss, lower is better", "3.214", "2.861−0.353", "2.934+0.073", "3.804+0.870",
        "2.941+0.007", "+0.273", "0.080", "−0.080", "domain",
    ]  # fmt: skip
    cells = section(page, "evals").all("td", class_="cell")
    assert (cells[1].attributes["class"] or "").split() == ["cell", "g4", "own"]
    assert "perplexity: 17.479" in (cells[1].attributes["title"] or "")
    assert section(page, "evals").all("td", class_="g-5")


def test_settings_that_differ_come_first(page: Tag) -> None:
    rows = table_of(section(page, "settings"))
    assert rows[0] == ["setting", "domain", "chat", "slang", "prefer"]
    told = {row[0]: row[1:] for row in rows[1:]}
    assert told["learning_rate"] == ["0.0002", "0.0001", "–", "5e-06"]
    # prefer goes on with chat's ranks, whatever a plan's defaults say.
    assert told["lora_r"] == ["8", "4", "4", "4"]
    assert "max_length" not in told
    assert "max_length1024" in section(page, "settings").all("details")[0].words.replace(" ", "")


def test_every_stage_says_what_it_took(page: Tag) -> None:
    rows = table_of(section(page, "stages"))
    told = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [each["is"] for each in told] == ["finished", "finished", "rolled back", "finished"]
    assert told[3]["begun"] == "continues chat"
    assert told[3]["ranks"] == "rank 4 of chat"
    assert told[3]["in its file"] == "8 + 4"
    # 4,096 tokens in each of 30 lines, 1.5 s apart.
    assert (told[0]["tokens"], told[0]["tokens/s"]) == ("123K", "2,731")
    assert (told[0]["steps"], told[0]["took"]) == ("300", "1:33 min")


def test_answers_stand_side_by_side(page: Tag) -> None:
    prompts = section(page, "answers").all("div", class_="prompt")
    assert [each.all("p", class_="asked")[0].words for each in prompts] == list(made.PROMPTS)
    by = [each.words for each in prompts[1].all("p", class_="by")]
    assert by == [
        "base 9 tokens, cut off", "domain 2 tokens", "chat as before, 2 tokens", "slang 1 token",
        "prefer 1 token",
    ]  # fmt: skip


def test_gates_say_what_they_said(page: Tag) -> None:
    told = [each.words for each in section(page, "gates").all("div", class_="gate")]
    assert told[0].startswith("chat passed docs: loss 2.861 -> 2.934, worse by 2.6%")
    assert told[1].startswith("slang refused on failure: rollback docs: loss 2.934 -> 3.804")
    assert "tried before at a learning rate of 0.0001, refused" in told[1]


def test_lineage_is_drawn_for_wide_and_narrow(page: Tag) -> None:
    drawn = section(page, "lineage").all("svg")
    assert [each.attributes["class"] for each in drawn] == ["graph wide", "graph narrow"]
    for graph in drawn:
        boxes = graph.all("g")
        names = [each.all("text", class_="name")[0].words for each in boxes]
        assert names == ["tiny-llama", "domain", "chat", "✕ slang", "prefer"]
        assert [each.words for each in graph.all("text", class_="mode")] == [
            "stack", "stack", "continue",
        ]  # fmt: skip
        parts = boxes[4].all("rect", class_="rank")
        assert [each.words for each in parts] == [
            "rank 8, begun by domain", "rank 4, begun by chat, trained on by prefer",
        ]  # fmt: skip
        widths = [float(each.attributes["width"] or 0) for each in parts]
        assert (widths[0] + 2) / (widths[1] + 2) == pytest.approx(2, abs=0.02)


def test_data_has_digests_and_rows(page: Tag) -> None:
    rows = table_of(section(page, "data"))
    assert rows[1] == ["domain", "messages", "data/domain.jsonl", "1,000", "cdcdcdcdcdcd"]
    assert rows[2] == ["acme/dialogues", "200", "efefefefefef"]


def test_ids_that_are_linked_to_are_there(page: Tag) -> None:
    linked = [(each.attributes["href"] or "")[1:] for each in page.all("a")]
    assert linked == [each.attributes["id"] for each in page.all("section")]


@pytest.mark.parametrize(
    ("stages", "there", "not_there"),
    [
        ((made.Made("first", status="failed", lines=0),), {"stages"}, {"evals", "use", "losses"}),
        ((made.Made("first", status="running"),), {"losses", "stages"}, {"use", "data"}),
        (made.CHAIN[:1], {"use", "data", "losses"}, {"evals", "answers", "drift"}),
    ],
)
def test_partial_runs_say_what_is_missing(
    tmp_path: Path, stages: tuple[made.Made, ...], there: set[str], not_there: set[str]
) -> None:
    run = made.write_run(
        tmp_path / "run", stages, base_scores=None, base_answers=(), drift=False
    )  # fmt: skip
    if stages == made.CHAIN[:1]:
        (run / "evaluation.json").unlink()
    page = parse(write_report(run).html.read_text(encoding="utf-8"))
    found = {each.attributes["id"] for each in page.all("section")}
    assert there <= found
    assert not not_there & found
    missing = page.all("div", class_="missing")[0].words
    assert "evals: " in missing
    assert "answers: " in missing


def test_losses_that_are_no_numbers_are_said(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run", made.CHAIN[:1], adapters=False)
    file = run / "logs" / "domain.jsonl"
    with file.open("a") as opened:
        opened.write('{"step": 310, "loss": null}\n{"step": 320, "loss": NaN}\nnot a line\n[1]\n')
    page = parse(write_report(run).html.read_text(encoding="utf-8"))
    assert "a loss that is no finite number, at step 310 and 320" in section(page, "stages").words
    assert len(section(page, "losses").all("img")) == 1


def test_scores_without_end_are_shown(tmp_path: Path) -> None:
    stages = (replace(made.CHAIN[0], scores={"docs": float("inf"), "chat": float("nan")}),)
    run = made.write_run(tmp_path / "run", stages, adapters=False)
    rows = table_of(section(parse(write_report(run).html.read_text()), "evals"))
    assert rows[1][2] == "∞+∞"
    assert rows[2][2] == "NaN–"


def test_a_stage_that_was_measured_on_nothing(tmp_path: Path, finished: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    evaluation = Evaluation.read(copy)
    chat = replace(evaluation.stages["chat"], scores={}, drift=(), answers=())
    evaluation.having("chat", chat).write(copy)
    rows = table_of(section(parse(write_report(copy).html.read_text()), "evals"))
    assert rows[1][3] == "–"
    assert rows[1][5] == "2.941"


def test_answers_are_matched_by_their_prompts(tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run", made.CHAIN[:2], adapters=False, drift=False)
    evaluation = Evaluation.read(run)
    domain = evaluation.stages["domain"]
    # A prompt that was put in front later, and wasn't put to all yet.
    first = replace(domain.answers[0], prompt="new", text="newer")
    evaluation.having("domain", replace(domain, answers=(first, *domain.answers))).write(run)
    page = parse(write_report(run).html.read_text())
    told = {
        each.all("p", class_="asked")[0].words: [t.words for t in each.all("div", class_="text")]
        for each in page.all("div", class_="prompt")
    }
    assert told["new"] == ["newer"]
    assert told[made.PROMPTS[1]] == ["a = 1 a = 1 a = 1", "import os", "import os"]
