"""The example of docs/extending.md works as it stands, and keeps what an operator must keep."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedfuse.data.demo import make_demo
from fedfuse.models import fusion
from fedfuse.models.model import build_model
from fedfuse.models.spec import FUSIONS, ModelConfig
from tests.privacy import test_clipping as clipping

ROOT = Path(__file__).parents[1]
FILE, LINE = re.findall(
    r"```python\n# (?:\S+/largest\.py|the line in [^\n]*)\n(.*?)```",
    ROOT.joinpath("docs", "extending.md").read_text(encoding="utf-8"),
    flags=re.DOTALL,
)


@pytest.fixture
def largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file lies where the package looks for files; the line is in the dict."""
    tmp_path.joinpath("largest.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(fusion, "__path__", [*fusion.__path__, str(tmp_path)])
    name, place = re.findall(r'"(.*?)"', LINE)
    monkeypatch.setitem(FUSIONS, name, place)


@pytest.mark.usefixtures("largest")
def test_the_operator_of_the_page_is_its_formula() -> None:
    operator = fusion.build_fusion(
        fusion.Place(modalities=3, outputs=2, config=ModelConfig(dim=4, fusion="largest"))
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


TRAIN = """
import sys
import numpy as np
import torch
from fedfuse.config import RunConfig
from fedfuse.data.prepare import prepare
from fedfuse.models.model import build_model
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.tasks import Task
from fedfuse.train import Job, Trainer

config = RunConfig().with_values({"model.fusion": "largest", "data.manifest": sys.argv[1]})
prepared = prepare(config.data, seed=0)
model = build_model(prepared.schema, config.model)
trainer = Trainer(model, Task.of(prepared.schema.target).loss, torch.device("cpu"))
before = trainer.weights()
mechanism = Mechanism(
    unit=Unit.RECORD, sample_rate=0.5, noise_multiplier=1.0, clip_norm=1.0, steps=2
)
job = Job(
    steps=2, optimizer="sgd", learning_rate=0.1, momentum=0.0, expected_batch=20.0,
    mechanism=mechanism,
)
trainer.run(prepared.train, job, secret=bytes(32))
after = trainer.weights()
moved = [name for name in after if not np.array_equal(before[name], after[name])]
print(type(model.fusion).__name__, *moved)
"""


def test_one_file_and_one_line_are_all_that_a_private_run_needs(tmp_path: Path) -> None:
    """In a copy of the package: the file is written, the line is added, nothing else is touched."""
    manifest = make_demo(tmp_path / "demo", records=60, clients=2)
    copy = tmp_path / "copy" / "fedfuse"
    shutil.copytree(ROOT / "fedfuse", copy)
    copy.joinpath("models/fusion/largest.py").write_text(FILE, encoding="utf-8")
    spec = copy / "models/spec.py"
    text = spec.read_text(encoding="utf-8")
    assert text.count("FUSIONS = {\n") == 1
    spec.write_text(text.replace("FUSIONS = {\n", f"FUSIONS = {{\n{LINE}"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(manifest)],
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, *moved = done.stdout.split()
    assert name == "LargestFusion"
    assert {"fusion.scale.weight", "fusion.scale.bias", "encoders.0.project.weight"} <= set(moved)
