"""Subjects, shares of C, and whole nodes: the sum moves by C at most, and oracles agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.errors import ModelError, PrivacyError
from fedfuse.privacy import accounting
from fedfuse.privacy.central import noisy_mean, private_update
from fedfuse.privacy.clipping.bookkeeping import BookKeeping
from fedfuse.privacy.dpsgd import Part, PrivateOptimizer, prepare, private_step
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.plan import plan
from fedfuse.privacy.sampling import poisson_subjects
from fedfuse.privacy.spec import CLIPPINGS, Event, Mechanism, PrivacyConfig, Unit, clip_shares
from fedfuse.privacy.views import by_node, of_model
from tests.privacy.test_clipping import TASK, assert_same, batch_of, model_with, oracle


def stream(key: int = 0, purpose: str = "noise") -> NoiseStream:
    return NoiseStream(bytes([key]) * 32, purpose)


def step_sum(
    model: torch.nn.Module,
    batch: object,
    owners: list[int] | None,
    clip_norm: float,
    *,
    physical: int = 64,
    parts: list[Part] | None = None,
    count_noise: float = 0.0,
    clipping: str = "bookkeeping",
) -> tuple[list[torch.Tensor], PrivateOptimizer]:
    ready = prepare(model, clipping)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters, lr=0.0),
        noise_multiplier=1e-14 / max(1.0, clip_norm),
        clip_norm=clip_norm,
        expected_batch=1.0,
        stream=stream(),
        parts=parts or (),
        count_noise=count_noise,
    )
    whose = None if owners is None else np.array(owners, dtype=np.int64)
    private_step(ready, optimizer, batch, TASK.loss, physical_batch=physical, owners=whose)  # type: ignore[arg-type]
    if not isinstance(ready, BookKeeping):
        ready.remove_hooks()
    return [p.grad for p in parameters], optimizer


def subject_oracle(
    model: torch.nn.Module, batch: object, owners: list[int], C: float
) -> list[torch.Tensor]:
    """Each subject's whole gradient by plain autograd, clipped, added up."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for subject in sorted(set(owners)):
        rows = torch.tensor([i for i, owner in enumerate(owners) if owner == subject])
        own = batch[rows]  # type: ignore[index]
        grads = torch.autograd.grad(
            TASK.loss(model(own), own.target).sum(), parameters, allow_unused=True
        )
        parts = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
        ]
        norm = float(torch.stack([g.norm() for g in parts]).norm())
        for sum_, g in zip(total, parts, strict=True):
            sum_ += g * min(1.0, C / max(norm, 1e-30))
    return total


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), max_size=4),
    seed=st.integers(0, 2**31),
    physical=st.integers(1, 9),
    clip_norm=st.sampled_from([0.05, 0.5, 100.0]),
    clipping=st.sampled_from(CLIPPINGS),
)
def test_subjects_are_clipped_as_wholes_however_the_step_is_cut(
    sizes: list[int], seed: int, physical: int, clip_norm: float, clipping: str
) -> None:
    owners = [number for number, size in enumerate(sizes) for _ in range(size)]
    model, batch = model_with(), batch_of(len(owners), seed)
    found, _ = step_sum(model, batch, owners, clip_norm, physical=physical, clipping=clipping)
    assert_same(found, subject_oracle(model, batch, owners, clip_norm))


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_subject_of_many_records_moves_the_sum_by_no_more_than_the_clip_norm(
    clipping: str,
) -> None:
    model, batch = model_with(), batch_of(12, seed=1, chance_present=1.0)
    found, _ = step_sum(model, batch, [0] * 12, 0.1, clipping=clipping)
    assert math.sqrt(sum(float(g.square().sum()) for g in found)) <= 0.1 * (1 + 1e-9)
    by_record, _ = step_sum(model, batch, None, 0.1)
    assert math.sqrt(sum(float(g.square().sum()) for g in by_record)) > 0.3


def test_a_broken_record_takes_its_subject_with_it_and_no_other() -> None:
    model, batch = model_with(), batch_of(5, seed=2, chance_present=1.0)
    batch.inputs["table"][1, 0] = float("nan")
    found, _ = step_sum(model, batch, [0, 0, 1, 1, 2], 0.5)
    rest = batch[torch.tensor([2, 3, 4])]
    assert_same(found, subject_oracle(model, rest, [0, 0, 1], 0.5))


def test_subjects_are_drawn_whole_at_the_declared_rate_and_give_no_more_than_allowed() -> None:
    """40 subjects of 1 to 9 records, 4000 steps: the share drawn is within 5 sd of q (1e-6)."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 10, 40)
    subjects = rng.permutation(np.repeat(np.arange(40), sizes))
    steps, q, most = 4000, 0.3, 4
    drawn = np.zeros(40)
    used = np.zeros(len(subjects))
    for rows, owners in poisson_subjects(subjects, q, steps, most, stream(3, "sampling")):
        assert np.all(np.diff(owners) >= 0)
        assert len(set(rows.tolist())) == len(rows)
        names, counts = np.unique(subjects[rows], return_counts=True)
        assert np.array_equal(counts, np.minimum(sizes[names], most))
        assert len(names) == (owners.max() + 1 if len(owners) else 0)
        for number in range(len(names)):
            assert len(set(subjects[rows[owners == number]].tolist())) == 1
        drawn[names] += 1
        used[rows] += 1
    assert np.all(np.abs(drawn / steps - q) < 5 * math.sqrt(q * (1 - q) / steps))
    large = np.flatnonzero(sizes[subjects] == 9)
    assert np.all(np.abs(used[large] / steps - q * most / 9) < 0.04)


def test_no_subjects_are_steps_too() -> None:
    nobody = np.empty(0, dtype=np.int64)
    found = list(poisson_subjects(nobody, 0.5, 3, 4, stream(0, "sampling")))
    assert [len(rows) for rows, _ in found] == [0, 0, 0]
    sums, _ = step_sum(model_with(), batch_of(0, 0), [], 1.0)
    assert all(float(g.abs().max()) < 1e-12 for g in sums)


@pytest.mark.parametrize("text", ["equal", "image=2,audio=1,text=1,series=3,table=1,rest=2"])
def test_shares_bound_each_part_and_all_of_them_together(text: str) -> None:
    model, batch = model_with(), batch_of(1, seed=5, chance_present=1.0)
    shares = clip_shares(text, model.names)
    assert sum(share**2 for share in shares.values()) == pytest.approx(1.0)
    places: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(model.named_parameters()):
        places.setdefault(model.part_of(name), []).append(place)
    parts = [Part(name=n, places=tuple(p), share=shares[n]) for n, p in places.items()]
    found, _ = step_sum(model, batch, None, 1e-3, parts=parts)
    whole = oracle(model, batch, math.inf)
    for part in parts:
        norm = math.sqrt(sum(float(found[i].square().sum()) for i in part.places))
        assert norm == pytest.approx(1e-3 * part.share, rel=1e-4)
        for i in part.places:  # only scaled, never turned
            a, b = found[i].flatten(), whole[i].flatten()
            assert float(a @ b) == pytest.approx(float(a.norm() * b.norm()), abs=1e-12)
    assert math.sqrt(sum(float(g.square().sum()) for g in found)) <= 1e-3 * (1 + 1e-9)


def test_a_record_broken_in_one_part_counts_as_zero_in_all() -> None:
    model, batch = model_with(), batch_of(3, seed=6, chance_present=1.0)
    batch.inputs["table"][0, 0] = float("nan")
    places = list(range(len(list(model.parameters()))))
    parts = [
        Part(name="a", places=tuple(places[:4]), share=0.6),
        Part(name="b", places=tuple(places[4:]), share=0.8),
    ]
    found, _ = step_sum(model, batch, None, 0.5, parts=parts)
    rest, _ = step_sum(model, batch[torch.tensor([1, 2])], None, 0.5, parts=parts)
    assert_same(found, rest)


def test_parts_that_leave_out_a_parameter_or_too_much_of_c_are_refused() -> None:
    model = model_with()
    everything = tuple(range(len(list(model.parameters()))))
    with pytest.raises(ModelError, match="no part"):
        step_sum(model, batch_of(1, 0), None, 1.0, parts=[Part(name="a", places=everything[1:])])
    twice = [Part(name="a", places=everything[:1]), Part(name="b", places=everything[1:])]
    with pytest.raises(PrivacyError, match="more than 1"):
        step_sum(model_with(), batch_of(1, 0), None, 1.0, parts=twice)


@pytest.mark.parametrize(
    "text", ["image=1", "image=1,rest=0", "image=x,rest=1", "sound=1,image=1,rest=1", "nonsense"]
)
def test_shares_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(PrivacyError, match="clip_shares"):
        clip_shares(text, ("image",))


def test_the_count_beside_the_sum_is_paid_for_by_more_noise_on_the_sum() -> None:
    """Whitened, one unit moves (sum, count) by sqrt(1/z_d^2 + 1/(2 s_b)^2) = 1/z exactly."""
    one = Mechanism(
        unit=Unit.RECORD, sample_rate=0.1, noise_multiplier=1.5, clip_norm=1.0, steps=1,
        count_noise=2.0,
    )  # fmt: skip
    assert one.sum_noise > one.noise_multiplier
    assert math.hypot(1 / one.sum_noise, 0.5 / one.count_noise) == pytest.approx(1 / 1.5)
    with pytest.raises(PrivacyError, match="count_noise"):
        Mechanism(
            unit=Unit.RECORD, sample_rate=0.1, noise_multiplier=1.5, clip_norm=1.0, steps=1,
            count_noise=0.7,
        )  # fmt: skip


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_the_count_is_of_units_within_the_clip_norm_less_half(clipping: str) -> None:
    model, batch = model_with(), batch_of(6, seed=7, chance_present=1.0)
    for clip_norm, expected in ((1e-6, -3.0), (1e6, 3.0)):
        _, optimizer = step_sum(
            model, batch, None, clip_norm, count_noise=1e-9, physical=4, clipping=clipping
        )
        assert optimizer.unclipped == [pytest.approx(expected, abs=1e-6)]


START = {"w": np.zeros((2, 3), np.float32), "b": np.array(1.0, np.float32), "n": np.array(7)}


def ends(scale: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "w": (START["w"] + scale * rng.standard_normal((2, 3))).astype(np.float32),
        "b": np.array(1.0 + scale * rng.standard_normal(), np.float32),
        "n": np.array(8),
    }


def length(update: dict[str, np.ndarray]) -> float:
    return math.sqrt(
        sum(float(np.square(np.float64(update[k]) - START[k]).sum()) for k in ("w", "b"))
    )


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e6])
def test_an_update_is_bounded_over_all_trained_weights_a_number_by_itself_included(
    scale: float,
) -> None:
    bounded = private_update(
        START, ends(scale, 1), ("w", "b"), clip_norm=0.5, noise_multiplier=0.0, stream=stream()
    )
    assert length(bounded) == pytest.approx(min(0.5, length(ends(scale, 1))), rel=1e-5)
    assert bounded["n"] == 7
    assert {k: v.dtype for k, v in bounded.items()} == {k: v.dtype for k, v in START.items()}


def test_an_update_that_is_not_finite_is_zero_and_noise() -> None:
    broken = ends(1.0, 1) | {"b": np.array(np.nan, np.float32)}
    quiet = private_update(
        START, broken, ("w", "b"), clip_norm=0.5, noise_multiplier=0.0, stream=stream()
    )
    assert length(quiet) == 0
    loud = private_update(
        START, broken, ("w", "b"), clip_norm=0.5, noise_multiplier=2.0, stream=stream()
    )
    assert length(loud) > 0


@pytest.mark.parametrize("told", [2.0, 3.0])
def test_noise_on_an_update_has_the_declared_sigma(told: float) -> None:
    """4000 draws of 7 numbers: the variance is within 5 sd (1e-6) at 2.0, and not of 3.0."""
    source = stream(9)
    draws = []
    for _ in range(4000):
        noisy = private_update(
            START, START, ("w", "b"), clip_norm=0.5, noise_multiplier=2.0, stream=source
        )
        draws += [*noisy["w"].ravel(), float(noisy["b"]) - 1.0]
    found = float(np.mean(np.square(draws)))
    expected = (told * 0.5) ** 2
    fits = abs(found / expected - 1) < 5 * math.sqrt(2 / len(draws))
    assert fits == (told == 2.0)


def test_the_server_clips_each_update_and_divides_by_the_nodes_that_were_asked() -> None:
    updates = [ends(1e3, 1), ends(1e3, 2)]
    mean = noisy_mean(
        START, updates, ("w", "b"), asked=5, clip_norm=0.5, noise_multiplier=1e-9, stream=stream()
    )
    bounded = [
        private_update(START, u, ("w", "b"), clip_norm=0.5, noise_multiplier=0.0, stream=stream())
        for u in updates
    ]
    expected = sum(np.float64(b["w"]) for b in bounded) / 5
    np.testing.assert_allclose(mean["w"], expected, rtol=1e-5, atol=1e-7)
    one_less = noisy_mean(
        START, updates[:1], ("w", "b"), asked=5, clip_norm=0.5, noise_multiplier=1e-9,
        stream=stream(),
    )  # fmt: skip
    moved = {k: np.float64(mean[k]) - one_less[k] + START[k] for k in ("w", "b")}
    assert length(moved) <= 0.5 / 5 * (1 + 1e-5)


def node_events(rounds: int, spent: int, silent: int, sigma: float) -> list[Event]:
    return [
        Event(
            node=f"n{number}", round=round, unit="node", sample_rate=1.0, clip_norm=1.0, steps=1,
            noise_multiplier=sigma, status="spent" if number < spent else "reserved",
        )
        for round in range(1, rounds + 1)
        for number in range(spent + silent)
    ]  # fmt: skip


def test_sums_carry_the_noise_of_those_that_answered_and_of_no_other() -> None:
    events = node_events(rounds=10, spent=4, silent=3, sigma=2.0)
    assert {m.noise_multiplier for m in of_model(events)} == {4.0}
    assert len(of_model(events)) == 10
    assert {m.noise_multiplier for m in of_model(events, noise_nodes=4)} == {2.0}
    lonely = node_events(rounds=1, spent=0, silent=2, sigma=2.0)
    assert [m.noise_multiplier for m in of_model(lonely)] == [2.0]
    worst = max(accounting.epsilon(past, 1e-5, grid=1e-3) for past in by_node(events).values())
    assert accounting.epsilon(of_model(events), 1e-5, grid=1e-3) < worst


def test_unit_node_is_a_gaussian_in_full_each_round() -> None:
    """No sampling is claimed: RDP agrees with the closed form, and PLD is below it."""
    whole = plan(PrivacyConfig(unit="node", epsilon=8.0), steps=40)
    assert whole is not None
    assert (whole.sample_rate, whole.steps) == (1.0, 40)
    by_us = accounting.epsilon_rdp([whole], 1e-5)
    by_pld = accounting.epsilon([whole], 1e-5)
    mu = math.sqrt(40) / whole.noise_multiplier
    by_hand = min(
        a * mu**2 / 2 + math.log1p(-1 / a) - (math.log(1e-5) + math.log(a)) / (a - 1)
        for a in np.linspace(1.05, 200, 20_000)
    )
    assert by_pld <= 8.0
    assert by_us == pytest.approx(by_hand, rel=0.02)
    assert by_pld <= by_us


@pytest.mark.parametrize("unit", ["person", "", "Record"])
def test_a_line_of_the_books_with_an_unknown_unit_is_no_mechanism(unit: str) -> None:
    line = node_events(1, 1, 0, 1.0)[0].as_dict() | {"unit": unit}
    with pytest.raises(PrivacyError, match="unknown"):
        _ = Event(**line).mechanism
