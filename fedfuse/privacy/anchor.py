"""A note of a ledger's last line, kept in another place: older copies of the ledger give
themselves away by it.

It holds what whoever can change the ledger must not be able to change as well: put it on another
disk, or in a folder of another user.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedfuse.errors import LedgerError
from fedfuse.privacy import disk, signing
from fedfuse.privacy.chain import Chain

__all__ = ["Anchor", "read_anchor"]

_PURPOSE = "ledger anchor"
_LARGEST = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """The number and the hash of the last line of a ledger, as it was when this was written."""

    ledger: str
    number: int
    hash: str
    signature: str = ""

    @classmethod
    def of(cls, chain: Chain, key: signing.SigningKey | None) -> Anchor:
        """The note of a ledger's last line."""
        assert chain.opening is not None
        note = cls(ledger=chain.opening.id, number=chain.count - 1, hash=chain.head)
        return cls(
            ledger=note.ledger,
            number=note.number,
            hash=note.hash,
            signature=key.sign(note._message, purpose=_PURPOSE) if key else "",
        )

    @classmethod
    def read(cls, path: Path) -> Anchor:
        """The note in a file. Raises LedgerError."""
        return cls.parsed(read_anchor(path), path)

    @classmethod
    def parsed(cls, data: bytes, path: Path) -> Anchor:
        """The note in the content of the file at `path`. Raises LedgerError."""
        try:
            anchor = cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise LedgerError(f"it is no anchor: {error}", where=str(path)) from None
        if [type(value) for value in asdict(anchor).values()] != [str, int, str, str]:
            raise LedgerError("it is no anchor", where=str(path))
        return anchor

    @property
    def data(self) -> bytes:
        """The content of its file."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def write(self, path: Path) -> None:
        """Puts the note in the place of the last one, on the disk. Raises OSError."""
        disk.replace(path, self.data)

    def check(self, chain: Chain, path: Path) -> None:
        """Raises LedgerError unless `chain` has the line that was noted."""
        assert chain.opening is not None
        if self.ledger != chain.opening.id:
            raise LedgerError(f"it anchors another ledger, {self.ledger}", where=str(path))
        if chain.opening.public_key and not signing.verify(
            chain.opening.public_key, self._message, self.signature, purpose=_PURPOSE
        ):
            raise LedgerError("it is not signed with the ledger's key", where=str(path))
        if not 0 <= self.number < chain.count:
            raise LedgerError(
                f"the ledger ends with entry {chain.count - 1}, but {self.number} was anchored: "
                "it lost entries, or is an older copy",
                where=chain.name,
                hint=f"restore the newest copy; {path} tells which entry it must have",
            )
        if chain.hash_of(self.number) != self.hash:
            raise LedgerError(
                f"entry {self.number} is not the one that was anchored: "
                "the ledger was written anew, or there are two that went apart",
                where=chain.name,
                hint=f"restore the copy that {path} belongs to; `fedfuse ledger import` adds what "
                "others hold",
            )

    @property
    def _message(self) -> bytes:
        return f"{self.ledger} {self.number} {self.hash}".encode()


def read_anchor(path: Path) -> bytes:
    """What an anchor's file holds. Raises LedgerError, also where there is none: a ledger whose
    anchor was taken away cannot show that it is not an older copy."""
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(_LARGEST)
    except OSError as error:
        raise LedgerError(
            f"the anchor cannot be read: {error.strerror}",
            where=str(path),
            hint="`fedfuse ledger anchor` makes one, once you know that the ledger is complete",
        ) from None
