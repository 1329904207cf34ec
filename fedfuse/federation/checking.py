"""A run's model, looked at on made-up records before anything is reserved or read."""

from __future__ import annotations

from weakref import WeakSet

import torch

from fedfuse.batch import Schema
from fedfuse.config import RunConfig
from fedfuse.models.made import made_batch
from fedfuse.privacy.safety import Finding, check, refuse
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.train import Trainer

__all__ = ["check_trainer"]

_ROWS = 3
_checked: WeakSet[Trainer] = WeakSet()


def check_trainer(
    trainer: Trainer, config: RunConfig, schema: Schema, mechanism: Mechanism | None
) -> tuple[Finding, ...]:
    """What is worth knowing about the model; nothing the second time.

    A bound on what one record does to a gradient is needed where records or subjects are the unit;
    a node's whole update is bounded whatever its model does. Raises ModelError where the model
    would break it.
    """
    if mechanism is None or mechanism.unit is Unit.NODE or trainer in _checked:
        return ()
    made = made_batch(schema, _ROWS, vocabulary=config.data.vocabulary, model=trainer.model).to(
        trainer.device
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # three records are too few for more: they would wait for each other
    try:
        found = check(trainer.model, made, trainer.loss, clipping=config.privacy.clipping)
    finally:
        torch.set_num_threads(threads)
    refuse(found)
    _checked.add(trainer)
    return found
