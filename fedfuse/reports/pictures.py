"""Pictures of a page as inline SVG: text only, no script, no network, colours from the page's CSS.

Torch-free. A chart is 360 units wide, so that its letters keep their size on a phone. The same
numbers give the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from fedfuse.privacy.accounting import shown
from fedfuse.reports.facts import Facts
from fedfuse.reports.figures import ALARMS
from fedfuse.reports.wording import attacks, floor

__all__ = ["accountants", "attack", "bar", "course", "profile"]

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 44, 342, 14, 192

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Scale:
    """Where values stand between two ends, and which of them are named."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """How far `value` is from low to high: 0 to 1, cut off at the ends."""
        low, high, value = (
            (math.log10(max(x, 1e-300)) for x in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return min(max((value - low) / (high - low), 0.0), 1.0)


def bar(epsilon: float, allowed: float | None, most: float) -> str:
    """What was spent, on a scale that ends at `most`; a mark stands at what is allowed."""
    end = max(most, allowed or 0.0, 1e-9)
    over = allowed is not None and epsilon > allowed
    spent = 100 * min(epsilon / end, 1.0)
    mark = (
        f'<rect class="mark" x="{min(100 * allowed / end, 99.4):.2f}" width="0.6" height="10"/>'
        if allowed is not None
        else ""
    )
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/>'
        f'<rect class="{"over" if over else "spent"}" width="{spent:.2f}" height="10"/>{mark}</svg>'
    )


def course(facts: Facts) -> str:
    """Epsilon after each round of the account that spent most."""
    assert facts.detail is not None
    account, points = facts.accounts[0], facts.detail.course
    most = max(points[-1][1], account.figures.epsilon, account.allowed or 0.0)
    start = ((points[0][0] - 1, 0.0), *points)
    return _chart(
        start,
        x=_whole(start[0][0], points[-1][0]),
        y=_round_scale(most),
        x_label="round" if facts.kind == "run" else "release",
        y_label=f"ε at δ = {facts.delta:g}",
        dots=((points[-1][0], points[-1][1], shown(points[-1][1])),),
        about=f"epsilon by {'round' if facts.kind == 'run' else 'release'}, from 0 to "
        f"{shown(points[-1][1])}",
        limit=(account.allowed, "allowed") if account.allowed is not None else None,
        stairs=len(points) == points[-1][0] - points[0][0] + 1,
    )


def profile(facts: Facts) -> str:
    """All (epsilon, delta) pairs that hold, delta on a logarithmic scale."""
    account = facts.accounts[0]
    curve = account.figures.profile
    points = [pair for pair in zip(curve.epsilons, curve.deltas, strict=True) if pair[1] > 0]
    least = 10.0 ** math.floor(math.log10(max(min(d for _, d in points), facts.delta * 1e-4)))
    decades = round(-math.log10(least))
    each = max(1, -(-decades // 6))
    return _chart(
        [point for point in points if point[1] >= least],
        x=_round_scale(max(epsilon for epsilon, delta in points if delta >= least)),
        y=Scale(
            least,
            1.0,
            tuple((10.0**-n, "1" if n == 0 else f"1e-{n}") for n in range(0, decades + 1, each)),
            log=True,
        ),
        x_label="ε",
        y_label="δ",
        about="the privacy profile: delta against epsilon",
        dots=(
            (
                account.figures.epsilon,
                facts.delta,
                f"stated: ε {shown(account.figures.epsilon)}, δ {facts.delta:g}",
            ),
        ),
    )


def attack(facts: Facts) -> str:
    """The most members that an attacker finds, against false alarms."""
    assert facts.detail is not None
    percent = Scale(0, 1, tuple((n / 4, f"{25 * n} %") for n in range(5)))
    return _chart(
        facts.detail.attack,
        x=percent,
        y=percent,
        x_label="false alarms",
        y_label="members found, at most",
        about="the attacker's trade-off: members found at most, against false alarms",
        diagonal=True,
        dots=tuple(
            (alarms, facts.detail.true_positives(alarms), found)
            for alarms, (_, found) in zip(ALARMS[1:], attacks(facts)[1:], strict=True)
        ),
    )


def accountants(facts: Facts) -> str:
    """What each way of computing says of the account that spent most, side by side."""
    assert facts.detail is not None
    figures, detail = facts.accounts[0].figures, facts.detail
    rows = (
        ("PLD, rounded down", detail.below, detail.below),
        ("second accountant", *figures.second),
        ("PLD: the claim", figures.epsilon, figures.epsilon),
        ("RDP", figures.rdp, figures.rdp),
        ("PLD, replace one", detail.replace, detail.replace),
    )
    x = _round_scale(max(high for _, _, high in rows if math.isfinite(high)))
    left, each = 124, (BOTTOM - TOP - 12) / len(rows)

    def across(value: float) -> float:
        return left + x.share(value) * (RIGHT - left)

    parts = [_text(LEFT - 38, TOP, f"ε at δ = {facts.delta:g}", "start", "label")]
    for value, label in x.ticks:
        at = across(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP + 14}V{BOTTOM}"/>')
        parts.append(_text(at, BOTTOM + 16, label, "middle"))
    for number, (name, low, high) in enumerate(rows):
        height = TOP + 14 + each * (number + 0.5)
        start, end = across(low), across(high)
        kind = "dot" if name.endswith("claim") else "check"
        parts.append(_text(left - 8, height + 4, name, "end", "label" if kind == "dot" else "tick"))
        parts.append(f'<path class="curve" d="M{start:.1f} {height:.1f}H{end:.1f}"/>')
        parts += [
            f'<circle class="{kind}" cx="{place:.1f}" cy="{height:.1f}" r="4"/>'
            for place in sorted({start, end})
        ]
        words = f"≥ {floor(low)}" if name == "PLD, rounded down" else shown(high)
        words = f"{floor(low)} to {words}" if low != high else words
        room = end + 12 + 6.2 * len(words) < RIGHT + 14
        parts.append(
            _text(
                end + 8 if room else start - 8,
                height + 4,
                words,
                "start" if room else "end",
                "label" if kind == "dot" else "tick",
            )
        )
    parts.append(_text((left + RIGHT) / 2, HEIGHT - 8, "ε", "middle", "label"))
    return _svg("what each accountant says", parts)


def _chart(
    points: Points,
    *,
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    about: str,
    limit: tuple[float, str] | None = None,
    dots: Sequence[tuple[float, float, str]] = (),
    diagonal: bool = False,
    stairs: bool = False,
) -> str:
    """A curve with its axes. `stairs`: a value holds until the next."""

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across, up = x.share(point[0]), y.share(point[1])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP - 12)

    def parts() -> Iterator[str]:
        for value, label in y.ticks:
            _, height = at((x.low, value))
            yield f'<path class="grid" d="M{LEFT} {height:.1f}H{RIGHT}"/>'
            yield _text(LEFT - 5, height + 3.5, label, "end")
        for value, label in x.ticks:
            across, _ = at((value, y.low))
            yield f'<path class="grid" d="M{across:.1f} {BOTTOM}v4"/>'
            yield _text(across, BOTTOM + 16, label, "middle")
        yield _text(LEFT - 38, TOP, y_label, "start", "label")
        yield _text((LEFT + RIGHT) / 2, HEIGHT - 8, x_label, "middle", "label")
        if diagonal:
            (a, b), (c, d) = at((x.low, y.low)), at((x.high, y.high))
            yield f'<path class="chance" d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}"/>'
            yield _text((a + c) / 2 + 26, (b + d) / 2 + 26, "blind guessing", "middle", "faint")
        yield f'<path class="curve" d="{_path(map(at, points), stairs)}"/>'
        if limit is not None:
            _, height = at((x.low, limit[0]))
            yield f'<path class="limit" d="M{LEFT} {height:.1f}H{RIGHT}"/>'
            yield _text(LEFT + 4, height - 4, f"{limit[1]}: {limit[0]:g}", "start", "bad")
        for right, up, words in dots:
            across, height = at((right, up))
            yield f'<circle class="dot" cx="{across:.1f}" cy="{height:.1f}" r="4"/>'
            # Beside a curve that falls there is room to the right above it, or to the left below;
            # beside one that rises the other way round.
            rises = points[-1][1] > points[0][1]
            room = across + 12 + 6.2 * len(words) < RIGHT
            yield _text(
                across + (8 if room else -4),
                height + (16 if rises is room else -8),
                words,
                "start" if room else "end",
                "label",
            )

    return _svg(about, parts())


def _svg(about: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{escape(about)}</title>{''.join(parts)}</svg>"
    )


def _path(points: Iterable[tuple[float, float]], stairs: bool) -> str:
    first, *rest = points
    moves = [f"M{first[0]:.1f} {first[1]:.1f}"]
    for across, height in rest:
        moves.append(f"H{across:.1f}V{height:.1f}" if stairs else f"L{across:.1f} {height:.1f}")
    return "".join(moves)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _round_scale(most: float) -> Scale:
    """From 0 to a little more than `most`, in steps of 1, 2 or 5 times a power of ten.

    >>> [label for _, label in _round_scale(7.99).ticks]
    ['0', '2', '4', '6', '8']
    """
    most = most if math.isfinite(most) and most > 0 else 1.0
    unit = 10.0 ** math.floor(math.log10(most / 4))
    step = next(step for step in (unit, 2 * unit, 5 * unit, 10 * unit) if most / step <= 5)
    count = math.floor(most * 1.06 / step)
    return Scale(0, most * 1.06, tuple((n * step, f"{n * step:g}") for n in range(count + 1)))


def _whole(low: int, high: int) -> Scale:
    """Whole numbers from `low` to `high`, some of them named."""
    step = max(1, -(-(high - low) // 6))
    for nice in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10_000, 100_000):
        if nice >= step:
            step = nice
            break
    ticks = tuple((n, str(n)) for n in range(low, high + 1) if n % step == 0)
    return Scale(low, max(high, low + 1), ticks or ((high, str(high)),))
