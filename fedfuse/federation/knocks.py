"""Who knocked at the SuperLink and was turned away, from what is in its log."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from fedfuse.federation.handshakes import TURNED_AWAY

__all__ = ["failed_handshake", "failed_handshakes", "fingerprint", "strangers"]

_MOST = 1 << 20
"""Bytes at the log's end that are looked at."""
_REFUSED = re.compile(rb"\[ApiError:200[14]\].*?b'(-----BEGIN PUBLIC KEY-----.*?KEY-----)")
_COUNTED = re.compile(r"; \d+ more times since it was last told")


def strangers(log: Path) -> dict[str, int]:
    """How often a key that nobody registered was turned away, by its fingerprint, as `ssh-keygen
    -lf supernode.pub` shows it."""
    counts: Counter[str] = Counter()
    for text, number in Counter(_REFUSED.findall(_end(log))).items():
        try:
            counts[fingerprint(text.replace(b"\\n", b"\n"))] += number
        except ValueError:
            continue
    return dict(counts)


def failed_handshakes(log: Path) -> dict[str, str]:
    """Whose TLS handshake failed and why, in a sentence each, with when it was last told."""
    found = {}
    for line in _end(log).decode("utf-8", "replace").splitlines():
        if text := failed_handshake(line):
            found[_COUNTED.sub("", text)] = line.partition(" ")[0]
    return found


def failed_handshake(line: str) -> str:
    """What a line of the log says about a TLS handshake that failed; empty: it is about others."""
    time, mark, text = line.partition(TURNED_AWAY)
    return text if mark and " " not in time else ""


def fingerprint(pem: bytes) -> str:
    """Of a public key, as OpenSSH shows it. Raises ValueError where it holds none."""
    key = serialization.load_pem_public_key(pem)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _end(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST))
            return file.read()
    except OSError:
        return b""
