"""Becomes a program that serves TLS, such as flower-superlink, and says whose handshakes failed.

Nobody else does: a client that does not trust the certificate, or speaks without TLS, leaves no
line in the log of Flower, uvicorn or uvloop, whatever the level. `ssl` has a place where it is
seen, `SSLContext.sslobject_class`; the connections stay as they are. Run as

    python -P -m fedfuse.federation.handshakes PROGRAM WORDS...
"""

from __future__ import annotations

import gc
import runpy
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

__all__ = ["TURNED_AWAY", "Refusals"]

TURNED_AWAY = " turned away: "
"""In each line, between the time and what happened."""
_AGAIN_S = 600.0
"""A client that goes on trying, and fails for the same reason, gets a line so often."""
_MOST_CLIENTS = 1000
_LOOKS = 20
"""So many failures are looked at in a row, and then one each second: a look takes some 25 ms."""
_REASONS = {
    "UNKNOWN_CA": "does not trust this server's certificate: its ca.pem must be this server's "
    "authority.pem",
    "CERTIFICATE_UNKNOWN": "does not trust this server's certificate: its ca.pem must be this "
    "server's authority.pem",
    "BAD_CERTIFICATE": "refuses this server's certificate: is the name by which it calls this "
    "server one of the certificate's?",
    "CERTIFICATE_EXPIRED": "says that this server's certificate ran out: fedfuse server status, "
    "or its clock is wrong",
    "HTTP_REQUEST": "speaks without TLS: on a node, superlink.insecure must be false",
    "WRONG_VERSION_NUMBER": "speaks without TLS, or something else than TLS",
}
"""By how OpenSSL's reason ends."""


class Refusals:
    """What is said of handshakes that failed: of each client and reason at once, then seldom."""

    def __init__(self, say: Callable[[str], None], now: Callable[[], float]) -> None:
        """`now`: seconds of a clock that only goes forward."""
        self._say, self._now = say, now
        self._looks, self._looked = float(_LOOKS), now()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}

    def add(self, reason: str, address: Callable[[], str]) -> None:
        """A handshake failed for `reason`, as OpenSSL calls it; `address` finds out whose."""
        now = self._now()
        self._looks = min(float(_LOOKS), self._looks + now - self._looked)
        self._looked = now
        if self._looks < 1:
            return
        self._looks -= 1
        key = address(), reason
        last, more = self._told.pop(key, (now - _AGAIN_S, 0))
        if now - last < _AGAIN_S:
            self._told[key] = last, more + 1
            return
        self._told[key] = now, 0
        if len(self._told) > _MOST_CLIENTS:
            del self._told[next(iter(self._told))]
        why = next((ours for end, ours in _REASONS.items() if reason.endswith(end)), "fails in TLS")
        since = f"; {more} more times since it was last told" if more else ""
        self._say(f"{key[0]} {why} ({reason}{since})")


def _watch(refusals: Refusals) -> None:
    """From now on each handshake of a server in this process that fails is told."""

    class Watched(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError):
                raise  # not done yet; or who knocked has left
            except ssl.SSLError as error:
                if self.server_side:
                    with suppress(Exception):  # whatever becomes of the line, the server goes on
                        refusals.add(error.reason or "", lambda: _peer(self))
                raise

    ssl.SSLContext.sslobject_class = Watched


def _peer(tls: ssl.SSLObject) -> str:
    """The client's address. The event loop alone knows it: what holds `tls` holds the transport."""
    for holder in gc.get_referrers(tls):
        for held in gc.get_referents(holder):
            ask = getattr(held, "get_extra_info", None)
            if ask is not None and (peer := ask("peername")):
                return str(peer[0])
    return "a client"


def _say(text: str) -> None:
    sys.stdout.write(f"{datetime.now(UTC):%FT%TZ}{TURNED_AWAY}{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    del sys.argv[0]
    _watch(Refusals(_say, time.monotonic))
    runpy.run_path(sys.argv[0], run_name="__main__")
