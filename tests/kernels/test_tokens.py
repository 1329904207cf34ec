"""The compiled norms of an embedding's gradients are those of autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.kernels import threads as threads_of
from fedfuse.kernels import tokens
from fedfuse.kernels.tokens import fits, token_squares


@settings(max_examples=80, deadline=None)
@given(
    records=st.integers(0, 4), places=st.integers(0, 40), width=st.integers(1, 1100),
    kinds=st.integers(1, 50), threads=st.integers(1, 3),
)  # fmt: skip
def _agree(records: int, places: int, width: int, kinds: int, threads: int) -> None:
    torch.manual_seed(0)
    # Tokens far from each other, of which many may fall on the same place of a table.
    ids = torch.randint(0, kinds, (records, places)) * 2**40 - 3
    g = torch.randn(records, places, width)
    expected = torch.zeros(records, dtype=torch.float64)
    for i in range(records):
        for token in ids[i].unique():
            expected[i] += g[i, ids[i] == token].double().sum(0).square().sum()
    assert fits(ids, g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(threads_of, "_WORTH_SHARING", 0)
        found = token_squares(ids, g)
    assert found.shape == (records,)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_rows_of_equal_tokens_are_added_up_first(level: str) -> None:
    _agree()


def test_a_record_that_is_not_finite_touches_no_other(level: str) -> None:
    ids, g = torch.tensor([[5, 5], [7, 8]]), torch.ones(2, 2, 3)
    g[0, 1, 1] = float("nan")
    found = token_squares(ids, g)
    assert not torch.isfinite(found[0])
    assert found[1] == 6


def test_other_numbers_are_left_to_torch(level: str) -> None:
    ids, g = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 4)
    assert fits(ids, g)
    assert not fits(ids, g.double())
    assert not fits(ids.int(), g)
    assert not fits(ids, g.transpose(1, 2))


def test_memory_that_is_missing_is_an_error(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_call", lambda: lambda *_: 1)
    with pytest.raises(MemoryError, match="no memory for the arithmetic"):
        token_squares(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1))
