"""A plan as text, and as plain values for JSON."""

from __future__ import annotations

import math
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fedfuse.cli.terms import Asked
from fedfuse.errors import ConfigError
from fedfuse.privacy.accounting import STATEMENT_GRID, shown
from fedfuse.privacy.advice import Caution, cautions
from fedfuse.privacy.planner import OPEN, Plan, Terms, figure
from fedfuse.privacy.spec import Unit

__all__ = ["describe", "tree"]

NARROWEST, WIDEST, INDENT = 60, 100, 16
"""Text is as wide as the terminal, within these."""
ROWS, BAR = 10, 40
"""Lines of the table, and how long a bar is that is all of what is allowed."""
NAMES = {
    "epsilon": "epsilon",
    "delta": "delta",
    "rounds": "rounds",
    "sample_rate": "sample rate q",
    "sigma": "sigma",
}


def tree(plan: Plan, asked: Asked) -> dict[str, Any]:
    """Everything, as plain values. Figures are not rounded; None: not known, or not finite."""
    terms = plan.terms
    return {
        "unit": terms.unit.value,
        "change": terms.unit.change,
        "against": _adversary(terms),
        "solved": plan.solved,
        **{name: getattr(terms, name) for name in OPEN},
        "sources": {name: asked.sources[name] for name in OPEN},
        "steps": terms.steps,
        "local_steps": terms.local_steps,
        "units": terms.units,
        "expected_batch": terms.expected_batch,
        "clip_norm": terms.clip_norm,
        "nodes": terms.nodes,
        "parameters": terms.parameters,
        "parameters_assumed": asked.parameters_assumed,
        "kept": plan.kept,
        "spent": _number(plan.spent),
        "spent_shown": shown(plan.spent),
        "spent_rdp": _number(plan.spent_rdp),
        "gdp_mu": plan.mu,
        "one_more_round": {
            "rounds": terms.rounds + 1,
            "epsilon": _number(plan.spent_next),
            "more": _number(plan.spent_next - plan.spent),
        },
        "by_round": [{"round": n, "epsilon": _number(epsilon)} for n, epsilon in plan.by_round],
        "noise_of_step": plan.noise_of_step,
        "noise_of_run": plan.noise_of_run,
        "warnings": [asdict(caution) for caution in cautions(plan)],
        "settings": _settings(terms),
    }


def describe(plan: Plan, asked: Asked) -> Iterator[str]:
    """The plan in lines."""
    terms = plan.terms
    yield f"{NAMES[plan.solved]} = {_value(plan.solved, terms)}"
    yield ""
    for name in OPEN:
        yield _row(NAMES[name], f"{_value(name, terms):<10}  {_origin(name, asked)}")
    yield ""
    yield _row("steps", _steps(terms))
    yield _row(
        "spends",
        f"epsilon {figure(plan.spent)} of {_plain(terms.epsilon)} at delta {_plain(terms.delta)}: "
        f"an upper bound by PLD, for {terms.unit.change}, against {_adversary(terms)}",
    )
    yield _row("check", _check(plan))
    yield _row(
        "one more round",
        f"epsilon {figure(plan.spent_next)} after {terms.rounds + 1} rounds, "
        f"{_up(plan.spent_next - plan.spent)} more{_beyond(plan)}",
    )
    yield _row("noise", _noise(plan, asked))
    yield ""
    yield from _table(plan)
    for caution in cautions(plan):
        yield ""
        yield from _warning(caution)
    words = _command(plan, asked)
    if words:
        yield ""
        yield from _continued("run it", words)


def _origin(name: str, asked: Asked) -> str:
    source = asked.sources[name]
    if source == "solved":
        return f"solved: {_SIDES[name]}"
    if source == "scenario":
        return f"from {asked.scenario}"
    if source == "unit":
        return f'unit "{asked.terms.unit}": each round counts in full'
    return source


_SIDES = {
    "epsilon": "what it costs, rounded up",
    "delta": "the least that holds, rounded up",
    "rounds": "the most that epsilon allows",
    "sample_rate": "the largest that epsilon allows, rounded down",
    "sigma": "the least noise that epsilon allows, rounded up",
}


def _steps(terms: Terms) -> str:
    if terms.unit is Unit.NODE:
        return f"{terms.steps}, one release of a node's update in each round"
    text = f"{terms.steps} = {_count(terms.rounds, 'round')} x {terms.local_steps}"
    if terms.expected_batch is None:
        return text
    return f"{text}, each on {_short(terms.expected_batch)} of {terms.units} {terms.unit}s expected"


def _adversary(terms: Terms) -> str:
    """Who may look on, and how much of it."""
    if terms.noise_shared > 1:
        return "whoever sees nothing but sums of updates"
    return "whoever sees all updates of that node, as the server does"


def _check(plan: Plan) -> str:
    text = f"epsilon {figure(plan.spent_rdp)} by RDP"
    if plan.mu is not None:
        text += f"; no more than Gaussian noise of mu = {shown(plan.mu)} gives away (GDP)"
    if not plan.kept:
        text += "; NODES WOULD REFUSE IT"
    return text


def _noise(plan: Plan, asked: Asked) -> str:
    terms = plan.terms
    step, run = plan.noise_of_step, plan.noise_of_run
    if step is None or run is None:
        return "its share is not known without --records"
    assumed = "assumed " if asked.parameters_assumed else ""
    return (
        f"its norm is {_short(step)} times that of the strongest signal possible in a step, "
        f"{_short(run)} times in the whole run ({assumed}{terms.parameters} parameters, mean over "
        f"{_count(terms.nodes, 'node')})"
    )


def _table(plan: Plan) -> Iterator[str]:
    """Epsilon at about ten rounds."""
    stride = -(-len(plan.by_round) // ROWS)
    rows = plan.by_round[stride - 1 :: stride]
    if rows[-1] != plan.by_round[-1]:
        rows = (*rows, plan.by_round[-1])
    width = max(len("round"), len(str(rows[-1][0])))
    note = f"epsilon is at most this, by PLD on a grid of {plan.grid_by_round:g}"
    if plan.grid_by_round != STATEMENT_GRID:
        note += f"; in the last line, as in all other figures, on one of {STATEMENT_GRID:g}"
    yield _row("by round", note)
    yield f"{'round':>{width}}  {'epsilon':>7}"
    most = max(rows[-1][1], plan.terms.epsilon)
    printed = figure if plan.spent < 1 else shown  # as many decimals in each line
    for number, epsilon in rows:
        bar = "#" * round(BAR * epsilon / most) if math.isfinite(most) else ""
        yield f"{number:>{width}}  {printed(epsilon):>7}  {bar}".rstrip()


def _warning(caution: Caution) -> Iterator[str]:
    yield _row("warning", caution.what)
    yield _row("  because", caution.why)
    yield _row("  so", caution.do)


def _settings(terms: Terms) -> dict[str, Any]:
    """The configuration that runs the plan, by dotted key."""
    settings: dict[str, Any] = {
        "train.rounds": terms.rounds,
        "privacy.unit": terms.unit.value,
        "privacy.epsilon": terms.epsilon,
        "privacy.delta": terms.delta,
        "privacy.noise_multiplier": terms.sigma,
        "privacy.clip_norm": terms.clip_norm,
    }
    if terms.unit is not Unit.NODE:
        settings["train.local_steps"] = terms.local_steps
        settings["privacy.sample_rate"] = terms.sample_rate
        if terms.units is not None:
            settings[f"privacy.declared_{terms.unit}s"] = terms.units
    return settings


def _beyond(plan: Plan) -> str:
    return "" if plan.spent_next <= plan.terms.epsilon else ": more than is allowed"


def _command(plan: Plan, asked: Asked) -> list[str]:
    """The command that runs the plan, with what differs from the scenario or the defaults; nothing
    where no node would run it, or no configuration can say it."""
    if not plan.kept:
        return []
    settings, known = _settings(plan.terms), asked.base.to_flat()
    try:
        asked.base.with_values(settings)
    except ConfigError:
        return []
    words = [f"fedfuse simulate {shlex.quote(str(asked.scenario))}"]
    if asked.scenario is None:
        words = ["fedfuse simulate"]
    for key, value in settings.items():
        if known[key] != value:
            text = value if isinstance(value, str) else _plain(value)
            words.append(f"--set {shlex.quote(f'{key}={text}')}")
    return words


def _continued(name: str, words: list[str]) -> Iterator[str]:
    """`words` as a command over several lines, which a shell takes as one."""
    line = f"{name:<{INDENT}}{words[0]}"
    for word in words[1:]:
        if len(line) + len(word) + 3 > _width():
            yield f"{line} \\"
            line = " " * INDENT + "  " + word
        else:
            line += f" {word}"
    yield line


def _value(name: str, terms: Terms) -> str:
    return _plain(getattr(terms, name))


def _plain(value: float) -> str:
    """`value` with all its digits."""
    return str(int(value)) if float(value).is_integer() else repr(value)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _up(difference: float) -> str:
    """`difference` with three decimals, rounded up."""
    return f"{math.ceil(difference * 1000) / 1000:.3f}" if math.isfinite(difference) else "inf"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _width() -> int:
    return min(max(shutil.get_terminal_size((WIDEST, 24)).columns, NARROWEST), WIDEST)


def _row(name: str, text: str) -> str:
    filled = textwrap.fill(
        text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"),
        width=_width(),
        initial_indent=f"{name:<{INDENT}}",
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return filled.replace("\N{NO-BREAK SPACE}", " ")
