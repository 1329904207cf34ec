"""Where a node keeps its runs of the protocol from one message to the next.

    InState   of a simulated node: in the state that Flower keeps for it; one run at a time
    InMemory  of a real one: in its vault's process alone, where they end with it

A run is for one request, and is begun once. What takes it out to answer puts it back; so a refusal
ends it, and so does a process that is killed: its keys are nowhere else, and a run that is begun
afterwards has keys of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol

from flwr.app import ConfigRecord, RecordDict

from fedfuse.errors import WireError
from fedfuse.federation.masking.member import Member
from fedfuse.privacy.signing import SigningKey

__all__ = ["InMemory", "InState", "Unfinished"]

_STATE, _REQUEST, _MEMBER = "fedfuse.masks", "request", "member"
_MOST = 8
"""Runs at a time: one of a thousand nodes takes about a megabyte."""
_REMEMBERED = 4096


class Unfinished(Protocol):
    """A node's runs of the protocol that are not over."""

    def begin(self, request: str) -> None:
        """Notes that a run for `request` begins. Raises WireError where one was begun before."""
        ...

    def find(self, request: str) -> Member:
        """The run for `request`, to be looked at. Raises WireError where there is none."""
        ...

    def take(self, request: str) -> Member:
        """The same, taken out."""
        ...

    def keep(self, member: Member) -> None:
        """Puts a run in, or back."""
        ...


class InState:
    """In the `state` that Flower keeps for a node."""

    def __init__(
        self, state: RecordDict, name: str, key: SigningKey, identities: Mapping[str, str]
    ) -> None:
        self._state = state
        self._name, self._key, self._identities = name, key, identities

    def begin(self, request: str) -> None:
        """As `Unfinished.begin`; what was begun before `request` is dropped."""
        if self._kept()[0] == request:
            raise _begun()
        self._write(request, b"")

    def find(self, request: str) -> Member:
        """As `Unfinished.find`."""
        kept, saved = self._kept()
        if kept != request or not saved:
            raise _none()
        return Member.load(saved, self._name, self._key, self._identities)

    def take(self, request: str) -> Member:
        """As `Unfinished.take`."""
        member = self.find(request)
        self._write(request, b"")
        return member

    def keep(self, member: Member) -> None:
        """As `Unfinished.keep`."""
        self._write(member.terms.request, member.save())

    def _kept(self) -> tuple[str, bytes]:
        record = self._state.config_records.get(_STATE)
        if record is None:
            return "", b""
        request, saved = record[_REQUEST], record[_MEMBER]
        assert isinstance(request, str)
        assert isinstance(saved, bytes)
        return request, saved

    def _write(self, request: str, saved: bytes) -> None:
        self._state[_STATE] = ConfigRecord({_REQUEST: request, _MEMBER: saved})


class InMemory:
    """In this process, and nowhere else.

    A server can begin what it never ends, so the oldest run makes room for a new one. Of requests
    that were begun the last ones are remembered: one that is forgotten can be begun again, as after
    a restart, with other keys; what it may cost is the ledger's to say, which forgets nothing.
    """

    def __init__(self, most: int = _MOST, remembered: int = _REMEMBERED) -> None:
        self._most, self._remembered = most, remembered
        self._members: OrderedDict[str, Member] = OrderedDict()
        self._begun: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._members)

    def begin(self, request: str) -> None:
        """As `Unfinished.begin`."""
        if request in self._begun:
            raise _begun()
        self._begun[request] = None
        while len(self._begun) > self._remembered:
            self._begun.popitem(last=False)

    def find(self, request: str) -> Member:
        """As `Unfinished.find`."""
        if request not in self._members:
            raise _none()
        return self._members[request]

    def take(self, request: str) -> Member:
        """As `Unfinished.take`."""
        member = self.find(request)
        del self._members[request]
        return member

    def keep(self, member: Member) -> None:
        """As `Unfinished.keep`."""
        self._members[member.terms.request] = member
        while len(self._members) > self._most:
            self._members.popitem(last=False)


def _begun() -> WireError:
    return WireError("masks for this request were begun before: a node begins them once")


def _none() -> WireError:
    return WireError(
        "this node has agreed on no masks for this request",
        hint="it was never asked, refused a stage, or was started again since: its keys are gone",
    )
