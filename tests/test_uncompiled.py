"""Training without torch's compiler: the same numbers, and it is not loaded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fedfuse import uncompiled

USES = """
import sys
import torch
from fedfuse.batch import Kind, Modality, Schema, Target, TargetKind
from fedfuse.models.model import build_model, count_parameters
from fedfuse.models.spec import ModelConfig
from fedfuse.train import Job, Trainer, optimizer_of

schema = Schema(
    modalities=(
        Modality(name="image", kind=Kind.IMAGE, shape=(1, 16, 16)),
        Modality(name="text", kind=Kind.TEXT, shape=(8,)),
    ),
    target=Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b")),
)
for learned in (True, False):
    config = ModelConfig(dim=8, learned_words=learned)
    model = build_model(schema, config, vocabulary=64)
    counted = count_parameters(schema, config, vocabulary=64)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
for name in ("sgd", "adam"):
    job = Job(steps=1, optimizer=name, learning_rate=0.1, momentum=0.9)
    optimizer = optimizer_of(list(model.parameters()), job)
    optimizer.zero_grad()
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
print([name for name in ("torch._dynamo", "sympy", "opacus") if name in sys.modules])
"""


def test_neither_counting_nor_an_optimizer_loads_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", USES], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("ours", "torchs", "settings"),
    [
        (uncompiled.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (uncompiled.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_the_optimizers_step_as_torchs_do(ours: Any, torchs: Any, settings: dict[str, Any]) -> None:
    weights = {}
    for kind in (ours, torchs):
        torch.manual_seed(5)
        weight = nn.Parameter(torch.randn(7, 3))
        optimizer = kind([weight], lr=0.1, fused=True, **settings)
        for _ in range(4):
            optimizer.zero_grad()
            (weight * torch.randn(7, 3)).sum().backward()
            optimizer.step()
        assert weight.requires_grad
        weights[kind] = weight.detach()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert torch.equal(weights[ours], weights[torchs])
    assert torch.is_grad_enabled()
