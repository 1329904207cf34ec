"""A plan's solved term is the last one that keeps the promise, by an accountant written out."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting, second
from fedfuse.privacy.plan import plan
from fedfuse.privacy.planner import LEAST_DELTA, Terms, figure, make_plan
from fedfuse.privacy.search import border, farthest
from fedfuse.privacy.spec import PrivacyConfig, Unit


def account(q: float, sigma: float, steps: int) -> PLDAccountant:
    """dp-accounting as its documentation says, on its default grid of 1e-4."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    event = GaussianDpEvent(sigma)
    accountant.compose(PoissonSampledDpEvent(q, event) if q < 1 else event, steps)
    return accountant


def cost(terms: Terms) -> float:
    steps = terms.rounds * terms.local_steps
    return float(account(terms.sample_rate, terms.sigma, steps).get_epsilon(terms.delta))


RECORD = Terms(epsilon=3.0, rounds=20, sigma=2.5, units=2000)
SMALL = Terms(epsilon=1.0, delta=1e-6, rounds=30, local_steps=2, sample_rate=0.05, sigma=1.7)
SUBJECT = Terms(unit=Unit.SUBJECT, epsilon=4.0, rounds=20, sigma=2.0, units=300)
NODE = Terms(unit=Unit.NODE, epsilon=8.0, rounds=20, sample_rate=1.0, local_steps=1, sigma=3.0)
CASES = pytest.mark.parametrize(
    "terms",
    [
        pytest.param(RECORD, id="record", marks=pytest.mark.slow),
        pytest.param(SUBJECT, id="subject", marks=pytest.mark.slow),
        pytest.param(SMALL, id="small"),
        pytest.param(NODE, id="node"),
    ],
)


def last_digit(value: float) -> float:
    """One unit of the fourth digit of `value`."""
    return 10.0 ** (Decimal(repr(value)).adjusted() - 3)


@CASES
def test_solved_sigma_is_the_smallest_of_four_digits_that_keeps_epsilon(terms: Terms) -> None:
    found = make_plan(terms, solve="sigma", points=1)
    sigma = found.terms.sigma
    assert sigma == float(f"{sigma:.4g}")
    assert cost(found.terms) <= terms.epsilon * (1 + 1e-9)
    assert cost(replace(found.terms, sigma=sigma - last_digit(sigma))) > terms.epsilon
    assert cost(replace(found.terms, sigma=sigma * (1 - 1.01e-3))) > terms.epsilon
    assert (found.kept, found.at_end, found.solved) == (True, False, "sigma")


@CASES
def test_solved_rounds_are_the_most_that_keep_epsilon(terms: Terms) -> None:
    found = make_plan(terms, solve="rounds", points=1)
    assert cost(found.terms) <= terms.epsilon * (1 + 1e-9)
    assert cost(replace(found.terms, rounds=found.terms.rounds + 1)) > terms.epsilon
    assert found.kept


@CASES
def test_solved_rate_is_the_largest_of_four_digits_that_keeps_epsilon(terms: Terms) -> None:
    if terms.unit is Unit.NODE:
        return  # the command line refuses it: each round counts in full
    found = make_plan(terms, solve="sample_rate", points=1)
    rate = found.terms.sample_rate
    assert rate == float(f"{rate:.4g}")
    assert cost(found.terms) <= terms.epsilon * (1 + 1e-9)
    assert cost(replace(found.terms, sample_rate=rate + last_digit(rate))) > terms.epsilon
    assert found.kept


@CASES
def test_solved_delta_is_the_least_of_three_digits_that_holds(terms: Terms) -> None:
    found = make_plan(terms, solve="delta", points=1)
    exact = account(terms.sample_rate, terms.sigma, terms.steps).get_delta(terms.epsilon)
    assert exact * (1 - 1e-6) <= found.terms.delta <= exact * 1.011
    assert found.terms.delta == float(f"{found.terms.delta:.3g}")
    assert found.kept


@CASES
def test_solved_epsilon_is_what_it_costs_rounded_up(terms: Terms) -> None:
    found = make_plan(terms, solve="epsilon", points=1)
    exact = cost(terms)
    assert found.spent == pytest.approx(exact, rel=1e-7)
    assert 0 <= found.terms.epsilon - found.spent < 0.01
    assert found.kept


@pytest.mark.slow
@given(
    q=st.floats(0.01, 0.6),
    rounds=st.integers(5, 60),
    epsilon=st.floats(0.5, 6),
    delta=st.sampled_from([1e-4, 1e-6]),
)
@settings(deadline=None, max_examples=8, derandomize=True)
def test_what_was_solved_for_sigma_is_found_again_for_rounds(
    q: float, rounds: int, epsilon: float, delta: float
) -> None:
    terms = Terms(epsilon=epsilon, delta=delta, rounds=rounds, sample_rate=q)
    noise = make_plan(terms, solve="sigma", points=1)
    again = make_plan(noise.terms, solve="rounds", points=1)
    assert again.terms.rounds >= rounds
    if not noise.at_end:
        assert make_plan(noise.terms, solve="sigma", points=1).terms.sigma == noise.terms.sigma


@CASES
def test_epsilon_by_round_rises_to_the_total_and_is_never_too_low(terms: Terms) -> None:
    """Never below the lower bound of an accountant that shares no code, nor far above its upper."""
    found = make_plan(terms, solve="epsilon", points=4)
    numbers = [n for n, _ in found.by_round]
    spent = [e for _, e in found.by_round]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == terms.rounds
    assert 4 <= len(numbers) <= 5
    assert spent == sorted(spent)
    assert spent[-1] == found.spent
    for number, epsilon in found.by_round:
        steps = number * terms.local_steps
        low, high = second.bounds([(terms.sample_rate, terms.sigma, steps)], terms.delta)
        assert low <= epsilon <= high * 1.005


def test_epsilon_by_round_is_close_where_the_coarse_grid_is_not() -> None:
    """At epsilon 0.05 a grid of 1e-3 overstates by a tenth."""
    terms = Terms(epsilon=0.05, sigma=300.0)
    found = make_plan(terms, solve="rounds", points=100)
    assert found.grid_by_round == accounting.STATEMENT_GRID
    assert len(found.by_round) <= 26
    number, epsilon = found.by_round[len(found.by_round) // 2]
    assert epsilon <= 1.005 * second.bounds([(0.25, 300.0, number * 4)], 1e-5)[1]


@CASES
def test_one_more_round_is_all_rounds_and_one_composed(terms: Terms) -> None:
    found = make_plan(terms, solve="epsilon", points=1)
    more = replace(found.terms, rounds=terms.rounds + 1)
    assert found.spent_next == pytest.approx(cost(more), rel=1e-7)
    assert found.spent_next > found.spent


def test_mu_and_rdp_stand_beside_the_statement() -> None:
    found = make_plan(RECORD, solve="epsilon", points=1)
    assert found.spent < found.spent_rdp < 1.3 * found.spent
    assert found.mu is not None
    full = make_plan(NODE, solve="epsilon", points=1)
    assert full.mu == pytest.approx(math.sqrt(20) / 3.0)


@pytest.mark.parametrize(
    ("unit", "epsilon", "rounds"),
    [
        ("record", 1.0, 25),
        ("subject", 1.0, 25),
        ("node", 8.0, 10),
        pytest.param("record", 8.0, 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_takes_the_sigma_that_is_planned(unit: str, epsilon: float, rounds: int) -> None:
    node = unit == "node"
    terms = Terms(
        unit=Unit(unit),
        epsilon=epsilon,
        rounds=rounds,
        sample_rate=1.0 if node else 0.25,
        local_steps=1 if node else 4,
    )
    run = plan(PrivacyConfig(unit=unit, epsilon=epsilon), steps=terms.steps)
    assert run is not None
    assert make_plan(terms, solve="sigma", points=1).terms.sigma == run.noise_multiplier


def test_noise_against_signal_is_what_the_formula_says() -> None:
    """sigma sqrt(d) / (b sqrt(m)), and that over sqrt(T)."""
    terms = Terms(sigma=2.0, units=1000, sample_rate=0.1, parameters=40_000, nodes=4, rounds=25)
    found = make_plan(terms, solve="epsilon", points=1)
    assert found.noise_of_step == pytest.approx(2.0 * 200 / (100 * 2))
    assert found.noise_of_run == pytest.approx(2.0 / 10)
    blind = make_plan(replace(terms, units=None), solve="epsilon", points=1)
    assert blind.noise_of_step is blind.noise_of_run is None
    node = Terms(unit=Unit.NODE, sigma=2.0, sample_rate=1.0, local_steps=1, nodes=4, rounds=16)
    alone = make_plan(replace(node, parameters=100), solve="epsilon", points=1)
    shared = make_plan(replace(node, parameters=100, noise_shared=4), solve="epsilon", points=1)
    assert alone.noise_of_step == pytest.approx(2.0 * 10 / 2)
    assert shared.noise_of_step == pytest.approx(2.0 * 10 / 4)


EASY = Terms(epsilon=30.0, delta=1e-2, rounds=1, local_steps=1, sample_rate=0.02, sigma=100.0)


@pytest.mark.parametrize(
    ("solve", "end"),
    [
        pytest.param("sigma", accounting.LEAST_SIGMA, marks=pytest.mark.slow),
        ("sample_rate", 1.0),
        ("delta", LEAST_DELTA),
    ],
)
def test_ends_of_ranges_are_said_to_be_ends(solve: str, end: float) -> None:
    found = make_plan(EASY, solve=solve, points=1)
    assert (getattr(found.terms, solve), found.at_end, found.kept) == (end, True, True)


@pytest.mark.parametrize(
    ("terms", "solve", "words"),
    [
        (Terms(epsilon=0.01, sigma=1.0), "rounds", "costs more than epsilon"),
        (Terms(epsilon=2.9, sigma=1.0, local_steps=40), "rounds", "but one round has 40"),
        (Terms(epsilon=0.1, sigma=1.0), "delta", "promises next to nothing"),
        (Terms(sigma=0.1), "rounds", "nodes refuse less than 0.3"),
        (Terms(sigma=0.1), "sample_rate", "nodes refuse less than 0.3"),
        (Terms(epsilon=1e-5, delta=1e-12, rounds=10**6, sample_rate=1.0), "sigma", "no noise"),
    ],
)
def test_what_cannot_be_had_is_an_error_that_says_so(terms: Terms, solve: str, words: str) -> None:
    with pytest.raises(PrivacyError, match=words) as raised:
        make_plan(terms, solve=solve)
    assert raised.value.hint


@pytest.mark.slow
def test_little_noise_is_planned_but_no_node_would_keep_it() -> None:
    found = make_plan(Terms(sigma=0.28, rounds=1, local_steps=1, sample_rate=0.02), solve="epsilon")
    assert not found.kept
    assert found.by_round == ((1, found.spent),)


@given(limit=st.floats(0.011, 900), way=st.sampled_from([1, -1]), off=st.floats(0.95, 1.05))
def test_farthest_is_the_last_allowed_from_either_side(limit: float, way: int, off: float) -> None:
    def allowed(value: float) -> bool:
        return value <= limit if way == 1 else value >= limit

    start = Decimal(f"{limit * off:.4g}")
    found = farthest(start, allowed, way=way)
    step = 10.0 ** (start.adjusted() - 3)
    assert allowed(found)
    assert not allowed(found + way * step * (1 + 1e-9))


@given(limit=st.integers(1, 10**6), curve=st.sampled_from([0.3, 1.0, 3.0]))
def test_border_is_exact_on_whole_numbers_in_few_evaluations(limit: int, curve: float) -> None:
    asked = []

    def rising(x: float) -> float:
        asked.append(x)
        return float(x**curve)

    assert border(rising, float(limit**curve), 1, 2 * 10**6, 1) == limit
    assert len(asked) < 120


@pytest.mark.parametrize(
    ("epsilon", "text"), [(0.0, "0.00"), (0.00011, "0.0002"), (0.5, "0.5000"), (7.991, "8.00")]
)
def test_figures_are_rounded_up(epsilon: float, text: str) -> None:
    assert figure(epsilon) == text


def test_planning_needs_no_torch() -> None:
    code = "import sys, fedfuse.privacy.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
