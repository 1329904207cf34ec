"""`python -m fedfuse` is the command `fedfuse`."""

from __future__ import annotations

from fedfuse.cli import run

run()
