"""Text: words to token ids by a public hash, or by a tokenizer that the user names.

No word list is ever learned from the records.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedfuse.data.decoder import Decoder, Read
from fedfuse.data.media import looks_like_path, media_path
from fedfuse.errors import DataError

if TYPE_CHECKING:
    from fedfuse.data.columns import Source
    from fedfuse.data.declaration import DeclaredModality
    from fedfuse.data.probe import Probe
    from fedfuse.data.spec import DataConfig

__all__ = ["TextSpec", "load_tokenizer", "text_of", "token_ids", "words_of"]

_WORD = re.compile(r"\w+(?:'\w+)?", re.UNICODE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec(Decoder):
    """`tokens` words are kept; ids are below `vocabulary`, 0 is padding."""

    tokens: int
    vocabulary: int
    tokenizer: str = ""
    """A transformers tokenizer, by folder or hub id; "" hashes words."""

    suffixes: ClassVar = frozenset({".txt"})
    stored: ClassVar = "i4"

    @classmethod
    def plan(cls, source: Source, config: DataConfig, probe: Probe) -> Self:
        """All of it is settings. Raises DataError where the tokenizer cannot be loaded."""
        if config.tokenizer:
            load_tokenizer(config.tokenizer)  # an error belongs here, not to each record
        return cls(
            tokens=config.text_tokens, vocabulary=config.vocabulary, tokenizer=config.tokenizer
        )

    @property
    def shape(self) -> tuple[int]:
        """(L,)."""
        return (self.tokens,)

    def read(self, root: Path, cells: tuple[str, ...], said: DeclaredModality) -> Read:
        """The tokens. Raises DataError."""
        return Read(token_ids(text_of(root, cells[0]), self))


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


def text_of(root: Path, cell: str) -> str:
    """The cell itself, or what is in the .txt file that it names."""
    if not (cell.lower().endswith(".txt") and looks_like_path(cell)):
        return cell
    try:
        return media_path(root, cell).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"text file {cell} is not UTF-8", hint="save it as UTF-8") from None


def words_of(text: str, spec: TextSpec) -> list[str]:
    """What each id of `token_ids` but the padding stands for."""
    if spec.tokenizer:
        tokenizer = load_tokenizer(spec.tokenizer)
        found = tokenizer(text, truncation=True, max_length=spec.tokens)
        return [str(token) for token in tokenizer.convert_ids_to_tokens(found["input_ids"])]
    return _WORD.findall(text.lower())[: spec.tokens]


@lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder, or of a hub id, or of ID@REVISION. Raises DataError where there is
    none.

    Code that comes with a tokenizer is never run.
    """
    from transformers import AutoTokenizer

    whole, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    try:
        return AutoTokenizer.from_pretrained(
            whole, revision=revision or "main", trust_remote_code=False
        )
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
