"""The tree of errors; each branch says who must act, and is one exit code of the command line.

A message reads ``{what was found}, {what was expected}{: what to do}``: lower case, no full stop,
never a record's content.
"""


class HuizhenError(Exception):
    """Anything this project refuses to do."""

    exit_code = 1


class ConfigError(HuizhenError):
    """The operator must change a file or an option."""

    exit_code = 2


class GovernanceError(HuizhenError):
    """The data custodian must decide."""

    exit_code = 3


class PrivacyError(HuizhenError):
    """More would be revealed than was agreed."""

    exit_code = 4


class ReleaseLostError(PrivacyError):
    """What was paid for was lost before it left; nothing else may leave in its place."""


class BudgetExhaustedError(PrivacyError):
    """The privacy budget does not cover what was asked."""


class ProtocolError(HuizhenError):
    """The other party sent what it must not."""

    exit_code = 5


class WireError(ProtocolError):
    """Received bytes are not what the format allows."""


class AggregationError(HuizhenError):
    """Too few updates, or unusable ones."""

    exit_code = 6


class StorageError(HuizhenError):
    """A disk is full, read-only or damaged."""

    exit_code = 7


class DamagedError(StorageError):
    """One thing that was kept is missing or was changed; others are whole."""


class AuditError(HuizhenError):
    """The log's chain is broken."""

    exit_code = 8


class ForkError(AuditError):
    """A party has signed two histories of one log."""

    def __init__(self, text: str, evidence: tuple[bytes, ...] = ()) -> None:
        """Keep what proves it: the signed documents that cannot both be true."""
        super().__init__(text)
        self.evidence = evidence
