"""Ledgers to try things on, and what somebody without fedfuse could do to their files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedfuse.errors import BudgetExceeded
from fedfuse.privacy.ledger import Entry, Kind, Ledger
from fedfuse.privacy.spec import Mechanism, Unit

Tree = dict[str, Any]
SERVER = "5e" * 32


def mechanism(steps: int = 4, *, q: float = 0.25, sigma: float = 1.0, C: float = 1.0) -> Mechanism:
    return Mechanism(
        unit=Unit.RECORD, sample_rate=q, noise_multiplier=sigma, clip_norm=C, steps=steps
    )


def up_to(
    limit: int, steps: int, *, slowly_s: float = 0.0
) -> Callable[[tuple[Mechanism, ...]], None]:
    """Allows `steps` more where that makes at most `limit`: a budget that is quick to compute.

    slowly_s   how long it takes: those who do not wait for each other then meet
    """

    def allow(history: tuple[Mechanism, ...]) -> None:
        time.sleep(slowly_s)
        spent = sum(mechanism.steps for mechanism in history)
        if spent + steps > limit:
            raise BudgetExceeded(f"{spent} + {steps} steps are more than {limit}")

    return allow


def anything(history: tuple[Mechanism, ...]) -> None:
    """Allows all."""


def spend(
    ledger: Ledger,
    request: str,
    *,
    dataset: str = "scans",
    what: Mechanism | None = None,
    run: str = "run-1",
    server: str = SERVER,
    round: int = 1,
    allow: Callable[[tuple[Mechanism, ...]], None] = anything,
) -> Entry:
    return ledger.reserve(
        dataset,
        what or mechanism(),
        run=run,
        server=server,
        node="clinic-a",
        round=round,
        request=request,
        allow=allow,
    )


def fill(ledger: Ledger, rounds: int = 3, *, start: int = 1) -> None:
    """Spends on `rounds` rounds, and commits all but the last."""
    for number in range(start, start + rounds):
        entry = spend(ledger, f"request-{number}", round=number)
        if number < start + rounds - 1:
            ledger.commit(entry)


def lines_of(path: Path) -> list[bytes]:
    """A ledger's lines, with their ends."""
    return path.read_bytes().splitlines(keepends=True)


def trees_of(path: Path) -> list[Tree]:
    return [json.loads(line) for line in lines_of(path)]


def write_anew(path: Path, trees: Sequence[Tree], key: Path | None = None) -> None:
    """Writes lines that hold together, by what docs/ledger.md says and without fedfuse.

    They are signed with `key`; without one, signatures stay as they were.
    """
    private: Any = load_pem_private_key(key.read_bytes(), None) if key else None
    head, lines = "0" * 64, []
    for number, tree in enumerate(trees):
        tree = {**tree, "number": number, "prev": head}
        signature = tree.pop("sig")
        tree.pop("hash")
        core = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        if private:
            signature = private.sign(b"fedfuse ledger line\0" + core.encode()).hex()
        sealed = f'{core[:-1]},"sig":"{signature}"'
        head = hashlib.sha256((sealed + "}").encode()).hexdigest()
        lines.append(f'{sealed},"hash":"{head}"}}\n')
    path.write_text("".join(lines), encoding="ascii")


def spent(path: Path) -> int:
    """The steps in a ledger's file, counted without fedfuse."""
    kinds = (Kind.RESERVED.value, Kind.IMPORTED.value)
    return sum(tree["mechanism"]["steps"] for tree in trees_of(path) if tree["kind"] in kinds)
