"""The page: whole and alone, its figures those of the facts, its words those of files made safe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedfuse.privacy.accounting import shown
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.reports import pictures, privacy_page
from fedfuse.reports.budget import of_ledger, of_run
from fedfuse.reports.facts import Facts, releases
from fedfuse.reports.hazards import hazards, reporting, uncovered
from fedfuse.reports.privacy_page import page
from fedfuse.reports.together import together
from fedfuse.reports.wording import checks, floor, forecast, percent
from tests.reports.books import STEP, event, rounds, write_ledger, write_run
from tests.reports.dom import Element, read

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
DELTA = 1e-5
NODE = dataclasses.replace(STEP, unit=Unit.NODE, sample_rate=1.0, noise_multiplier=3.0, steps=1)
SUBJECT = dataclasses.replace(STEP, unit=Unit.SUBJECT)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'};alert(1);//",
    "&lt;b&gt; & co",
    "\u202egnp.exe",
    "a\x1b[2J\x00b",
    "x" * 300,
    "</title></style><h1>",
)
KINDS = ("run", "subject", "node", "shared", "none", "empty", "ledger", "together")


def sections(
    kind: str, folder: Path, nodes: Sequence[str] = ("clinic-a", "clinic-b")
) -> list[Facts]:
    """The facts of a source of this kind."""
    many = {"privacy__unit": "node", "privacy__noise_nodes": 4, "federation__min_nodes": 4}
    match kind:
        case "run":
            books = [*rounds(3, *nodes), event(nodes[0], 4)]
            return [of_run(write_run(folder / "run", books))]
        case "subject":
            run = write_run(folder / "run", rounds(2, *nodes, one=SUBJECT), privacy__unit="subject")
            return [of_run(run)]
        case "node":
            return [
                of_run(write_run(folder / "r", rounds(2, *nodes, one=NODE), privacy__unit="node"))
            ]
        case "shared":
            return [of_run(write_run(folder / "r", rounds(2, *"abcd", one=NODE), **many))]
        case "none":
            return [of_run(write_run(folder / "run", [], privacy__unit="none"))]
        case "empty":
            return [of_run(write_run(folder / "run", []))]
        case "ledger":
            names = [*nodes, nodes[0]]
            folder.mkdir(exist_ok=True)
            write_ledger(folder / "ledger", [(name, STEP) for name in names], broken_off=1)
            return [of_ledger(folder / "ledger", delta=DELTA, allowed=3.0)]
        case _:
            both = [of_run(write_run(folder / name, rounds(2, *nodes))) for name in ("one", "two")]
            return [*both, *together(both)]


def drawn(facts: Sequence[Facts]) -> Element:
    return read(page(facts, now=NOW))


def rows(element: Element, cls: str) -> list[tuple[str, str, str]]:
    """(name, number, line) of each row of a class."""
    return [
        (row.one(cls="name").text, row.one(cls="number").text, row.one(cls="line").text)
        for row in element.all(cls=cls)
    ]


# ---- whole, and alone


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_html_that_needs_nothing_else(kind: str, tmp_path: Path) -> None:
    facts = sections(kind, tmp_path)
    text = page(facts, now=NOW)
    html = read(text)
    assert html.attributes["lang"] == "en"
    assert html.one("head").one("title").text.startswith("Privacy report")
    assert len(html.all("h1")) == 1
    assert [one.text for one in html.all("h2")] == [section.name for section in facts]
    tags = {one.tag for one in html.all()}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "foreignobject",
    }
    asked = {
        "src",
        "srcset",
        "href",
        "xlink:href",
        "action",
        "background",
        "poster",
        "data",
        "style",
    }
    used = [(n, v) for one in html.all() for n, v in one.attributes.items() if n in asked]
    assert all(name == "href" and value.startswith("#part-") for name, value in used)
    assert not [n for one in html.all() for n in one.attributes if n.startswith("on")]
    css = html.one("style").text
    assert "url(" not in css
    assert "@import" not in css
    assert "://" not in text
    policy = html.one("meta", "") if len(html.all("meta")) == 1 else html.all("meta")[1]
    assert policy.attributes["content"].startswith("default-src 'none'")
    ids = [one.attributes["id"] for one in html.all() if "id" in one.attributes]
    assert len(set(ids)) == len(ids)
    assert {value[1:] for _, value in used} <= set(ids)
    for picture in html.all("svg"):
        hidden = picture.attributes.get("aria-hidden") == "true"
        assert hidden or picture.all("title")[0].text


def test_the_same_facts_give_the_same_page(tmp_path: Path) -> None:
    facts = sections("run", tmp_path)
    assert page(facts, now=NOW) == page(facts, now=NOW)


@pytest.mark.parametrize("kind", ["run", "ledger", "together"])
def test_names_from_files_are_text_and_nothing_else(kind: str, tmp_path: Path) -> None:
    # A ledger takes no others.
    names = [n for n in HOSTILE if kind != "ledger" or (n.isprintable() and len(n) <= 256)]
    plain = drawn(sections(kind, tmp_path / "plain", [f"n{n}" for n in range(len(names))]))
    facts = sections(kind, tmp_path / "hostile", names)
    html = drawn(facts)
    assert [one.tag for one in html.all()] == [one.tag for one in plain.all()]
    shown_names = {row[0] for row in rows(html, "budget")}
    assert "<script>alert(1)</script>" in shown_names
    assert "&lt;b&gt; & co" in shown_names
    if kind != "ledger":
        assert {"\ufffdgnp.exe", "a\ufffd[2J\ufffdb"} <= shown_names
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f]", html.text)


def test_a_runs_name_is_text_too(tmp_path: Path) -> None:
    (facts,) = sections("run", tmp_path)
    html = drawn([dataclasses.replace(facts, name=HOSTILE[-1], problems=(HOSTILE[0],))])
    assert html.one("h2").text == HOSTILE[-1]
    assert len(html.all("h1")) == 1
    assert HOSTILE[0] in html.text


# ---- figures


@pytest.mark.parametrize("kind", ["run", "subject", "node", "shared", "ledger", "together"])
def test_each_figure_is_that_of_the_facts(kind: str, tmp_path: Path) -> None:
    facts = sections(kind, tmp_path)[-1]
    html = drawn([facts])
    assert html.one(cls="promise").text == facts.sentence
    tiles = [tile.one("b").text for tile in html.all(cls="tile")]
    assert tiles == [f"ε = {shown(one.epsilon or 0)}" for one in facts.statements]
    assert all(f"δ = {facts.delta:g}, for one " in tile.text for tile in html.all(cls="tile"))
    assert [row[:2] for row in rows(html, "budget")] == [
        (
            a.label,
            f"ε {shown(a.figures.epsilon)}" + ("" if a.allowed is None else f" of {a.allowed:g}"),
        )
        for a in facts.accounts
    ]
    assert list(rows(html, "figure")) == list(checks(facts))
    assert facts.detail is not None
    found = [
        tuple(cell.text.replace("\xa0", " ") for cell in row.all("td"))
        for row in html.one("table", "attacks").one("tbody").all("tr")
    ]
    assert found == [
        (percent(rate), percent(rate), percent(facts.detail.true_positives(rate)))
        for rate in (0.001, 0.01, 0.1)
    ]
    assert all(text in html.text for text in forecast(facts))
    released = [
        [cell.text for cell in row.all("td")]
        for row in html.one("table", "released").one("tbody").all("tr")
    ]
    assert released == [
        [
            account.label,
            one.unit,
            f"{one.sample_rate:.6g}",
            f"{one.noise_multiplier:.6g}",
            f"{one.clip_norm:.6g}",
            "none",
            str(one.steps),
            str(one.lines),
        ]
        for account in facts.accounts
        for one in releases(account.mechanisms)
    ]


def test_figures_for_people_are_never_on_the_wrong_side(tmp_path: Path) -> None:
    (facts,) = sections("run", tmp_path)
    said = {name: re.findall(r"[\d.]+", value) for name, value, _ in checks(facts)}
    figures, detail = facts.accounts[0].figures, facts.detail
    assert detail is not None
    assert float(said["PLD"][0]) >= figures.epsilon
    assert float(said["RDP"][0]) >= figures.rdp
    assert float(said["PLD, rounded down"][0]) <= detail.below
    assert float(said["second accountant"][0]) <= figures.second[0]
    assert float(said["second accountant"][1]) >= figures.second[1]
    assert float(said["Gaussian DP"][0]) >= figures.mu
    assert float(said["replace one"][0]) >= detail.replace


def test_bars_are_as_long_as_what_was_spent(tmp_path: Path) -> None:
    (facts,) = sections("ledger", tmp_path)
    html = drawn([facts])
    most = max(facts.accounts[0].figures.epsilon, 3.0)
    for account, bar in zip(facts.accounts, html.all("svg", "bar"), strict=True):
        spent, mark = bar.all("rect")[1:]
        assert float(spent.attributes["width"]) == pytest.approx(
            100 * account.figures.epsilon / most, abs=0.01
        )
        over = account.figures.epsilon > 3.0
        assert spent.attributes["class"] == ("over" if over else "spent")
        assert float(mark.attributes["x"]) == pytest.approx(min(300 / most, 99.4), abs=0.01)


def scale(chart: Element, *, across: bool) -> tuple[float, float]:
    """(start, slope) of an axis, from the two outermost of its named ticks."""
    at, other = ("x", "y") if across else ("y", "x")
    numbers = [
        (float(text.attributes[at]), float(text.text.replace(" %", "")), text.attributes[other])
        for text in chart.all("text", "tick")
        if re.fullmatch(r"[\d.]+( %)?", text.text)
        and text.attributes["text-anchor"] == ("middle" if across else "end")
    ]
    rowed = [one for one in numbers if one[2] == numbers[0][2]]
    (a, low, _), (b, high, _) = rowed[0], rowed[-1]
    slope = (high - low) / (b - a)
    return low - slope * a, slope


def test_the_curve_ends_where_the_axes_say_that_the_epsilon_is(tmp_path: Path) -> None:
    (facts,) = sections("run", tmp_path)
    chart = read(f"<!doctype html><html>{pictures.course(facts)}</html>")
    dot = chart.one("circle", "dot")
    left, across = scale(chart, across=True)
    bottom, up = scale(chart, across=False)
    assert left + across * float(dot.attributes["cx"]) == pytest.approx(4, abs=0.05)
    # A tick's text stands 3.5 below its line.
    height = bottom + up * (float(dot.attributes["cy"]) + 3.5)
    assert height == pytest.approx(facts.accounts[0].figures.epsilon, abs=0.05)
    assert shown(facts.accounts[0].figures.epsilon) in [one.text for one in chart.all("text")]


def test_each_accountant_stands_where_the_axis_says(tmp_path: Path) -> None:
    (facts,) = sections("run", tmp_path)
    assert facts.detail is not None
    chart = read(f"<!doctype html><html>{pictures.accountants(facts)}</html>")
    left, across = scale(chart, across=True)
    figures = facts.accounts[0].figures
    values = {left + across * float(dot.attributes["cx"]) for dot in chart.all("circle")}
    for figure in (figures.epsilon, figures.rdp, facts.detail.below, facts.detail.replace):
        assert min(abs(value - figure) for value in values) < 0.05
    words = [one.text for one in chart.all("text")]
    assert f"≥ {floor(facts.detail.below)}" in words
    assert shown(figures.rdp) in words


def test_many_accounts_are_cut_off_and_said_so(tmp_path: Path) -> None:
    html = drawn(sections("run", tmp_path, [f"node-{n}" for n in range(45)]))
    assert len(html.all("svg", "bar")) == 40
    assert "5 more spent less; the certificate lists them all." in html.text


# ---- words


def test_a_run_without_a_promise_is_not_private_at_first_sight(tmp_path: Path) -> None:
    html = drawn(sections("none", tmp_path))
    assert html.one(cls="alarm").one("strong").text == "NOT PRIVATE"
    assert not html.all(cls="promise")
    assert not html.all(cls="tile")
    assert "ε = " not in html.text
    assert not html.all("svg")


def test_of_several_the_list_says_which_is_not_private(tmp_path: Path) -> None:
    facts = [*sections("run", tmp_path / "a"), *sections("none", tmp_path / "b")]
    first, second = drawn(facts).one("body").all("ul")[0].all("li")
    assert "NOT PRIVATE" not in first.text
    assert "NOT PRIVATE" in second.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy__noise_seed": "s"}, "SEEDED NOISE"),
        ({"privacy__epsilon": 0.5}, "OVERSPENT: more than allowed was spent by clinic-a"),
        ({"privacy__declared_records": 0}, "Did not hold, though the figures rest on it"),
        ({"privacy": {"epsilon_server": 0.01}}, "summary.json says epsilon_server = 0.01"),
        ({"privacy": {"delta": 1e-9}}, "summary.json says delta = 1e-09, config.toml 1e-05"),
        ({}, "A simulation: all data was on one machine"),
    ],
)
def test_what_a_reader_must_know_first_stands_before_the_figures(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", rounds(1, "clinic-a"), **changes)  # type: ignore[arg-type]
    html = drawn([of_run(run)])
    assert any(words in one.text for one in html.all(cls="caution"))
    text = html.one("body").text
    assert text.index(words) < text.index("In short")


ITEMS = (
    "DP setting",
    "data accesses covered",
    "final mechanism output",
    "unit of privacy",
    "neighbouring data sets",
    "type of accounting",
    "assumptions, and whether they hold",
    "formal statement",
    "Transparency and verifiability",
)
"""Ponomareva et al. 2023, section 5.3."""
TOPICS = (
    "Epsilon",
    "Unit of privacy",
    "Definition of neighbours",
    "Comparing guarantees",
    "Composition across releases",
    "Other releases of the same data",
    "Utility",
    "Bias",
    "Query model",
    "Trust model",
    "Correct algorithms",
    "Randomness",
    "Floating point",
    "Side channels",
    "Data security and access control",
    "Data collection exposure",
)
"""NIST SP 800-226, from the top of its pyramid to the base."""


@pytest.mark.parametrize("kind", KINDS)
def test_each_item_and_each_hazard_has_its_answer(kind: str, tmp_path: Path) -> None:
    facts = sections(kind, tmp_path)[-1]
    html = drawn([facts])
    short, *lists = html.all("dl") if facts.detail else (None, *html.all("dl"))
    assert (short is None) == (facts.detail is None)
    for answers, listed, asked in zip(
        (reporting(facts), hazards(facts)),
        lists,
        (ITEMS if facts.private else ITEMS[:1], TOPICS),
        strict=True,
    ):
        assert [name.rpartition(": ")[2] for name, _ in answers] == list(asked)
        assert [one.text for one in listed.all("dt")] == [name for name, _ in answers]
        said = [one.text for one in listed.all("dd")]
        assert len(said) == len(answers)
        assert all(len(text.split()) >= 4 and text.endswith(".") for text in said), said
    assert all(text in html.text.replace("\xa0", " ") for text in uncovered(facts))


def test_every_assumption_stands_there_with_verdict_and_evidence(tmp_path: Path) -> None:
    (facts,) = sections("run", tmp_path)
    items = [one.text for one in drawn([facts]).one("ul", "plain").all("li")]
    assert len(items) == len(facts.assumptions)
    for one in facts.assumptions:
        assert any(
            one.verdict.value in text and one.text[1:] in text and one.evidence in text
            for text in items
        )


def test_who_is_trusted_with_updates_gets_no_figure(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        rounds(1, "a", one=NODE),
        privacy__unit="node",
        privacy__noise_by="server",
    )
    html = drawn([of_run(run)])
    assert next(tile.one("b").text for tile in html.all(cls="tile")) == "no guarantee"


def test_shares_too_small_for_a_figure_leave_the_server_without_one(tmp_path: Path) -> None:
    loud = Mechanism(unit=Unit.NODE, sample_rate=1.0, noise_multiplier=0.5, clip_norm=1.0, steps=1)
    nodes = [f"n{n}" for n in range(64)]
    run = write_run(
        tmp_path / "run",
        rounds(1, *nodes, one=loud),
        privacy__unit="node",
        privacy__noise_nodes=64,
        federation__min_nodes=64,
    )
    facts = of_run(run)
    assert [one.epsilon is None for one in facts.statements] == [True, False]
    assert "Nothing is promised against the server" in facts.sentence


# ---- colours


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio of two colours as #rgb or #rrggbb."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_stands_out_from_what_is_behind_it(theme: int) -> None:
    css = Path(privacy_page.__file__).with_name("privacy.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 3
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", blocks[theme]))
    for ink, papers in {
        "ink": ("paper", "card"),
        "soft": ("paper", "card"),
        "main": ("paper", "card"),
        "bad": ("paper", "card", "bad-paper"),
        "good": ("good-paper",),
        "trust": ("trust-paper",),
    }.items():
        for paper in papers:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    for shape in ("fill", "bad", "ink"):  # bars and their mark; curves are of the main colour
        assert contrast(colours[shape], colours["track"]) >= 3, shape
