"""Each test of a kernel runs with those for this processor, and with those for a lesser one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedfuse.kernels import normals, norms, products, tokens
from tests.kernels.levels import LEVELS, load


@pytest.fixture(params=LEVELS or ["none"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of what the kernels are compiled for. Skips where there are none."""
    if not LEVELS:
        pytest.skip("the kernels are not compiled here")
    users = (normals, norms, products, tokens)
    calls = [module._call for module in users]
    for module in users:
        monkeypatch.setattr(module, "library", lambda source: load(source, request.param))
    for call in calls:
        call.cache_clear()
    yield request.param
    for call in calls:
        call.cache_clear()
