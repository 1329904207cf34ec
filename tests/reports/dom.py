"""A page as a tree, read strictly: what a browser would mend in silence is an error here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "base", "source", "embed"}


@dataclass
class Element:
    """A tag, with all that is in it."""

    tag: str
    attributes: dict[str, str]
    inside: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text in it, white space as one space."""
        return " ".join("".join(self._texts()).split())

    def all(self, tag: str = "", cls: str = "") -> list[Element]:
        """Those in it, in order, with this tag and class."""
        return [
            one
            for one in self._elements()
            if tag in ("", one.tag) and (not cls or cls in one.attributes.get("class", "").split())
        ]

    def one(self, tag: str = "", cls: str = "") -> Element:
        """The only one."""
        (found,) = self.all(tag, cls)
        return found

    def _elements(self) -> Iterator[Element]:
        for one in self.inside:
            if isinstance(one, Element):
                yield one
                yield from one._elements()

    def _texts(self) -> Iterator[str]:
        for one in self.inside:
            yield one if isinstance(one, str) else one.text


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]
        self.declared = ""

    def handle_decl(self, decl: str) -> None:
        self.declared = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> says an attribute twice: {names}"
        one = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(one)
        if tag not in VOID:
            self.open.append(one)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> where <{self.open[-1].tag}> is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def read(page: str) -> Element:
    """The `html` element of a page. Raises AssertionError where it is not whole."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.declared == "doctype html"
    assert reader.open == [reader.root], f"never closed: {[one.tag for one in reader.open[1:]]}"
    return reader.root.one("html")
