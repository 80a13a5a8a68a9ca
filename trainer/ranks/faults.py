"""Errors that every rank raises alike, so that one of them reports them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data import files
from data.exits import REFUSED, exit_status
from trainer.ranks.world import host_name

# How torch, its compiled kernels, its libraries and Triton report that a GPU fails.
_OF_A_GPU = re.compile(
    r"(CUDA|HIP)( driver)? error: (?!\w+_STATUS_)|Triton Error \["
    r"|\w+ error: \w+_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
)
_OF_MEMORY = re.compile("out of memory|_ALLOC_FAILED")


class Refused(ValueError):
    """A user error that every rank raises alike, so that one of them can report it."""


class Broken(Exception):
    """A failure that every rank raises alike, such as a full disk: another start may succeed.

    `hosts` has the machines whose GPUs failed, with commas between them.
    """

    def __init__(self, text: str, *, hosts: str = "") -> None:
        super().__init__(text)
        self.hosts = hosts


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
    #: The machines whose GPUs failed, with commas between them.
    hosts: str = ""

    @classmethod
    def of(cls, error: ValueError | OSError) -> "Fault":
        """That error; a full disk and the like are no user errors."""
        return cls(describe(error), exit_status(error) == REFUSED)

    @classmethod
    def of_gpu(cls, error: RuntimeError, *, host: str) -> "Fault":
        """That of a GPU, which is its machine's unless another process fills the memory."""
        what = str(error).partition("\n")[0]  # torch adds advice for those who write kernels
        is_full = isinstance(error, torch.OutOfMemoryError) or _OF_MEMORY.search(what)
        return cls(f"a GPU of {host} fails: {what}", False, "" if is_full else host)

    @classmethod
    def of_all(cls, faults: "Sequence[Fault | None]") -> "Fault | None":
        """Those of all ranks, in their order, in one; one common to all is said once."""
        said = {fault: rank for rank, fault in reversed(list(enumerate(faults))) if fault}
        if not said:
            return None
        if len(said) == 1 and all(faults):
            return next(iter(said))
        text = "; ".join(f"rank {rank}: {fault.text}" for fault, rank in said.items())
        hosts = sorted({fault.hosts for fault in said if fault.hosts})
        return cls(text, all(fault.is_users for fault in said), ",".join(hosts))

    def alike(self) -> "Refused | Broken":
        """The error."""
        return Refused(self.text) if self.is_users else Broken(self.text, hosts=self.hosts)


def raise_any(faults: Sequence[Fault | None]) -> None:
    """Raise the error of all ranks' faults, if there is any."""
    if fault := Fault.of_all(faults):
        raise fault.alike()


def is_of_a_collective(error: Exception) -> bool:
    """Whether NCCL, gloo or the store raised it; gloo's are of no type of their own."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def is_of_a_gpu(error: BaseException) -> bool:
    """Whether a GPU failed, which may be its machine's fault; memory that is full is none."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError) or _OF_MEMORY.search(said):
        return False
    named = isinstance(error, RuntimeError) and _OF_A_GPU.match(said) is not None
    return isinstance(error, torch.AcceleratorError) or named


def failed_hosts(error: BaseException) -> str | None:
    """The machines whose GPUs made this error, with commas between them; None if none did."""
    if is_of_a_gpu(error):
        return host_name()
    return getattr(error, "hosts", None) or None


def describe(error: ValueError | OSError) -> str:
    """An error in words, such as "runs/a/log.txt: No space left on device"."""
    said = files.reason(error)
    if isinstance(error, OSError) and error.strerror and said == str(error):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return said


def named_hosts(verdict: str) -> str | None:
    """The hosts whose ranks a verdict names, as n2 in "n1: lost: n2 (rank 3; computing)".

    With commas between them; None where there are none, or these ranks failed by themselves.
    """
    found = [] if ": failed: " in verdict else re.findall(r"(\S+) \(ranks? \d", verdict)
    return ",".join(found) or None
