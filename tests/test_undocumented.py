"""SciPy is loaded without its notes, and computes the same."""

from __future__ import annotations

import subprocess
import sys

_USES = """
import sys
from contextlib import nullcontext
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.undocumented import undocumented

plainly = sys.argv[1] == "plainly"
mechanism = Mechanism(
    unit=Unit.RECORD, sample_rate=0.1, noise_multiplier=1.1, clip_norm=1.0, steps=30
)
with nullcontext() if plainly else undocumented():
    print(accounting.within([mechanism], 8.0, 1e-5), accounting.calibrate(3.0, 1e-5, 0.1, 30))
print(accounting.epsilon([mechanism], 1e-5), accounting.epsilon_rdp([mechanism], 1e-5))
import scipy.signal
from scipy._lib import _array_api, _docscrape
assert _array_api.FunctionDoc is _docscrape.FunctionDoc
assert scipy.signal.convolve.__doc__.startswith("Convolve two N-dimensional arrays.")
print("Array API" in scipy.signal.convolve.__doc__, file=sys.stderr)
"""


def answers(way: str) -> tuple[str, bool]:
    done = subprocess.run([sys.executable, "-c", _USES, way], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr == "True\n"


def test_without_its_notes_scipy_computes_the_same() -> None:
    plain, noted = answers("plainly")
    quick, noted_too = answers("quickly")
    assert plain == quick
    assert plain.startswith("True ")
    assert noted
    assert not noted_too
