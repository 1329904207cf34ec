"""Reading a line: the fast way takes nothing that the thorough way would not take alike."""

from __future__ import annotations

import hashlib
import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from fedfuse.errors import LedgerError
from fedfuse.privacy.chain import Chain, Entry, Kind
from fedfuse.privacy.spec import Mechanism, Unit
from tests.privacy.ledgers import SERVER

plain = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'))
names = st.one_of(plain, st.text(max_size=20)).filter(lambda text: text.isprintable())
floats = st.floats(1e-9, 1.0, exclude_min=True)
mechanisms = st.builds(
    Mechanism,
    unit=st.sampled_from([Unit.RECORD, Unit.SUBJECT, Unit.NODE]),
    sample_rate=floats,
    noise_multiplier=st.floats(1e-3, 1e3),
    clip_norm=floats,
    steps=st.integers(1, 10**9),
)


def begun() -> Chain:
    chain = Chain("ledger")
    chain.take(chain.open_line(id="0" * 32, node="clinic-a", key=None))
    return chain


def sealed(core: bytes) -> bytes:
    """A line that has its hash, whatever it says."""
    whole = core[:-1] + b',"sig":""'
    digest = hashlib.sha256(whole + b"}").hexdigest()
    return whole + b',"hash":"' + digest.encode() + b'"}'


def agreed(chain: Chain, line: bytes) -> Entry | None:
    """What both ways say of a line; None where it is refused."""
    fast = chain._usual(line)
    try:
        slow = chain._any(line)
    except LedgerError:
        assert fast is None
        return None
    assert fast in (None, slow)
    assert chain.read(line) == slow
    return slow


@settings(max_examples=100, deadline=None)
@given(names, names, names, names, names, mechanisms, st.integers(0, 10**12))
def test_each_line_reads_the_same_in_both_ways(
    dataset: str, run: str, server: str, node: str, request: str, what: Mechanism, round: int
) -> None:
    chain, said = begun(), {"dataset": dataset, "run": run, "server": server, "node": node}
    fast = all(text.isascii() and not set(text) & set('"\\') for text in (*said.values(), request))
    for kind, mechanism, of in (
        (Kind.RESERVED, what, -1),
        (Kind.COMMITTED, None, 1),
        (Kind.IMPORTED, what, -1),
    ):
        line = chain.next_line(
            kind, **said, request=request, round=round, mechanism=mechanism, of=of, key=None
        )
        found = agreed(chain, line)
        assert found is not None
        assert (found.dataset, found.run, found.server, found.node) == tuple(said.values())
        assert (found.request, found.round, found.mechanism) == (request, round, mechanism)
        assert (chain._usual(line) is not None) == fast
        chain.take(line)


WORK = {"dataset": "scans", "run": "run-1", "server": SERVER, "node": "a", "round": 12}
WHAT = Mechanism(unit=Unit.RECORD, sample_rate=0.25, noise_multiplier=1.5, clip_norm=1.0, steps=10)


def usual(chain: Chain) -> bytes:
    """The core of a line that is read fast."""
    line = chain.next_line(Kind.RESERVED, **WORK, request="r1", mechanism=WHAT, key=None)
    assert chain._usual(line)
    return line[: line.index(b',"sig"')] + b"}"


@pytest.mark.parametrize(
    ("old", "new", "good"),
    [
        (b'"run":"run-1"', b'"run":"\\u0072un-1"', False),
        (b'"run":"run-1"', b'"run":"r\\u00fcn-1"', True),
        (b'"run":"run-1"', b'"run":"r\\u00FCn-1"', False),
        (b'"run":"run-1"', b'"run":"run\\/1"', False),
        (b'"run":"run-1"', b'"run":"run\\"1"', True),
        (b'"run":"run-1"', b'"run":"run\\u007f"', False),
        (b'"run":"run-1"', b'"run":"run\x7f"', False),
        (b'"run":"run-1"', b'"run":"run\xff"', False),
        (b'"run":"run-1"', b'"run":"' + b"x" * 257 + b'"', False),
        (b'"run":"run-1"', b'"run":"' + b"x" * 256 + b'"', True),
        (b'"run":"run-1"', b'"run":"run-1","run":"run-1"', False),
        (b'"run":"run-1",', b"", False),
        (b'"round":12', b'"round":012', False),
        (b'"round":12', b'"round":12.0', False),
        (b'"round":12', b'"round":1e1', False),
        (b'"round":12', b'"round":-1', False),
        (b'"round":12', b'"round":-0', False),
        (b'"round":12', b'"round": 12', False),
        (b'"round":12', b'"round":123456789012345678901234567890', True),
        (b'"number":1', b'"number":2', False),
        (b'"number":1', b'"number":01', False),
        (b'"of":-1', b'"of":0', False),
        (b'"kind":"reserved"', b'"kind":"committed"', False),
        (b'"kind":"reserved"', b'"kind":"imported"', True),
        (b'"kind":"reserved"', b'"kind":"opened"', False),
        (b'"steps":10', b'"steps":10.0', False),
        (b'"steps":10', b'"steps":0', False),
        (b'"steps":10', b'"steps":1e1', False),
        (b'"sample_rate":0.25', b'"sample_rate":0.250', False),
        (b'"sample_rate":0.25', b'"sample_rate":1', False),
        (b'"sample_rate":0.25', b'"sample_rate":NaN', False),
        (b'"sample_rate":0.25', b'"sample_rate":"0.25"', False),
        (b'"unit":"record"', b'"unit":"nobody"', False),
        (b'"unit":"record"', b'"unit":"record","unit":"record"', False),
        (b'"unit":"record"', b'"unit":"record","zeal":{}', False),
        (b'"mechanism":{', b'"mechanism":{"a":1,', False),
        (b'"prev":"', b'"prev":"f', False),
    ],
)
def test_another_way_to_write_a_line_is_refused_in_both_ways(
    old: bytes, new: bytes, good: bool
) -> None:
    """Else the same history could have two heads."""
    chain = begun()
    core = usual(chain)
    assert old in core
    assert (agreed(chain, sealed(core.replace(old, new, 1))) is not None) == good


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_change_at_random_parts_the_two_ways(data: st.DataObject) -> None:
    """Bytes are put in, taken out and overwritten, and the hash made to fit."""
    chain = begun()
    core = bytearray(usual(chain))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(1, len(core) - 2))
        piece = data.draw(
            st.one_of(
                st.binary(max_size=3),
                st.sampled_from(
                    [b'"', b"\\", b"0", b"9", b".", b"-", b"e", b" ", b"}", b"{", b","]
                ),
            )
        )
        core[at : at + data.draw(st.integers(0, 2))] = piece
    found = agreed(chain, sealed(bytes(core)))
    if found is not None:
        assert json.loads(bytes(core))["round"] == found.round
