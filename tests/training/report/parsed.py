"""A page as its tags: enough to see what a browser would make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "source", "img", "br", "link", "input"}


@dataclass
class Tag:
    name: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Tag] = field(default_factory=list)

    def all(self, name: str, **attributes: str) -> list[Tag]:
        """Below it, with these attributes; `class_` is one class among others."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        found = []
        for child in self.children:
            has = child.name == name and all(
                value in (child.attributes.get(key) or "").split()
                if key == "class"
                else child.attributes.get(key) == value
                for key, value in wanted.items()
            )
            found += [child] if has else []
            found += child.all(name, **attributes)
        return found

    @property
    def words(self) -> str:
        """All text in it, in which spaces don't count."""
        return " ".join(self.text.split())


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Tag("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Tag(tag, dict(attrs))
        self.open[-1].children.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().name == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for each in self.open:
            each.text += data


def parse(text: str) -> Tag:
    """The whole page; every tag that is opened has to be closed."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert [each.name for each in parser.open] == ["root"]
    return parser.root
