"""What a command line asks to be planned: flags, a scenario and defaults as the terms of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedfuse.cli.scenario import Flags, configuration
from fedfuse.config import RunConfig
from fedfuse.errors import UsageError
from fedfuse.privacy.accounting import MOST_STEPS
from fedfuse.privacy.planner import OPEN, Terms
from fedfuse.privacy.spec import Unit

__all__ = ["Asked", "Given", "asked"]

RANGES: dict[str, tuple[float, float]] = {
    "epsilon": (1e-3, 1000),
    # dp-accounting cuts off tails of 1e-15: with much less its epsilon is infinite.
    "delta": (1e-12, 0.1),
    "rounds": (1, 1_000_000),
    "sample_rate": (1e-9, 1),
    "sigma": (1e-2, 1_000_000),
    "records": (1, 10**12),
    "batch": (1e-9, 10**12),
    "local_steps": (1, 1_000_000),
    "nodes": (1, 1_000_000),
    "parameters": (1, 10**13),
    "clip": (1e-9, 10**9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The flags of `fedfuse plan` that say what to plan; None: not given."""

    epsilon: float | None = None
    delta: float | None = None
    rounds: int | None = None
    sample_rate: float | None = None
    sigma: float | None = None
    solve: str | None = None
    """One of OPEN."""
    unit: str | None = None
    records: int | None = None
    batch: float | None = None
    local_steps: int | None = None
    nodes: int | None = None
    parameters: int | None = None
    clip: float | None = None
    scenario: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Terms, which of them to solve for, and where they are from."""

    terms: Terms
    solve: str
    sources: Mapping[str, str]
    """For each of OPEN "given", "scenario", "default", "unit" (it says so) or "solved"."""
    parameters_assumed: bool
    scenario: Path | None
    base: RunConfig
    """The scenario's configuration as it is written, or the default one."""


def asked(given: Given) -> Asked:
    """What the flags ask for.

    A flag beats the scenario, which beats the defaults.
    Raises UsageError where a flag makes no sense, or where it is not plain what to solve for.
    """
    for name in RANGES:
        _check_range(name, getattr(given, name))
    written = configuration(Flags(scenario=given.scenario))
    base = configuration(Flags(scenario=given.scenario, unit=given.unit)).with_defaults()
    unit = Unit(base.privacy.unit)
    if unit is Unit.NONE:
        raise UsageError(
            'privacy.unit = "none" promises nothing, so there is nothing to plan',
            where=str(given.scenario),
            hint="say what to protect, for example --unit record",
        )
    if unit is Unit.NODE:
        _check_node(given)
    units = _units(given, unit, base)
    given = _with_batch(given, unit, units)
    values, sources = _five(given, unit, base)
    solve = _open(given, sources)
    sources[solve] = "solved"
    asked_nodes = round(base.federation.fraction * base.data.nodes)
    nodes = given.nodes or max(base.federation.min_nodes, asked_nodes)
    terms = Terms(
        unit=unit,
        units=units,
        local_steps=1 if unit is Unit.NODE else given.local_steps or base.train.local_steps,
        clip_norm=given.clip or base.privacy.clip_norm,
        parameters=given.parameters or Terms().parameters,
        nodes=nodes,
        noise_shared=_noise_shared(unit, base, nodes),
        **{name: value for name, value in values.items() if value is not None},
    )
    if solve != "rounds" and terms.steps > MOST_STEPS:
        raise UsageError(
            f"{terms.rounds} rounds of {terms.local_steps} steps, but at most {MOST_STEPS} steps "
            "can be accounted for",
            hint="plan for fewer",
        )
    return Asked(
        terms=terms,
        solve=solve,
        sources=sources,
        parameters_assumed=given.parameters is None,
        scenario=given.scenario,
        base=written,
    )


def _check_range(name: str, value: float | None, where: str = "") -> None:
    low, high = RANGES[name]
    if value is not None and not low <= value <= high:  # also where it is NaN
        raise UsageError(
            f"{_flag(name)} {value:g}, but it must be from {_words(low)} to {_words(high)}",
            where=where,
            hint="see fedfuse plan --help",
        )


def _check_node(given: Given) -> None:
    for name in ("sample_rate", "batch", "records", "local_steps"):
        if getattr(given, name) is not None:
            raise UsageError(
                f'{_flag(name)} with unit "node", whose one release a round is a whole update',
                hint=f"leave {_flag(name)} out; the units are counted by --nodes",
            )
    if given.solve == "sample_rate":
        raise UsageError(
            '--solve rate with unit "node", where each round counts in full',
            hint="solve for another of the five",
        )


def _units(given: Given, unit: Unit, base: RunConfig) -> int | None:
    """How many units a step draws from, as far as a flag or the scenario says it."""
    if unit is Unit.NODE:
        known = max(base.federation.min_nodes, base.data.nodes)
        return given.nodes or (known if given.scenario else None)
    privacy = base.privacy
    declared = privacy.declared_subjects if unit is Unit.SUBJECT else privacy.declared_records
    return given.records or declared or None


def _with_batch(given: Given, unit: Unit, units: int | None) -> Given:
    """--batch as a sample rate."""
    if given.batch is None:
        return given
    if given.sample_rate is not None:
        raise UsageError("--batch with --sample-rate: both say the rate", hint="leave one out")
    if given.solve == "sample_rate":
        raise UsageError("--batch with --solve rate: it says the rate", hint="leave --batch out")
    if units is None:
        raise UsageError("--batch without --records says no rate", hint="give --records too")
    if given.batch > units:
        raise UsageError(
            f"--batch {given.batch:g}, but there are {units} {unit}s",
            hint="an expected batch is at most all of them",
        )
    return replace(given, sample_rate=given.batch / units)


def _five(given: Given, unit: Unit, base: RunConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Each of OPEN, None where nothing says it, and what says it."""
    scenario = given.scenario is not None
    privacy = base.privacy
    behind = {
        "epsilon": privacy.epsilon if scenario else None,
        "delta": privacy.delta,
        "rounds": base.train.rounds if scenario else None,
        "sample_rate": privacy.sample_rate,
        "sigma": privacy.noise_multiplier or None,  # 0: to be calibrated
    }
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name in OPEN:
        flag = getattr(given, name)
        values[name] = behind[name] if flag is None else flag
        if flag is not None:
            sources[name] = "given"
        elif behind[name] is not None:
            sources[name] = "scenario" if scenario else "default"
            _check_range(name, behind[name], where=str(given.scenario))
        else:
            sources[name] = ""
    if unit is Unit.NODE:
        values["sample_rate"], sources["sample_rate"] = 1.0, "unit"
    return values, sources


def _open(given: Given, sources: Mapping[str, str]) -> str:
    """Which of the five to solve for: the one that is asked for, or the one that nothing says."""
    missing = [name for name in OPEN if not sources[name] and name != given.solve]
    if given.solve is not None:
        if sources[given.solve] == "given":
            flag = _flag(given.solve)
            raise UsageError(
                f"--solve {_short(given.solve)}, but {flag} is given", hint="leave one of them out"
            )
        missing = [given.solve, *missing]
    if len(missing) > 1:
        flags = ", ".join(map(_flag, missing))
        raise UsageError(
            f"{flags} are open, but only one can be found",
            hint="give all of --epsilon, --rounds and --sigma but one",
        )
    if missing:
        return missing[0]
    free = [name for name in OPEN if sources[name] in ("default", "scenario")]
    if len(free) == 1:
        return free[0]
    if sources["epsilon"] == "scenario":  # its own sigma, or one given: what does that cost?
        return "epsilon"
    if not free:
        raise UsageError("nothing is left to find", hint="leave out what you look for")
    raise UsageError(
        "epsilon, rounds and sigma are all given, so it is not plain what to find",
        hint="say " + " or ".join(f"--solve {_short(name)}" for name in free),
    )


def _noise_shared(unit: Unit, base: RunConfig, nodes: int) -> int:
    if unit is not Unit.NODE:
        return 1
    return nodes if base.privacy.noise_by == "server" else min(base.privacy.noise_nodes, nodes)


def _short(name: str) -> str:
    """One of OPEN as --solve takes it."""
    return "rate" if name == "sample_rate" else name


def _words(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
