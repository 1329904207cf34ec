"""Imported by the process that workers are forked from, so that they start with all of it loaded.

The accountant loads its libraries on first use, so it is used once.
"""

from fedfuse.federation import worker
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.undocumented import undocumented

__all__ = ["worker"]

_ANY = Mechanism(unit=Unit.RECORD, sample_rate=0.5, noise_multiplier=20.0, clip_norm=1.0, steps=1)
with undocumented():
    accounting.within([_ANY], 1.0, 1e-5)
