"""The page in a real browser: on a screen, a phone and paper, by day and by night."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from fedfuse.reports.budget import of_ledger, of_run
from fedfuse.reports.privacy_page import page
from fedfuse.reports.together import together
from tests.reports.books import STEP, event, rounds, write_ledger, write_run
from tests.reports.browser import CHROMIUM, Page, browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH"),
]
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
LONG = "scans-of-the-thorax-department-2019-2026-" + "x" * 80
NAMES = (
    "clinic-a",
    LONG,
    "<script>document.title='run'</script>",
    '"><img src=http://a.example/x>',
)
KINDS = ("run", "none", "ledger", "together")


class Written(NamedTuple):
    """A page, and a phrase on its last screen."""

    path: Path
    words: str


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    run = of_run(write_run(folder / "run", [*rounds(3, *NAMES), event(NAMES[0], 4)]))
    none = of_run(write_run(folder / "none", [], privacy__unit="none"))
    other = of_run(write_run(folder / "other", rounds(2, *NAMES), privacy__noise_seed="s"))
    write_ledger(folder / "ledger", [(name, STEP) for name in (*NAMES, NAMES[0])])
    ledger = of_ledger(folder / "ledger", delta=1e-5, allowed=3.0)
    both = [run, other]
    pages = {
        "run": ([run], "fedfuse report verify"),
        "none": ([none], "NOT PRIVATE"),
        "ledger": ([ledger], "Where the figures come from"),
        "together": ([*both, *together(both)], "2 runs on the same data"),
    }
    for kind, (sections, _) in pages.items():
        (folder / f"{kind}.html").write_text(page(sections, now=NOW), encoding="utf-8")
    return {kind: Written(folder / f"{kind}.html", words) for kind, (_, words) in pages.items()}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


WIDEST = """
[...document.querySelectorAll('body *')]
  .filter(e => { const r = e.getBoundingClientRect();
                 return r.width > 0 && (r.right > WIDTH + 0.5 || r.left < -0.5); })
  .map(e => e.tagName + '.' + e.getAttribute('class')).slice(0, 5)
"""
CLIPPED = """
[...document.querySelectorAll('body *')]
  .filter(e => e instanceof HTMLElement && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
               && getComputedStyle(e).display !== 'inline')
  .map(e => e.tagName + '.' + e.getAttribute('class')).slice(0, 5)
"""
OUTSIDE = """
[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const box = svg.viewBox.baseVal;
  return [...svg.querySelectorAll('text')].filter(t => { const b = t.getBBox();
    return b.x < 0 || b.y < 0 || b.x + b.width > box.width || b.y + b.height > box.height; })
    .map(t => t.textContent); })
"""
LAPPED = """
[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBBox()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
    .filter(([b, q]) => p.x < q.x + q.width - 1 && q.x < p.x + p.width - 1
                     && p.y < q.y + q.height - 3 && q.y < p.y + p.height - 3)
    .map(([b]) => a + ' | ' + b)); })
"""
SMALLEST = """
Math.min(...[...document.querySelectorAll('svg.chart text')].map(
  t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_the_page_fits_asks_for_nothing_and_complains_of_nothing(
    chromium: Page, written: dict[str, Written], kind: str, width: int, dark: bool
) -> None:
    chromium.open(written[kind].path, width=width, dark=dark)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(WIDEST.replace("WIDTH", str(width))) == []
    assert chromium.evaluate(CLIPPED) == []
    assert chromium.evaluate(OUTSIDE) == []
    assert chromium.evaluate(LAPPED) == []
    assert chromium.requests == [written[kind].path.resolve().as_uri()]
    assert chromium.complaints == []
    assert chromium.evaluate("document.title").startswith("Privacy report")
    assert written[kind].words in chromium.evaluate("document.body.innerText")
    paper = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(part) for part in paper[4:-1].split(",")) / 3
    assert lightness < 60 if dark else lightness > 240


@pytest.mark.parametrize("kind", ["run", "ledger"])
def test_letters_of_charts_can_be_read_on_a_phone(
    chromium: Page, written: dict[str, Written], kind: str
) -> None:
    chromium.open(written[kind].path, width=390)
    assert chromium.evaluate(SMALLEST) >= 9.5


def test_the_promise_and_what_it_means_are_on_the_first_screen(
    chromium: Page, written: dict[str, Written]
) -> None:
    chromium.open(written["run"].path, width=1280)
    bottom = "document.querySelector('{}').getBoundingClientRect().bottom"
    assert chromium.evaluate(bottom.format(".promise")) < 400
    assert chromium.evaluate(bottom.format("dl.short")) < 900
    chromium.open(written["none"].path, width=390, height=844)
    assert chromium.evaluate(bottom.format(".alarm")) < 600


@pytest.mark.parametrize("kind", KINDS)
def test_it_prints_with_all_its_text(
    chromium: Page, written: dict[str, Written], kind: str, tmp_path: Path
) -> None:
    chromium.open(written[kind].path, width=1280, dark=True)
    data = chromium.pdf()
    assert data.startswith(b"%PDF-")
    reader = shutil.which("pdftotext")
    if reader is None:
        pytest.skip("no pdftotext to read the PDF with")
    (tmp_path / "page.pdf").write_bytes(data)
    done = subprocess.run([reader, tmp_path / "page.pdf", "-"], capture_output=True, check=True)
    printed = "".join(done.stdout.decode().split())
    chromium.call("Emulation.setEmulatedMedia", media="print")
    texts = "[...document.querySelectorAll('{}')].map(e => e.textContent)"
    whole = chromium.evaluate(texts.format("h1,h2,h3,dt,dd,li,.promise,.alarm,.caution"))
    beside = chromium.evaluate(texts.format(".tile b,.tile span,.row div,td,th,svg text"))
    chromium.call("Emulation.setEmulatedMedia", media="")
    assert len(whole) > 30
    assert [text for text in whole if "".join(text.split()) not in printed] == []
    # What stands side by side may be read in another order, long names broken in between.
    words = {word for text in beside for word in text.split() if len(word) < 40}
    assert {word for word in words if word not in printed} == set()


def test_paper_is_white_also_by_night(chromium: Page, written: dict[str, Written]) -> None:
    chromium.open(written["run"].path, width=1280, dark=True)
    chromium.call(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    style = "getComputedStyle(document.body)"
    assert chromium.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.evaluate(f"{style}.color") == "rgb(0, 0, 0)"
    chromium.call("Emulation.setEmulatedMedia", media="")


def test_the_browser_tells_what_a_bad_page_does(chromium: Page, tmp_path: Path) -> None:
    """Without this, the tests above could pass on a browser that tells nothing."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><title>bad</title><div style='width:3000px'>wide</div>"
        "<img src='missing.png'><script>console.error('loud')</script>",
        encoding="utf-8",
    )
    chromium.open(bad, width=390)
    assert chromium.evaluate("document.documentElement.scrollWidth") > 390
    assert len(chromium.requests) == 2
    assert any("loud" in text for text in chromium.complaints)
