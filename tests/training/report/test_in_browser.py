from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lamina.training.report import ReportResult, write_report
from tests.training.report import hostile, made
from tests.training.report.browser import Browser, browser, program

pytestmark = [
    pytest.mark.skipif(program() is None, reason="no Chromium is installed"),
    pytest.mark.slow,
]
# What makes a page wider than its window, but for what scrolls in a frame of its own.
_TOO_WIDE = """
[...document.querySelectorAll("body *")].filter(each =>
    !each.closest(".scroll") && each.getClientRects().length
    && (each.getBoundingClientRect().right > innerWidth + 0.5
        || each.getBoundingClientRect().left < -0.5)
).map(each => each.tagName + "." + each.className + ": " + each.textContent.slice(0, 40))
"""
_BROKEN_PICTURES = """
Promise.all([...document.images].map(each => each.decode().then(
    () => each.naturalWidth > 0 ? null : "empty", error => String(error)
))).then(all => all.filter(each => each !== null))
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(reported: ReportResult, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    names = [f"stage{'-and-more' * 6}{number}" for number in range(9)]
    many = [replace(made.CHAIN[1], name=name, rank=2) for name in names]
    many[3:3] = [made.REFUSED]
    nothing = [made.Made("first", status="failed", lines=0), made.Made("last", status="waiting")]
    return {
        "usual": reported.html,
        "many": write_report(made.write_run(folder / "many", many, adapters=False)).html,
        "nothing": write_report(
            made.write_run(folder / "none", nothing, base_scores=None, base_answers=(), drift=False)
        ).html,
        "hostile": write_report(hostile.write_run(folder)).html,
    }


@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("name", ["usual", "many", "nothing", "hostile"])
def test_it_loads_alone_and_fits(
    opened: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    opened.open(pages[name], width=width)
    assert opened.value(_BROKEN_PICTURES) == []
    assert opened.value("document.images.length") == opened.value(
        "document.querySelectorAll('picture').length"
    )
    assert opened.value(_TOO_WIDE) == []
    assert opened.value("document.documentElement.scrollWidth") <= width
    assert opened.complaints() == []
    asked = [each for each in opened.requests() if not each.startswith("data:image/svg+xml;")]
    assert asked == [pages[name].resolve().as_uri()]


@pytest.mark.parametrize("dark", [False, True])
def test_light_is_light_and_dark_is_dark(
    opened: Browser, pages: dict[str, Path], dark: bool
) -> None:
    opened.open(pages["usual"], width=1200, dark=dark)
    light = _light(opened.picture().getpixel((4, 4)))
    assert light < 0.15 if dark else light > 0.9
    # The colours of text and page are far apart, and so are those in pictures.
    cells = (".cell.g5", ".cell.g-5", ".cell.g4", ".cell.g-2", ".cell.g0")
    names = [f".who.s{number}" for number in range(4)]
    tags = (".tag.good", ".tag.bad", "li.bad", ".graph.wide .what")
    for selector in (".verdict", ".note", *cells, "tbody td", "a", *names, *tags):
        assert opened.value(_contrast(selector)) >= 4.5, selector
    chosen = opened.value("[...document.images].map(each => each.currentSrc == each.src)")
    assert chosen
    assert all(each is not dark for each in chosen)
    opened.value("document.querySelector('#losses').scrollIntoView({behavior: 'instant'})")
    corners = opened.value(
        "(r => [r.left, r.top, r.right, r.bottom].map(Math.round))"
        "(document.querySelector('#losses img').getBoundingClientRect())"
    )
    assert _contrast_in(opened.picture().crop(tuple(corners))) >= 7


@pytest.mark.parametrize(("width", "shown"), [(360, "narrow"), (1200, "wide")])
def test_one_of_two_drawings_is_shown(
    opened: Browser, pages: dict[str, Path], width: int, shown: str
) -> None:
    opened.open(pages["usual"], width=width)
    found = opened.value(
        "[...document.querySelectorAll('.graph')].filter(each => each.getClientRects().length)"
        ".map(each => each.getAttribute('class'))"
    )
    assert found == [f"graph {shown}"]
    overlapping = opened.value(_OVERLAPPING)
    assert overlapping == []


def test_texts_of_boxes_stay_in_them(opened: Browser, pages: dict[str, Path]) -> None:
    for name in ("usual", "many", "hostile"):
        for width in (360, 1600):
            opened.open(pages[name], width=width)
            assert opened.value(_OUT_OF_BOXES) == [], (name, width)


_OVERLAPPING = """
(() => {
    const texts = [...document.querySelectorAll(".graph text")]
        .filter(each => each.getClientRects().length && each.textContent);
    const boxes = texts.map(each => each.getBoundingClientRect());
    const found = [];
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
        const a = boxes[i], b = boxes[j];
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
            found.push(texts[i].textContent + " / " + texts[j].textContent);
    }
    return found;
})()
"""
_OUT_OF_BOXES = """
[...document.querySelectorAll(".graph .box")].filter(each => each.getClientRects().length).flatMap(
    box => {
        const frame = box.querySelector(".frame").getBoundingClientRect();
        return [...box.querySelectorAll("text, .rank")].filter(each => {
            const inner = each.getBoundingClientRect();
            return each.textContent && (inner.right > frame.right || inner.left < frame.left);
        }).map(each => each.textContent);
    }
)
"""


def _contrast(selector: str) -> str:
    """The contrast of an element's text with what lies behind it, by WCAG 2's formula."""
    return f"""
    (() => {{
        const light = ([r, g, b]) => {{
            const [x, y, z] = [r, g, b].map(v => v / 255).map(
                v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * x + 0.7152 * y + 0.0722 * z;
        }};
        const read = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
        const over = (top, below) => {{
            const a = top.length > 3 ? top[3] : 1;
            return [0, 1, 2].map(i => top[i] * a + below[i] * (1 - a));
        }};
        const element = document.querySelector({selector!r});
        const layers = [];
        for (let each = element; each; each = each.parentElement)
            layers.unshift(read(getComputedStyle(each).backgroundColor));
        const page = layers.reduce((below, top) => over(top, below), [255, 255, 255]);
        const style = getComputedStyle(element);
        const ink = over(read(element.closest("svg") ? style.fill : style.color), page);
        const [a, b] = [light(ink), light(page)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    }})()
    """


def _light(pixel: object) -> float:
    assert isinstance(pixel, tuple)
    return sum(pixel) / (3 * 255)


def _contrast_in(picture: Image.Image) -> float:
    """Of the lightest and the darkest grey, as WCAG 2 counts it, roughly."""
    values = sorted(picture.convert("L").tobytes())
    low, high = ((value / 255) ** 2.2 for value in (values[20], values[-20]))
    return (high + 0.05) / (low + 0.05)
