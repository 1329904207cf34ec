"""The example of docs/extending.md works as it stands, and keeps what an operator must keep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse.models import fusion, spec
from fedfuse.models.model import build_model
from fedfuse.models.spec import ModelConfig
from tests.privacy import test_clipping as clipping

TEXT = Path(__file__).parents[1].joinpath("docs", "extending.md").read_text(encoding="utf-8")


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what the page says: the file, the line in the dict, the name in the list."""
    operators = dict(fusion.OPERATORS)
    monkeypatch.setattr(fusion, "OPERATORS", operators)
    monkeypatch.setattr(spec, "FUSIONS", (*spec.FUSIONS, "largest"))
    scope: dict[str, Any] = {"OPERATORS": operators, "__name__": "largest"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(block, scope)


@pytest.mark.usefixtures("largest")
def test_the_operator_of_the_page_is_its_formula() -> None:
    operator = fusion.OPERATORS["largest"](
        fusion.Place(modalities=3, outputs=2, config=ModelConfig(dim=4))
    )
    z, seen = torch.randn(3, 3, 4), torch.tensor([[True] * 3, [False, True, False], [False] * 3])
    out = operator(z, seen)
    scaled = operator.scale(z)
    torch.testing.assert_close(out[0], scaled[0].max(0).values)
    torch.testing.assert_close(out[1], scaled[1, 1])
    assert not out[2].any()


@pytest.mark.usefixtures("largest")
def test_the_operator_of_the_page_is_safe_to_train_privately() -> None:
    config = ModelConfig(fusion="largest", dim=8, head_width=6)
    model = build_model(clipping.SCHEMA, config, vocabulary=20).double()
    batch = clipping.batch_of(6, seed=1)
    clipping.assert_same(
        clipping.clipped_sum(model, batch, 0.3), clipping.oracle(model, batch, 0.3)
    )
