"""Who knocked at the SuperLink with a key that nobody registered, from what it wrote in its log."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

from cryptography.hazmat.primitives import serialization

__all__ = ["fingerprint", "strangers"]

_MOST = 1 << 20
"""Bytes at the log's end that are looked at."""
_REFUSED = re.compile(rb"\[ApiError:200[14]\].*?b'(-----BEGIN PUBLIC KEY-----.*?KEY-----)")


def strangers(log: Path) -> dict[str, int]:
    """By fingerprint, as `ssh-keygen -lf supernode.pub` shows it: how often it was turned away."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST))
            found = Counter(_REFUSED.findall(file.read()))
    except OSError:
        return {}
    counts: Counter[str] = Counter()
    for text, number in found.items():
        try:
            counts[fingerprint(text.replace(b"\\n", b"\n"))] += number
        except ValueError:
            continue
    return dict(counts)


def fingerprint(pem: bytes) -> str:
    """Of a public key, as OpenSSH shows it. Raises ValueError where it holds none."""
    key = serialization.load_pem_public_key(pem)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"
