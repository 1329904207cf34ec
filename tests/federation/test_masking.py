"""The server learns a sum and no more: whatever nodes are lost, and whatever it sends.

False alarms: keys and seeds come from the operating system, so the statistical tests differ each
time; their bounds fail once in 10^9 runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.errors import FederationError, PrivacyError, WireError
from fedfuse.federation.masking.collector import Collector
from fedfuse.federation.masking.keys import KeyPair, seal, unseal
from fedfuse.federation.masking.masks import add_mask
from fedfuse.federation.masking.member import Member
from fedfuse.federation.masking.messages import STAGES, from_config, sign_set, to_config, view_of
from fedfuse.federation.masking.quantise import Lattice
from fedfuse.federation.masking.shares import combine, split
from fedfuse.federation.masking.terms import Terms, colluders, threshold_for
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.signing import SigningKey

STEPS = tuple(stage for stage in STAGES if stage != "open")
"""A node opens and masks in one go here. One lost at step i answered all steps before it."""


class Round:
    """A run of the protocol among n nodes, stage by stage."""

    def __init__(self, n: int, threshold: int = 0, length: int = 24) -> None:
        self.names = [f"node-{i}" for i in range(n)]
        self.terms = Terms(
            request="ab" * 16,
            digest="cd" * 32,
            nodes=tuple(self.names),
            threshold=threshold or threshold_for(n),
            length=length,
        )
        self.keys = {name: SigningKey(Ed25519PrivateKey.generate()) for name in self.names}
        self.identities = {name: key.public for name, key in self.keys.items()}
        self.members = {
            name: Member(self.terms, name, self.keys[name], self.identities) for name in self.names
        }
        self.server = Collector(self.terms, self.identities)
        self.vectors = {
            name: np.arange(length, dtype=np.int64) * (-3) ** i for i, name in enumerate(self.names)
        }
        self.masked: dict[str, np.ndarray] = {}
        self.shares: dict[str, dict[str, bytes]] = {}

    def run(self, lost: Mapping[str, int] | None = None, until: str = "") -> np.ndarray | None:
        """The sum, where nodes are `lost` at a stage by number; None: stopped before `until`."""
        gone = lost or {}

        def there(stage: int) -> list[str]:
            return [name for name in self.names if gone.get(name, len(STEPS)) > stage]

        steps: list[Callable[[], None]] = [self.announce, self.share, self.mask]
        steps += [self.agree, self.reveal]
        for number, stage in enumerate(STEPS):
            if stage == until:
                return None
            self.there = there(number)
            steps[number]()
        return self.server.total()

    def announce(self) -> None:
        for name in self.there:
            self.server.announced(name, self.members[name].announce())

    def share(self) -> None:
        announcements = self.server.announcements()
        for name in self.there:
            self.server.shared(name, self.members[name].share(announcements))

    def mask(self) -> None:
        boxes = self.server.boxes()
        for name in self.there:
            self.members[name].open(boxes[name])
            self.masked[name] = self.members[name].mask(self.vectors[name])
            self.server.masked(name, self.masked[name])

    def agree(self) -> None:
        left = self.server.left()
        for name in self.there:
            self.server.agreed(name, self.members[name].agree(left))

    def reveal(self) -> None:
        signatures = self.server.signatures()
        for name in self.there:
            self.shares[name] = self.members[name].reveal(signatures)
            self.server.revealed(name, self.shares[name])

    def plain(self, names: Collection[str]) -> np.ndarray:
        total = sum(self.vectors[name] for name in names)
        return np.asarray(total).astype(np.uint32)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_sum_is_exact_whoever_is_lost_and_when(data: st.DataObject) -> None:
    """Also where vectors wrap; fewer than the threshold at any stage: no sum."""
    n = data.draw(st.integers(2, 6))
    threshold = data.draw(st.integers(n // 2 + 1, n).filter(lambda t: t >= 2))
    lost = {f"node-{i}": data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 5, 5, 5])) for i in range(n)}
    one = Round(n, threshold)
    values = st.lists(st.integers(-(2**40), 2**40), min_size=24, max_size=24)
    for name in one.names:
        one.vectors[name] = np.array(data.draw(values), dtype=np.int64)
    if sum(stage == len(STEPS) for stage in lost.values()) >= threshold:
        left = [name for name, stage in lost.items() if stage > 2]
        np.testing.assert_array_equal(one.run(lost), one.plain(left))
    else:
        with pytest.raises(FederationError, match="there is no sum"):
            one.run(lost)


@pytest.mark.parametrize("stage", range(len(STEPS)))
def test_a_node_lost_at_any_stage_is_made_up_for(stage: int) -> None:
    one = Round(4)
    left = one.names if stage > 2 else one.names[1:]
    np.testing.assert_array_equal(one.run({"node-0": stage}), one.plain(left))


def test_a_node_gives_one_share_of_each_other_and_answers_once() -> None:
    one = Round(4)
    one.run({"node-0": 2})
    for shares in one.shares.values():
        assert set(shares) == set(one.names)
    with pytest.raises(WireError, match="at over"):
        one.members["node-1"].reveal(one.server.signatures())


@pytest.mark.parametrize("again", STEPS)
def test_no_stage_is_answered_twice_and_a_refusal_ends_all(again: str) -> None:
    one = Round(4)
    one.run(until=again)
    member = one.members["node-0"]
    arguments: dict[str, tuple[Any, ...]] = {
        "announce": (),
        "share": ({},),
        "open": ({},),
        "mask": (one.vectors["node-0"][1:],),
        "agree": ([],),
        "reveal": ({},),
    }
    if again == "announce":
        member.announce()
        with pytest.raises(WireError):
            member.announce()
    else:
        with pytest.raises(WireError):
            getattr(member, again)(*arguments[again])
    for stage in STAGES:
        with pytest.raises(WireError, match="at over"):
            getattr(member, stage)(*arguments[stage])


def flipped(part: bytes, place: int = 0) -> bytes:
    return part[:place] + bytes([part[place] ^ 1]) + part[place + 1 :]


@pytest.mark.parametrize("place", [0, 32, 64, 96])
def test_a_changed_announcement_is_refused(place: int) -> None:
    """Keys, hash and signature: by whoever gets it, the server and the nodes."""
    one = Round(4)
    one.run(until="share")
    told = one.server.announcements()
    told["node-1"] = flipped(told["node-1"], place)
    with pytest.raises(WireError, match="did not sign"):
        one.members["node-0"].share(told)
    with pytest.raises(WireError, match="own announcement"):
        one.members["node-1"].share(told)
    fresh = Round(4)
    with pytest.raises(WireError, match="did not sign"):
        fresh.server.announced("node-1", flipped(fresh.members["node-1"].announce(), place))


def test_keys_that_the_server_made_up_in_a_nodes_name_are_refused() -> None:
    one = Round(4)
    one.run(until="share")
    told = one.server.announcements()
    stranger = Round(4)
    told["node-1"] = stranger.members["node-1"].announce()
    with pytest.raises(WireError, match="did not sign"):
        one.members["node-0"].share(told)


def test_an_announcement_of_another_run_is_refused() -> None:
    one = Round(4)
    one.run(until="share")
    other = Terms(
        request="ef" * 16, digest="cd" * 32, nodes=one.terms.nodes, threshold=3, length=24
    )
    late = Member(other, "node-1", one.keys["node-1"], one.identities)
    told = one.server.announcements() | {"node-1": late.announce()}
    with pytest.raises(WireError, match="did not sign"):
        one.members["node-0"].share(told)


def test_a_changed_share_is_refused() -> None:
    one = Round(4)
    one.run(until="mask")
    boxes = one.server.boxes()["node-0"]
    boxes["node-1"] = flipped(boxes["node-1"], 5)
    with pytest.raises(WireError, match="changed on its way"):
        one.members["node-0"].open(boxes)


def test_a_share_for_somebody_else_is_refused() -> None:
    one = Round(4)
    one.run(until="mask")
    boxes = one.server.boxes()
    boxes["node-0"]["node-1"] = boxes["node-2"]["node-1"]
    with pytest.raises(WireError, match="changed on its way"):
        one.members["node-0"].open(boxes["node-0"])


def test_nodes_that_were_told_of_other_keys_have_nothing_to_do_with_each_other() -> None:
    """The server leaves one announcement out for half of the nodes."""
    one = Round(5, threshold=4)
    one.run(until="share")
    whole = one.server.announcements()
    part = {name: packed for name, packed in whole.items() if name != "node-4"}
    from_0 = one.members["node-0"].share(part)
    to_1 = {
        name: one.members[name].share(whole)["node-1"] for name in ("node-2", "node-3", "node-4")
    } | {"node-0": from_0["node-1"]}
    one.members["node-1"].share(whole)
    with pytest.raises(WireError, match="changed on its way"):
        one.members["node-1"].open(to_1)


def test_a_server_that_tells_two_stories_of_who_is_left_gets_no_shares() -> None:
    """To one it says that node-3 is left, to the others that it is lost."""
    one = Round(4)
    one.run(until="agree")
    everybody = one.names
    others = everybody[:3]
    signatures = {"node-0": one.members["node-0"].agree(everybody)} | {
        name: one.members[name].agree(others) for name in ("node-1", "node-2")
    }
    for name in others:
        with pytest.raises(WireError, match="told of other nodes"):
            one.members[name].reveal(signatures)


def test_signatures_of_fewer_than_the_threshold_open_nothing() -> None:
    one = Round(4)
    one.run(until="reveal")
    few = dict(list(one.server.signatures().items())[:2])
    with pytest.raises(WireError, match="2, but 3 are needed"):
        one.members["node-0"].reveal(few)


def test_a_signature_for_other_keys_opens_nothing() -> None:
    one = Round(4)
    one.run(until="reveal")
    signatures = one.server.signatures()
    view = view_of(one.terms, dict.fromkeys(one.names, b"other keys"))
    signatures["node-1"] = sign_set(view, one.names, one.names, one.keys["node-1"])
    with pytest.raises(WireError, match="told of other nodes"):
        one.members["node-0"].reveal(signatures)


@pytest.mark.parametrize(
    ("left", "why"),
    [
        (["node-0", "node-1"], "are needed"),
        (["node-1", "node-2", "node-3"], "not among them"),
        (["node-0", "node-1", "node-2", "node-9"], "not there before"),
        (["node-0", "node-1", "node-1"], "not there before"),
    ],
)
def test_a_node_signs_no_set_that_it_cannot_stand_by(left: list[str], why: str) -> None:
    one = Round(4)
    one.run(until="agree")
    with pytest.raises(WireError, match=why):
        one.members["node-0"].agree(left)


def test_a_node_masks_with_nobody_where_too_few_are_there() -> None:
    one = Round(4)
    one.run(until="mask")
    boxes = one.server.boxes()["node-0"]
    with pytest.raises(WireError, match="2, but 3 are needed"):
        one.members["node-0"].open(dict(list(boxes.items())[:1]))


def test_a_wrong_share_gives_no_sum() -> None:
    one = Round(4)
    one.run(until="reveal")
    signatures = one.server.signatures()
    for name in one.names:
        shares = one.members[name].reveal(signatures)
        if name == "node-0":
            shares["node-2"] = flipped(shares["node-2"], 40)
        one.server.revealed(name, shares)
    with pytest.raises(FederationError, match=r"secret of 'node-2' do not give it back"):
        one.server.total()


def test_the_server_takes_a_message_once_from_those_that_were_there_before() -> None:
    one = Round(4)
    one.run(until="mask")
    one.server.boxes()
    vector = np.zeros(24, np.uint32)
    one.server.masked("node-0", vector)
    for node, fault, why in (
        ("node-0", vector, "answers twice"),
        ("node-9", vector, "not there"),
        ("node-1", vector[:-1], "length and type"),
        ("node-1", vector.astype(np.int64), "length and type"),
    ):
        with pytest.raises(WireError, match=why):
            one.server.masked(node, fault)


def uniform(values: np.ndarray) -> bool:
    """Whether bytes look uniform: chi-square, 255 degrees, by Wilson and Hilferty."""
    counts = np.bincount(values.view(np.uint8), minlength=256)
    expected = values.view(np.uint8).size / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return statistic < 255 * (1 - 2 / (9 * 255) + 6.0 * math.sqrt(2 / (9 * 255))) ** 3


def test_what_server_and_too_few_nodes_see_of_a_vector_is_uniform() -> None:
    """They take off every mask that they share with the node; what is left says nothing of it."""
    one = Round(4, length=20_000)
    one.vectors["node-0"] = np.full(20_000, 7, np.int64)
    one.run(until="reveal")
    seen = one.masked["node-0"].copy()
    assert uniform(seen)
    colluding = ["node-1", "node-2"]  # below the threshold of 3
    for name in colluding:
        member = one.members[name]
        key = member._mask_pair.agreed(
            member._announced["node-0"].mask_key, purpose=b"mask", context=member._view
        )
        add_mask(seen, key, -1)
    assert uniform(seen)
    again = seen.copy()
    add_mask(again, one.members["node-0"]._seed, -1)  # with the seed: node-3's mask is left
    assert uniform(again)
    honest = one.members["node-3"]
    key = honest._mask_pair.agreed(
        honest._announced["node-0"].mask_key, purpose=b"mask", context=honest._view
    )
    add_mask(again, key, -1)
    np.testing.assert_array_equal(again, one.vectors["node-0"])
    assert not uniform(again)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.data())
@settings(deadline=None, max_examples=30)
def test_any_shares_as_many_as_the_threshold_give_the_secret(
    secret: bytes, threshold: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(threshold, 9))
    shares = dict(enumerate(split(secret, range(1, n + 1), threshold), 1))
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert combine({place: shares[place] for place in chosen}, threshold) == secret
    with pytest.raises(WireError, match="are needed"):
        combine({place: shares[place] for place in chosen[1:]}, threshold)


def test_fewer_shares_than_the_threshold_look_the_same_for_every_secret() -> None:
    for secret in (bytes(32), b"\xff" * 32):
        pairs = [split(secret, [1, 2, 3], 3) for _ in range(400)]
        # The first byte of 66 holds a single bit of the field.
        body = b"".join(share[1:] for shares in pairs for share in shares[:2])
        assert uniform(np.frombuffer(body, np.uint8))
        assert len({share for shares in pairs for share in shares}) == 1200


def test_fewer_shares_put_together_give_no_secret() -> None:
    secret = b"s" * 32
    shares = dict(zip([1, 2, 3], split(secret, [1, 2, 3], 3), strict=True))
    for pair in itertools.combinations(shares, 2):
        with pytest.raises(WireError, match="do not fit"):
            combine({place: shares[place] for place in pair}, 2)


def test_a_box_opens_only_for_its_receiver_and_its_view() -> None:
    box = seal(b"k" * 32, b"content", b"view")
    assert unseal(b"k" * 32, box, b"view") == b"content"
    for key, about in ((b"l" * 32, b"view"), (b"k" * 32, b"another")):
        with pytest.raises(WireError):
            unseal(key, box, about)


def test_a_public_key_that_agrees_on_nothing_is_refused() -> None:
    with pytest.raises(WireError, match="is none"):
        KeyPair().agreed(bytes(32), purpose=b"mask", context=b"")


def test_no_secret_is_in_a_repr() -> None:
    pair = KeyPair()
    assert repr(pair.secret)[2:10] not in repr(pair)


@pytest.mark.parametrize(("n", "threshold"), [(1, 1), (4, 2), (4, 5), (5, 2), (2, 1)])
def test_terms_that_protect_nobody_are_refused(n: int, threshold: int) -> None:
    with pytest.raises(FederationError):
        Round(n, threshold)


def test_the_default_threshold_stands_a_third_lost_or_lying() -> None:
    for n in range(2, 200):
        t = threshold_for(n)
        assert 3 * t > 2 * n >= 3 * (t - 1)
        assert 2 * t > n + colluders(n, t)
        assert colluders(n, t) >= (n - 1) // 3


def test_parts_cross_the_wire_and_nothing_else_does() -> None:
    terms = Round(3).terms
    parts = {"node-0": b"a", "node-2": b"bc"}
    config = dict(to_config("share", terms.request, parts))
    assert from_config(config, "share", terms) == parts
    for change in (
        {"stage": "mask"},
        {"request": "cd" * 16},
        {"names": ["node-2", "node-0"]},
        {"names": ["node-0", "node-0"]},
        {"names": ["node-0", "node-9"]},
        {"names": ["node-0"]},
        {"names": [1, 2]},
        {"names": "node-0"},
        {"parts": ["a", "b"]},
        {"more": 1},
    ):
        with pytest.raises(WireError):
            from_config(config | change, "share", terms)
    assert isinstance(to_config("share", terms.request, parts), ConfigRecord)


# ---- updates on a lattice


def steps_of(lattice: Lattice, values: np.ndarray, stream: NoiseStream) -> np.ndarray:
    return lattice.whole(values, rounding=stream, noise=stream)


def update(length: int, norm: float, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=length)
    return np.asarray(values * (norm / np.linalg.norm(values)))


@given(st.integers(1, 300), st.floats(1e-3, 1e3), st.integers(2, 200), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_no_rounded_update_is_longer_than_the_reach(
    length: int, clip_norm: float, nodes: int, seed: int
) -> None:
    lattice = Lattice.of(clip_norm=clip_norm, length=length, nodes=nodes)
    steps = steps_of(lattice, update(length, clip_norm, seed), NoiseStream(b"s" * 32, "noise"))
    assert sum(int(step) ** 2 for step in steps) <= lattice.reach**2
    assert nodes * lattice.reach < 2**31


def test_rounding_is_unbiased() -> None:
    lattice = Lattice.of(clip_norm=1.0, length=40_000, nodes=100_0)
    value = np.full(40_000, 0.3 / lattice.scale)
    steps = steps_of(lattice, value, NoiseStream(b"r" * 32, "noise"))
    assert set(steps.tolist()) == {0, 1}
    assert abs(float(steps.mean()) - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 40_000)


@pytest.mark.parametrize("lost", [0, 2])
def test_the_sum_has_the_declared_noise_whoever_is_lost(lost: int) -> None:
    """Of 5 nodes 3 must be enough: what more there are adds noise, never too little."""
    length, n, needed, sigma, clip = 40_000, 5, 3, 2.5, 0.4
    lattice = Lattice.of(
        clip_norm=clip, length=length, nodes=n, noise_multiplier=sigma, noise_nodes=needed
    )
    total = np.zeros(length, np.uint32)
    for i in range(n - lost):
        stream = NoiseStream(bytes([i]) * 32, "noise")
        total += steps_of(lattice, np.zeros(length), stream).astype(np.uint32)
    declared = sigma * clip * math.sqrt((n - lost) / needed)
    ratio = float(np.square(lattice.real(total)).mean()) / declared**2
    more = 1 + 2 * lattice.coarseness
    assert abs(ratio - more) < 4.5 * math.sqrt(2 / length)
    assert needed * lattice.sigma**2 - 16 >= (sigma * lattice.reach) ** 2


def test_an_update_survives_the_lattice_and_the_masks() -> None:
    n, length = 4, 24
    lattice = Lattice.of(clip_norm=1.0, length=length, nodes=n)
    one = Round(n, length=length)
    updates = {name: update(length, 1.0, i) for i, name in enumerate(one.names)}
    for i, name in enumerate(one.names):
        one.vectors[name] = steps_of(lattice, updates[name], NoiseStream(bytes([i]) * 32, "noise"))
    total = one.run({"node-1": 2})
    assert total is not None
    expected = sum(value for name, value in updates.items() if name != "node-1")
    np.testing.assert_allclose(lattice.real(total), expected, atol=n / lattice.scale)


@pytest.mark.parametrize("fault", [1.001, math.nan, math.inf])
def test_an_update_that_is_not_clipped_is_not_cut_into_steps(fault: float) -> None:
    lattice = Lattice.of(clip_norm=1.0, length=1, nodes=3)
    with pytest.raises(PrivacyError, match="must be clipped"):
        steps_of(lattice, np.array([fault]), NoiseStream(b"s" * 32, "noise"))


def test_a_lattice_that_would_be_too_coarse_is_refused() -> None:
    with pytest.raises(PrivacyError, match="too coarse"):
        Lattice.of(clip_norm=1.0, length=10**6, nodes=1000, noise_multiplier=1e5)
