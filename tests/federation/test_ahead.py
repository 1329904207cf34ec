"""What a run needs at its end is there by then."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fedfuse.federation.ahead import Ahead
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism, Unit

ROUND = Mechanism(unit=Unit.RECORD, sample_rate=0.173, noise_multiplier=1.7, clip_norm=1.0, steps=3)
WHOLE = replace(ROUND, steps=15)


def session(mechanism: Mechanism | None, first: int = 1) -> Any:
    past = [] if first == 1 else [(replace(ROUND, steps=3 * (first - 1)),)]
    return SimpleNamespace(
        mechanism=mechanism,
        first=first,
        last=5,
        spent=SimpleNamespace(histories=lambda: past),
        config=SimpleNamespace(privacy=SimpleNamespace(delta=1e-5)),
    )


@pytest.mark.parametrize("first", [1, 3])
def test_the_statement_of_the_whole_run_is_computed_before(first: int) -> None:
    accounting._epsilon_pld.cache_clear()
    called = []
    Ahead(session(ROUND, first), lambda: called.append(threading.current_thread())).wait()
    known = accounting._epsilon_pld.cache_info()
    accounting.epsilon([WHOLE], 1e-5)
    after = accounting._epsilon_pld.cache_info()
    assert (after.hits, after.misses) == (known.hits + 1, known.misses)
    assert called
    assert called[0] is not threading.main_thread()


def test_what_goes_wrong_ahead_does_not_go_wrong_there() -> None:
    def fails() -> None:
        raise MemoryError

    Ahead(session(None), fails).wait()
