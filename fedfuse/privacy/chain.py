"""What a line of a ledger is, and how each hangs on the one before it.

    core   {"dataset":"…", … ,"prev":"…", … ,"time":"…"}    JSON: keys in order, no spaces, ASCII
    sig    Ed25519 over the core, or empty
    hash   sha256 over core and sig: the `prev` of the next line

    line   core and then, inside its brace, ,"sig":"…","hash":"…"

Every byte of every line is thus covered by the last line's hash, and all but that hash and the
signature itself by the last line's signature. There is one way to write an entry: a line that says
the same in other bytes is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any

from fedfuse.errors import LedgerError, PrivacyError
from fedfuse.privacy import signing
from fedfuse.privacy.spec import Mechanism, Unit

__all__ = ["LONGEST", "Chain", "Entry", "Kind", "Opening"]

FORMAT = 1
LONGEST = 256
"""Characters in a name at the most: names come from servers, and lines are kept for ever."""
_START = b"0" * 64
_PURPOSE = "ledger line"
_SEAL = re.compile(rb'(\{.*),"sig":"((?:[0-9a-f]{128})?)","hash":"([0-9a-f]{64})"\}')
_PLAIN = rb'"([ !#-\[\]-~]{0,%d})"' % LONGEST  # no escapes: printable, and the same in JSON
_WHOLE = rb"(-1|0|[1-9][0-9]{0,15})"
_USUAL = re.compile(
    rb'\{"dataset":%b,"kind":"(reserved|committed|imported)","mechanism":(null|\{[^{}]*\}),'
    rb'"node":%b,"number":%b,"of":%b,"prev":"([0-9a-f]{64})","request":%b,"round":%b,"run":%b,'
    rb'"server":%b,"time":%b,"sig":"((?:[0-9a-f]{128})?)","hash":"([0-9a-f]{64})"\}'
    % (_PLAIN, _PLAIN, _WHOLE, _WHOLE, _PLAIN, _WHOLE, _PLAIN, _PLAIN, _PLAIN)
)
_SEALED = len(',"hash":""}') + 64
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)

_OPENING = {
    "format": int,
    "kind": str,
    "ledger": str,
    "node": str,
    "number": int,
    "prev": str,
    "public_key": str,
    "time": str,
}
_SPENDING = {
    "dataset": str,
    "kind": str,
    "mechanism": dict,
    "node": str,
    "number": int,
    "of": int,
    "prev": str,
    "request": str,
    "round": int,
    "run": str,
    "server": str,
    "time": str,
}
_COMMIT = _SPENDING | {"mechanism": type(None)}
_MECHANISM = {
    "clip_norm": float,
    "count_noise": float,
    "noise_multiplier": float,
    "sample_rate": float,
    "steps": int,
    "unit": str,
}


class Kind(StrEnum):
    """What a line says."""

    OPENED = "opened"
    """The first line: whose ledger it is."""
    RESERVED = "reserved"
    """From now on this is spent."""
    COMMITTED = "committed"
    """What was reserved has been done; what was spent does not change."""
    IMPORTED = "imported"
    """Spent, as another ledger says."""
    EXPOSED = "exposed"
    """The data set was read for a run that promises nothing: no figure holds for it any more."""


_KINDS = {kind.value.encode(): kind for kind in Kind}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a ledger."""

    number: int
    """0 for the first line, the opening."""
    time: str
    """RFC 3339, UTC, as the clock said. The order of the lines counts, not their times."""
    kind: Kind
    dataset: str
    mechanism: Mechanism | None
    """What is spent; None where the line spends nothing."""
    run: str
    server: str
    node: str
    round: int
    request: str
    of: int
    """Of a commit: the number of the reservation. Else -1."""
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the first line says."""

    id: str
    """Drawn at random when the ledger was made."""
    node: str
    public_key: str
    """Of the key that signs every line; empty where lines are not signed."""


class Chain:
    """The lines of one ledger, as read so far. Of all but the last it keeps the hashes."""

    def __init__(self, name: str) -> None:
        """`name`: what messages call the ledger."""
        self.name = name
        self.opening: Opening | None = None
        self._last = b""
        self._head = _START
        self._hashes = bytearray()

    @property
    def count(self) -> int:
        """How many lines there are."""
        return len(self._hashes) // 32

    @property
    def signature(self) -> str:
        """Of the last line; empty where lines are not signed."""
        seal = _SEAL.fullmatch(self._last)
        return seal[2].decode() if seal else ""

    @property
    def head(self) -> str:
        """The hash of the last line."""
        return self._head.decode()

    def hash_of(self, number: int) -> str:
        """The hash of a line that has been read."""
        return self._hashes[32 * number : 32 * number + 32].hex()

    def number_of(self, hash: str) -> int:
        """The number of the line with this hash; -1 where there is none."""
        wanted = bytes.fromhex(hash) if re.fullmatch("[0-9a-f]{64}", hash) else b"-"
        at = self._hashes.find(wanted)
        while at >= 0 and at % 32:
            at = self._hashes.find(wanted, at + 1)
        return at // 32 if at >= 0 else -1

    def fork(self) -> Chain:
        """A chain that begins with the same lines, and goes on by itself."""
        other = Chain(self.name)
        other.opening, other._last, other._head = self.opening, self._last, self._head
        other._hashes = bytearray(self._hashes)
        return other

    # ---- reading

    def take(self, line: bytes) -> Entry:
        """The entry in the next line, given without its end, which is now part of the chain.

        Raises LedgerError, which names the line, where it is not a line of a ledger, was changed,
        or does not follow the line before; the chain is then as it was.
        """
        entry = self.read(line)
        if entry.kind is Kind.OPENED:
            tree = json.loads(line)
            self.opening = Opening(
                id=tree["ledger"], node=tree["node"], public_key=tree["public_key"]
            )
        self._last, self._head = line, entry.hash.encode()
        self._hashes += bytes.fromhex(entry.hash)
        return entry

    def read(self, line: bytes) -> Entry:
        """What `take` finds in `line`; nothing is changed."""
        return self._usual(line) or self._any(line)

    def _usual(self, line: bytes) -> Entry | None:
        """The entry in most good lines, found fast. None of any other: `_any` decides on it."""
        found = _USUAL.fullmatch(line)
        if found is None or self.opening is None:
            return None
        dataset, kind, mechanism, node, number, of, prev, *rest = found.groups()
        request, round, run, server, time, signature, hash = rest
        spends, count = kind != b"committed", self.count
        if (
            hashlib.sha256(line[:-_SEALED] + b"}").hexdigest().encode() != hash
            or prev != self._head
            or int(number) != count
            or bool(signature) != bool(self.opening.public_key)
            or (of == b"-1") != spends
            or (mechanism != b"null") != spends
            or round == b"-1"
        ):
            return None
        try:
            what = _mechanism_in(mechanism) if spends else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, PrivacyError):
            return None
        return Entry(
            number=count,
            time=time.decode(),
            kind=_KINDS[kind],
            dataset=_interned(dataset),
            mechanism=what,
            run=_interned(run),
            server=_interned(server),
            node=_interned(node),
            round=int(round),
            request=request.decode(),
            of=int(of),
            hash=hash.decode(),
        )

    def _any(self, line: bytes) -> Entry:
        """The entry in any line, or what is wrong with it."""
        seal = _SEAL.fullmatch(line)
        if seal is None:
            raise self._broken("it is not a line of a ledger")
        core, signature, hash = seal[1] + b"}", seal[2].decode(), seal[3].decode()
        if hashlib.sha256(line[:-_SEALED] + b"}").hexdigest() != hash:
            raise self._broken("its hash does not fit its content: it was changed or damaged")
        try:
            tree = json.loads(core)
            if _CANONICAL.encode(tree).encode() != core:
                raise ValueError("it is not written as fedfuse writes it")
            return self._entry(tree, hash, signature)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._broken(f"it is not a line of a ledger: {error}") from None
        except PrivacyError as error:
            raise self._broken(error.what) from None

    def check_unfinished(self, rest: bytes) -> None:
        """Raises LedgerError unless `rest`, after the last line, is what a crash leaves of one.

        A write that is cut off leaves the beginning of a line. Where all of a line is there, and
        more that is not its end, somebody changed it.
        """
        seal = _SEAL.match(rest)
        if seal is not None and seal.end() < len(rest):
            raise self._broken("it does not end as a line does: it was changed or damaged")

    def check_signature(self) -> None:
        """Raises LedgerError unless the last line was signed by the key that the first one names.

        That line covers all others, so they need no check of their own. A ledger without a key
        passes.
        """
        opening = self.opening
        if opening is None or not opening.public_key:
            return
        seal = _SEAL.fullmatch(self._last)
        assert seal is not None  # it was taken
        core, signature = seal[1] + b"}", seal[2].decode()
        if not signing.verify(opening.public_key, core, signature, purpose=_PURPOSE):
            raise self._broken(
                "its signature is not that of the ledger's key", number=self.count - 1
            )

    def _entry(self, tree: dict[str, Any], hash: str, signature: str) -> Entry:
        if tree["prev"] != self.head:
            raise PrivacyError("it does not follow the line before: lines were changed or lost")
        if tree["number"] != self.count:
            raise PrivacyError(f"its number is {tree['number']}, but {self.count} comes next")
        kind = Kind(tree["kind"])
        if (kind is Kind.OPENED) != (self.count == 0):
            raise PrivacyError("a ledger is opened in its first line, and nowhere else")
        _check_shape(
            tree,
            {Kind.OPENED: _OPENING, Kind.COMMITTED: _COMMIT, Kind.EXPOSED: _COMMIT}.get(
                kind, _SPENDING
            ),
        )
        if kind is Kind.OPENED:
            if tree["format"] != FORMAT:
                raise PrivacyError(f"its format is {tree['format']}, but {FORMAT} is known here")
            signed = bool(_name(tree["public_key"], "public_key"))
            _name(tree["ledger"], "ledger")
        else:
            assert self.opening is not None  # there is a first line, and this is not it
            signed = bool(self.opening.public_key)
        if signed != bool(signature):
            raise PrivacyError("it is signed, or not, other than the first line says")
        mechanism, of = tree.get("mechanism"), tree.get("of", -1)
        if (of >= 0) != (kind is Kind.COMMITTED):
            raise PrivacyError(f"a line of kind {kind} cannot be of line {of}")
        return Entry(
            number=tree["number"],
            time=_name(tree["time"], "time"),
            kind=kind,
            dataset=_name(tree.get("dataset", ""), "dataset"),
            mechanism=_mechanism_of(mechanism),
            run=_name(tree.get("run", ""), "run"),
            server=_name(tree.get("server", ""), "server"),
            node=_name(tree["node"], "node"),
            round=tree.get("round", 0),
            request=_name(tree.get("request", ""), "request"),
            of=of,
            hash=hash,
        )

    # ---- writing

    def open_line(self, *, id: str, node: str, key: signing.SigningKey | None) -> bytes:
        """The first line of a ledger, without its end."""
        return self._line(
            {
                "format": FORMAT,
                "kind": Kind.OPENED.value,
                "ledger": id,
                "node": node,
                "public_key": key.public if key else "",
            },
            key,
        )

    def next_line(
        self,
        kind: Kind,
        *,
        dataset: str,
        mechanism: Mechanism | None,
        run: str,
        server: str,
        node: str,
        round: int,
        request: str,
        of: int = -1,
        key: signing.SigningKey | None,
    ) -> bytes:
        """The line that would come next, without its end; nothing is changed.

        Raises LedgerError where it could not be read again.
        """
        line = self._line(
            {
                "dataset": dataset,
                "kind": kind.value,
                "mechanism": None if mechanism is None else _plain(mechanism),
                "node": node,
                "of": of,
                "request": request,
                "round": round,
                "run": run,
                "server": server,
            },
            key,
        )
        try:
            self.read(line)
        except LedgerError as error:
            raise LedgerError(error.what, where=self.name) from None
        return line

    def _line(self, tree: dict[str, Any], key: signing.SigningKey | None) -> bytes:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        tree = tree | {"number": self.count, "prev": self.head, "time": now}
        core = _CANONICAL.encode(tree).encode()
        signature = key.sign(core, purpose=_PURPOSE) if key else ""
        sealed = core[:-1] + b',"sig":"' + signature.encode() + b'"'
        digest = hashlib.sha256(sealed + b"}").hexdigest()
        return sealed + b',"hash":"' + digest.encode() + b'"}'

    def _broken(self, what: str, number: int | None = None) -> LedgerError:
        line = (self.count if number is None else number) + 1
        return LedgerError(
            what,
            where=f"{self.name}, line {line}",
            hint="keep this file, and restore the newest copy that `fedfuse ledger verify` accepts",
        )


def _check_shape(tree: dict[str, Any], shape: dict[str, type]) -> None:
    if list(tree) != list(shape):
        raise PrivacyError(f"it must have {', '.join(shape)}, and nothing else")
    for (name, value), kind in zip(tree.items(), shape.values(), strict=True):
        if type(value) is not kind:
            raise PrivacyError(f"{name} must be of type {kind.__name__}")
    if tree.get("round", 0) < 0:
        raise PrivacyError("round must not be negative")


@lru_cache(maxsize=4096)
def _mechanism_in(text: bytes) -> Mechanism | None:
    tree = json.loads(text)
    if _CANONICAL.encode(tree).encode() != text:
        raise ValueError("it is not written as fedfuse writes it")
    return _mechanism_of(tree)


@lru_cache(maxsize=4096)
def _interned(text: bytes) -> str:
    """Kept once however often it is read."""
    return sys.intern(text.decode())


def _mechanism_of(tree: dict[str, Any] | None) -> Mechanism | None:
    if tree is None:
        return None
    _check_shape(tree, _MECHANISM)
    return _mechanism(*tree.values())


def _name(text: str, field: str) -> str:
    """`text`, kept once however often it is read. What a terminal could stumble on is refused."""
    if len(text) > LONGEST or not text.isprintable():
        raise PrivacyError(f"{field} must be printable, and of {LONGEST} characters at the most")
    return sys.intern(text) if field != "request" else text


def _plain(mechanism: Mechanism) -> dict[str, Any]:
    return {
        "clip_norm": float(mechanism.clip_norm),
        "count_noise": float(mechanism.count_noise),
        "noise_multiplier": float(mechanism.noise_multiplier),
        "sample_rate": float(mechanism.sample_rate),
        "steps": int(mechanism.steps),
        "unit": mechanism.unit.value,
    }


@lru_cache(maxsize=4096)
def _mechanism(
    clip_norm: float,
    count_noise: float,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    unit: str,
) -> Mechanism:
    return Mechanism(
        unit=Unit(unit),
        sample_rate=sample_rate,
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        steps=steps,
        count_noise=count_noise,
    )
