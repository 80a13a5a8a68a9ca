"""Errors that every rank raises alike, so that one of them reports them."""

import re
from dataclasses import dataclass

from data import files
from data.exits import REFUSED, exit_status


class Refused(ValueError):
    """A user error that every rank raises alike, so that one of them can report it."""


class Broken(Exception):
    """A failure that every rank raises alike, such as a full disk: another start may succeed."""


class PeerLost(Exception):
    """A collective failed, since the ranks that this names have ended."""


class StoppedError(Exception):
    """Work is left between two of its steps, because a rank was stopped."""


@dataclass(frozen=True)
class Fault:
    """Why a rank cannot go on: an error that all ranks are to raise alike."""

    text: str
    #: Whether the user has to correct something; else another start may succeed.
    is_users: bool

    @classmethod
    def of(cls, error: ValueError | OSError) -> "Fault":
        """That error; a full disk and the like are no user errors."""
        return cls(describe(error), exit_status(error) == REFUSED)

    def alike(self) -> "Refused | Broken":
        """The error."""
        return Refused(self.text) if self.is_users else Broken(self.text)


def describe(error: ValueError | OSError) -> str:
    """An error in words, such as "runs/a/log.txt: No space left on device"."""
    said = files.reason(error)
    if isinstance(error, OSError) and error.strerror and said == str(error):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return said


def named_hosts(verdict: str) -> list[str]:
    """The hosts whose ranks a verdict names, such as n2 in "n1: lost: n2 (rank 3; computing)".

    None where these ranks failed by themselves.
    """
    return [] if ": failed: " in verdict else re.findall(r"(\S+) \(ranks? \d", verdict)
