"""Text: words to token ids by a public hash, or by a tokenizer that the user names.

No word list is ever learned from the records.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfuse.errors import DataError

__all__ = ["TextSpec", "load_tokenizer", "token_ids", "words_of"]

_WORD = re.compile(r"\w+(?:'\w+)?", re.UNICODE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """`tokens` words are kept; ids are below `vocabulary`, 0 is padding."""

    tokens: int
    vocabulary: int
    tokenizer: str = ""
    """A transformers tokenizer, by folder or hub id; "" hashes words."""

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
    if spec.tokenizer:
        found = load_tokenizer(spec.tokenizer)(text, truncation=True, max_length=spec.tokens)
        # 0 is padding here, whatever it is in the tokenizer.
        kept = [1 + number % (spec.vocabulary - 1) for number in found["input_ids"]]
        ids[: len(kept)] = kept
        return ids
    words = _WORD.findall(text.lower())[: spec.tokens]
    ids[: len(words)] = [_bucket(word, spec.vocabulary) for word in words]
    return ids


def words_of(text: str, spec: TextSpec) -> list[str]:
    """What each id of `token_ids` but the padding stands for."""
    if spec.tokenizer:
        tokenizer = load_tokenizer(spec.tokenizer)
        found = tokenizer(text, truncation=True, max_length=spec.tokens)
        return [str(token) for token in tokenizer.convert_ids_to_tokens(found["input_ids"])]
    return _WORD.findall(text.lower())[: spec.tokens]


@lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder, or of a hub id. Raises DataError where it cannot be loaded.

    Code that comes with a tokenizer is never run.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"tokenizer {name!r} cannot be loaded ({type(error).__name__})",
            where="data.tokenizer",
            hint="name a folder that save_pretrained wrote, or a hub id if there is a network",
        ) from None


@lru_cache(maxsize=65536)
def _bucket(word: str, vocabulary: int) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (vocabulary - 1)
