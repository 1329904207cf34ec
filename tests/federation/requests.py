"""A request as a server makes it, to change and try things on."""

from __future__ import annotations

from typing import Any

from fedfuse.federation.wire import TrainRequest, encode
from fedfuse.train import Job

JOB = Job(steps=4, optimizer="sgd", learning_rate=0.1, momentum=0.9)


def a_request(**changes: Any) -> TrainRequest:
    """A request whose every field can be given."""
    values: dict[str, Any] = {
        "run": "a" * 32,
        "request": "b" * 32,
        "round": 1,
        "rounds": 1,
        "deadline": 0.0,
        "digest": "d" * 64,
        "task": "classification",
        "modalities": ("left", "right"),
        "parameters": 7,
        "job": JOB,
        "arrays": encode({}),
    }
    return TrainRequest(**values | changes)
