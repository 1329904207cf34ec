"""A certificate: what was released and what it is claimed to cost, for others to check.

    {"format": …, "sections": [ … ], "public_key": "…", "signature": "…"}

JSON. The signature is Ed25519 (RFC 8032) over the tree without `signature`, written with sorted
keys, no spaces, ASCII, numbers as Python's `repr` writes them. It covers all else, the public key
included. A certificate without a key has both fields empty, and shows nothing about its origin.

Torch-free, and without dp-accounting: it can be read where neither is installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fedfuse import __version__
from fedfuse.errors import CertificateError, PrivacyError

if TYPE_CHECKING:
    from fedfuse.privacy.signing import SigningKey
    from fedfuse.reports.facts import Account, Facts

__all__ = ["FORMAT", "PURPOSE", "Tree", "certify", "parse", "signed_part", "text"]

Tree = dict[str, Any]
FORMAT = "fedfuse privacy certificate"
VERSION = 1
PURPOSE = "certificate"
LARGEST = 64 * 2**20
THINNED = 16
"""Of a profile's points, one in so many."""

_MAYBE = (float, type(None))
_RELEASE = {
    "unit": str,
    "sample_rate": float,
    "noise_multiplier": float,
    "clip_norm": float,
    "count_noise": float,
    "steps": int,
    "lines": int,
}
_ACCOUNT = {
    "role": str,
    "name": str,
    "unit": str,
    "allowed": _MAYBE,
    "reserved": int,
    "epsilon": float,
    "epsilon_rdp": float,
    "gdp_mu": _MAYBE,
    "profile": [[float]],
    "releases": [_RELEASE],
}
_STATEMENT = {"against": str, "unit": str, "role": str, "epsilon": _MAYBE, "why": str}
_ASSUMPTION = {"text": str, "verdict": str, "evidence": str}
_LEDGER = {"id": str, "node": str, "head": str, "lines": int, "public_key": str}
_FILE = {"name": str, "sha256": str}
_SECTION = {
    "kind": str,
    "name": str,
    "statement": str,
    "neighbouring_relation": str,
    "delta": float,
    "statements": [_STATEMENT],
    "accounts": [_ACCOUNT],
    "accountant": {"name": str, "version": str, "grid": float, "curve_grid": float},
    "assumptions": [_ASSUMPTION],
    "problems": [str],
    "ledgers": [_LEDGER],
    "files": [_FILE],
}
_CERTIFICATE = {
    "format": str,
    "version": int,
    "fedfuse": str,
    "time": str,
    "sections": [_SECTION],
    "public_key": str,
    "signature": str,
}


def certify(sections: Sequence[Facts], *, now: datetime, key: SigningKey | None = None) -> Tree:
    """The certificate of `sections`, signed where there is a `key`.

    Raises PrivacyError where one of them promises nothing, or no finite figure holds.
    """
    for section in sections:
        if not section.private:
            raise PrivacyError(
                "NOT PRIVATE: nothing is promised, so there is nothing to certify",
                where=section.name,
                hint="leave this run out, or run it with a privacy.unit",
            )
        for account in section.accounts:
            if not math.isfinite(account.figures.epsilon + account.figures.rdp):
                raise PrivacyError(
                    f"{account.name}: no finite epsilon holds at delta = {section.delta:g}",
                    where=section.name,
                    hint="take a larger delta",
                )
    tree: Tree = {
        "format": FORMAT,
        "version": VERSION,
        "fedfuse": __version__,
        "time": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "sections": [_section(section) for section in sections],
        "public_key": key.public if key else "",
    }
    return tree | {"signature": key.sign(signed_part(tree), purpose=PURPOSE) if key else ""}


def text(tree: Tree) -> str:
    """The certificate as it is written to a file."""
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def parse(data: bytes, *, where: str) -> Tree:
    """The certificate in a file, whole in form; nothing that it says is checked.

    Raises CertificateError.
    """
    try:
        if len(data) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST} bytes")
        tree = json.loads(data, object_pairs_hook=_once, parse_constant=_refused)
        if isinstance(tree, dict) and tree.get("format") == FORMAT and tree["version"] != VERSION:
            raise ValueError(f"its version is {tree['version']!r}, but {VERSION} is known here")
        _check(tree, _CERTIFICATE, "")
        if tree["format"] != FORMAT:
            raise ValueError(f"its format is {tree['format']!r}")
    except (ValueError, KeyError, RecursionError) as error:
        raise CertificateError(
            f"it is not a certificate: {' '.join(str(error).split())[:300]}",
            where=where,
            hint="`fedfuse report privacy` writes one",
        ) from None
    return dict(tree)


def signed_part(tree: Mapping[str, Any]) -> bytes:
    """What the signature covers: all but itself."""
    rest = {name: value for name, value in tree.items() if name != "signature"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _section(facts: Facts) -> Tree:
    from importlib.metadata import version

    from fedfuse.privacy.accounting import STATEMENT_GRID
    from fedfuse.reports.figures import CURVE_GRID
    from fedfuse.reports.statement import RELATION

    return {
        "kind": facts.kind,
        "name": facts.name,
        "statement": facts.sentence,
        "neighbouring_relation": RELATION,
        "delta": float(facts.delta),
        "statements": [asdict(one) | {"unit": one.unit.value} for one in facts.statements],
        "accounts": [_account(account) for account in facts.accounts],
        "accountant": {
            "name": "PLD (dp-accounting), pessimistic",
            "version": version("dp-accounting"),
            "grid": STATEMENT_GRID,
            "curve_grid": CURVE_GRID,
        },
        "assumptions": [asdict(one) | {"verdict": one.verdict.value} for one in facts.assumptions],
        "problems": list(facts.problems),
        "ledgers": [asdict(mark) for mark in facts.ledgers],
        "files": [{"name": name, "sha256": digest} for name, digest in facts.hashes],
    }


def _account(account: Account) -> Tree:
    from fedfuse.reports.facts import releases

    figures = account.figures
    pairs = list(zip(figures.profile.epsilons, figures.profile.deltas, strict=True))
    return {
        "role": account.role,
        "name": account.name,
        "unit": account.unit.value,
        "allowed": None if account.allowed is None else float(account.allowed),
        "reserved": account.reserved,
        "epsilon": figures.epsilon,
        "epsilon_rdp": figures.rdp,
        "gdp_mu": figures.mu if math.isfinite(figures.mu) else None,
        "profile": [list(pair) for pair in pairs[::THINNED]],
        "releases": [
            {k: float(v) if _RELEASE[k] is float else v for k, v in asdict(one).items()}
            for one in releases(account.mechanisms)
        ],
    }


def _once(pairs: list[tuple[str, Any]]) -> Tree:
    """An object's fields; one that says a thing twice says nothing."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("it has a field twice")
    return tree


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _check(value: Any, shape: Any, at: str) -> None:
    """Raises ValueError unless `value` has exactly the fields and types of `shape`."""
    where = at or "it"
    if isinstance(shape, dict):
        if not isinstance(value, dict) or set(value) != set(shape):
            raise ValueError(f"{where} must have {', '.join(shape)}, and nothing else")
        for name, inner in shape.items():
            _check(value[name], inner, f"{at}.{name}" if at else name)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list")  # noqa: TRY004
        for number, item in enumerate(value):
            _check(item, shape[0], f"{at}[{number}]")
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{where} must be of type {names}")
