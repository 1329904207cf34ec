"""The exceptions that fedfuse raises, and the exit code of each.

    FedfuseError            1   something fedfuse can explain
    ├── UsageError          2   a flag or argument is wrong
    ├── ConfigError         3   a scenario or a setting is wrong
    ├── DataError           4   a manifest, a data file or a declaration is wrong
    ├── ModelError          5   a model cannot be built or trained as asked
    ├── PrivacyError        6   a guarantee cannot be given as asked
    │   ├── BudgetExceeded  6   the work asked for would spend more than is allowed
    │   ├── LedgerError     6   a ledger is missing, damaged, or not what was anchored
    │   └── CertificateError 6  a certificate cannot be read, or does not hold
    ├── FederationError     7   nodes, messages or aggregation failed
    │   └── WireError       7   one message is not what the protocol says
    └── RunFolderError      8   a run folder is missing, foreign or damaged

Each says what was wrong with its value, where, and what to do about it; none prints the content
of a record.
"""

from __future__ import annotations

__all__ = [
    "BudgetExceeded",
    "CertificateError",
    "ConfigError",
    "DataError",
    "FederationError",
    "FedfuseError",
    "LedgerError",
    "ModelError",
    "PrivacyError",
    "RunFolderError",
    "UsageError",
    "WireError",
]


class FedfuseError(Exception):
    """What is wrong (``what``), where (``where``), and what to do (``hint``).

    >>> print(ConfigError("rounds = 0, but at least 1 is needed", where="quickstart.toml",
    ...                   hint="set train.rounds = 20"))
    quickstart.toml: rounds = 0, but at least 1 is needed
    hint: set train.rounds = 20
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\nhint: {self.hint}" if self.hint else head

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(kind: type[FedfuseError], what: str, where: str, hint: str) -> FedfuseError:
    return kind(what, where=where, hint=hint)


class UsageError(FedfuseError):
    """A flag or argument is wrong."""

    exit_code = 2


class ConfigError(FedfuseError):
    """A scenario or a setting is wrong."""

    exit_code = 3


class DataError(FedfuseError):
    """A manifest, a data file or a declaration is wrong."""

    exit_code = 4


class ModelError(FedfuseError):
    """A model cannot be built or trained as asked."""

    exit_code = 5


class PrivacyError(FedfuseError):
    """A guarantee cannot be given as asked."""

    exit_code = 6


class BudgetExceeded(PrivacyError):
    """The work asked for would spend more than is allowed."""


class LedgerError(PrivacyError):
    """A ledger is missing, damaged, or not what was anchored."""


class CertificateError(PrivacyError):
    """A certificate cannot be read, or does not hold."""


class FederationError(FedfuseError):
    """Nodes, messages or aggregation failed."""

    exit_code = 7


class WireError(FederationError):
    """One message is not what the protocol says."""


class RunFolderError(FedfuseError):
    """A run folder is missing, foreign or damaged."""

    exit_code = 8
