"""Each warning appears exactly where its limit is passed, and tells the truth."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.privacy.advice import Caution, cautions
from fedfuse.privacy.planner import Plan, Terms, make_plan
from fedfuse.privacy.spec import Unit


def planned(*, at_end: bool = False, spent: float = 3.0, **terms: Any) -> Plan:
    """A plan that nothing is wrong with, but for what is said otherwise."""
    sound: dict[str, Any] = {
        "epsilon": 4.0,
        "delta": 1e-6,
        "sigma": 2.0,
        "units": 5000,
        "parameters": 10_000,
        "nodes": 4,
    }
    return Plan(
        terms=Terms(**sound | terms),
        solved="sigma",
        at_end=at_end,
        kept=True,
        spent=spent,
        spent_rdp=spent * 1.1,
        spent_next=spent * 1.01,
        mu=1.0,
        by_round=((40, spent),),
        grid_by_round=1e-4,
    )


def names(plan: Plan) -> list[str]:
    return [caution.name for caution in cautions(plan)]


NODE: dict[str, Any] = {
    "unit": Unit.NODE,
    "sample_rate": 1.0,
    "local_steps": 1,
    "units": 100_000,
    "nodes": 100_000,
}


def test_a_sound_plan_has_no_warning() -> None:
    assert names(planned()) == []
    assert names(planned(**NODE)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sigma": 0.3}, []),
        ({"sigma": 0.2999}, ["sigma-refused"]),
        # delta against 1/n, at n = 5000: a tenth of it is 2e-5.
        ({"delta": 2e-5}, []),
        ({"delta": 2.01e-5}, ["delta-large"]),
        ({"delta": 1.999e-4}, ["delta-large"]),
        ({"delta": 2e-4}, ["delta-too-large"]),
        ({"delta": 0.1}, ["delta-too-large"]),
        ({"epsilon": 10.0}, []),
        ({"epsilon": 10.01}, ["epsilon-weak"]),
        ({"at_end": True}, ["at-end"]),
        ({"sample_rate": 0.5}, []),
        ({"sample_rate": 0.51}, ["rate-high"]),
        ({"sample_rate": 1.0}, ["rate-high"]),
        # 40 rounds of 4 steps, 4 nodes: sigma sqrt(d) / (b sqrt(640)) is 1 at b = 8 for d = 10^4.
        ({"sample_rate": 8 / 5000}, []),
        ({"sample_rate": 7.9 / 5000}, ["noise-hopeless"]),
        ({"sample_rate": 1 / 5000, "parameters": 100}, []),
        ({"sample_rate": 0.99 / 5000, "parameters": 100}, ["batches-empty"]),
        ({"units": None}, ["units-unknown"]),
        ({"units": None, "delta": 0.1, "sample_rate": 1e-6}, ["units-unknown"]),
        (NODE | {"sample_rate": 1.0, "delta": 1.1e-6}, ["delta-large"]),
        (NODE | {"units": None}, ["units-unknown"]),
        (NODE | {"nodes": 900}, ["noise-hopeless"]),
        (
            {"sigma": 0.2, "delta": 0.01, "epsilon": 50.0, "sample_rate": 0.9},
            ["sigma-refused", "delta-too-large", "epsilon-weak", "rate-high"],
        ),
    ],
)
def test_each_warning_appears_where_its_limit_is_passed_and_nowhere_else(
    changes: dict[str, Any], expected: list[str]
) -> None:
    assert names(planned(**changes)) == expected


@given(
    units=st.integers(1, 10**9),
    delta=st.floats(1e-12, 0.1),
)
def test_the_delta_that_is_advised_needs_no_warning(units: int, delta: float) -> None:
    for caution in cautions(planned(units=units, delta=delta, parameters=1)):
        if caution.name.startswith("delta"):
            advised = float(caution.do.split("delta = ")[1].split()[0])
            assert advised < delta
            assert advised * units <= 0.1 * (1 + 1e-9)
            assert not [n for n in names(planned(units=units, delta=advised)) if "delta" in n]


def only(plan: Plan) -> Caution:
    (caution,) = cautions(plan)
    return caution


def test_the_share_of_empty_batches_is_the_chance_that_nobody_is_drawn() -> None:
    caution = only(planned(units=40, sample_rate=0.01, parameters=1, delta=1e-6))
    assert f"{0.99**40:.0%}" in caution.what
    assert "0.4 records" in caution.what


def test_a_chance_of_handing_out_a_unit_is_delta_times_the_units() -> None:
    """Each of n units handed out whole with chance delta: one of them is, n delta times in one."""
    assert "0.5, would" in only(planned(delta=1e-4)).why


def test_a_high_rate_names_what_full_batches_would_cost() -> None:
    terms = Terms(epsilon=3.0, delta=1e-6, sample_rate=0.8, rounds=10, units=5000, parameters=100)
    found = make_plan(terms, solve="sigma", points=1)
    caution = only(found)
    mu = math.sqrt(40) / found.terms.sigma
    named = float(re.findall(r"epsilon = ([\d.]+)", caution.why)[0])
    assert gaussian_delta(named, mu) <= 1e-6 < gaussian_delta(named - 0.02, mu)
    assert named > found.spent


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018 (arXiv:1805.06530v2), theorem 8."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("unit", [Unit.RECORD, Unit.SUBJECT, Unit.NODE])
def test_warnings_speak_of_the_unit_and_name_a_flag_that_there_is(unit: Unit) -> None:
    changes = {"unit": unit} if unit is not Unit.NODE else NODE
    caution = only(planned(**changes | {"units": None}))
    assert f"{unit.value}s" in caution.what
    assert caution.do == ("give --nodes" if unit is Unit.NODE else "give --records")


def test_every_warning_says_what_why_and_what_to_do() -> None:
    grave = planned(
        sigma=0.2, delta=0.01, epsilon=50.0, at_end=True, sample_rate=1e-5, units=50, nodes=1
    )
    found = cautions(grave)
    assert [caution.name for caution in found] == [
        "sigma-refused",
        "delta-large",
        "epsilon-weak",
        "at-end",
        "batches-empty",
        "noise-hopeless",
    ]
    for caution in found:
        assert caution.what
        assert caution.why
        assert caution.do
        assert "\n" not in caution.what + caution.why + caution.do
