"""Text: words to token ids by a public hash; no word list is learned from data."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["TextSpec", "token_ids"]

_WORD = re.compile(r"\w+(?:'\w+)?", re.UNICODE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """`tokens` words are kept; ids are below `vocabulary`, 0 is padding."""

    tokens: int
    vocabulary: int

    @property
    def shape(self) -> tuple[int]:
        """(L,)."""
        return (self.tokens,)


def token_ids(text: str, spec: TextSpec) -> NDArray[np.int32]:
    """The ids of the first words of `text`, (L,), from 1 to vocabulary - 1, then zeros.

    >>> token_ids("Oil leaks, oil!", TextSpec(tokens=4, vocabulary=4096)).tolist()
    [848, 1174, 848, 0]
    """
    ids = np.zeros(spec.tokens, dtype=np.int32)
    words = _WORD.findall(text.lower())[: spec.tokens]
    ids[: len(words)] = [_bucket(word, spec.vocabulary) for word in words]
    return ids


@lru_cache(maxsize=65536)
def _bucket(word: str, vocabulary: int) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (vocabulary - 1)
