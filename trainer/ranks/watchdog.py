"""A rank that is lost or hangs ends the job, and is named.

Neither Slurm nor mpirun always notices a machine that no longer answers, and a rank that waits in a
collective waits long. So a thread of every rank reports its progress to the main rank each second,
through the process group's store. The main rank decides: a rank without reports is lost; when no
rank makes progress, those that are furthest behind hang. The other ranks watch the main rank alone.
The thread that decides uses its own clock and never waits for the network. Time in which its
process was stopped, as with a suspended job, does not count.

On each machine the lowest rank that still runs prints it, before any other error is printed.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from data.config import shown
from data.exits import FAILED
from trainer.ranks import faults
from trainer.ranks.ending import NETWORK
from trainer.ranks.faults import Broken, PeerLost, Refused, StoppedError
from trainer.ranks.group import gather
from trainer.ranks.mailbox import Mailbox, briefly
from trainer.ranks.process import Process, RunningClock, compiles
from trainer.ranks.world import World

_BEAT = 1.0
# What the main rank has found, and the error that a rank ended with; empty while all is well.
_VERDICT, _ERROR = "verdict", "error"
# Seconds in which the ranks end by themselves once one has failed, unless they wait for it.
_GRACE = 10.0


@dataclass
class _Rank:
    """What is known of a rank: its last report, and when that came."""

    doing: str = "?"
    beat: int = -1
    marks: int = -1
    reported_at: float = 0.0

    def update(self, report: Any, *, now: float) -> bool:
        """Note a report; whether the rank has made progress since the one before."""
        match report:
            case [int(beat), int(marks), str(doing)] if beat > self.beat:
                self.beat, self.reported_at, self.doing = beat, now, doing
                has_moved, self.marks = marks != self.marks, marks
                return has_moved
        return False


class Watchdog:
    """Watches the ranks while entered. All ranks enter, and leave, together.

    `mark` says what the rank does next. When a rank is lost, or none makes progress, for `patience`
    seconds, every rank's process ends with status 1 and `tell` receives what happened; before that,
    `dump` writes where this rank stands. `clock` leaves out what the job was suspended for. Ranks
    that do not mark their progress are only found where they are lost.
    """

    def __init__(self, world: World, *, patience: float, is_marked: bool = True) -> None:
        self._world = world
        self._patience, self._is_marked = patience, is_marked
        self._doing, self._marks, self._beats = "starting" if is_marked else "working", 0, 0
        self._done = threading.Event()
        self._ranks = [_Rank() for _ in range(world.size if world.is_main else 1)]
        self._moved = self._began = 0.0
        self._verdict = self._error = ""
        self._failed_at = 0.0
        self._lost: set[int] = set()
        # Whether an error has ended the work here, and the ranks that ended before were looked for.
        self._has_met_error = False
        self._threads: list[threading.Thread] = []
        self.tell: Callable[[str], None] = lambda _: None
        self.dump: Callable[[], None] = lambda: None

    def mark(self, doing: str) -> None:
        """This rank has made progress, and now does `doing`."""
        self._doing, self._marks = doing, self._marks + 1

    def __enter__(self) -> "Watchdog":
        self._processes = gather(Process.here())
        self._mailbox = Mailbox()
        if self._world.is_main:
            self._mailbox.put(_VERDICT, "")
            self._mailbox.put(_ERROR, "")
        self._send_report()
        dist.barrier()
        self._moved = self._began = time.monotonic()
        self.clock = RunningClock()
        for rank in self._ranks:
            rank.reported_at = self._moved
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"{NETWORK}{work.__name__}")
            for work in (self._exchange_reports, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self.on_error(_kind, error, _trace)
            if error is None:
                dist.barrier()
        finally:
            self._done.set()
            for thread in self._threads:
                # It may be reading the store, which ends with the group or the main rank.
                thread.join(None if error is None else 5 * _BEAT)
        if error is None:
            dist.barrier()  # no rank may still read the store, which may be the main rank's

    def on_error(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Where an error ends the work, `tell` which other ranks ended before, if any did.

        Called at the exit of whatever `tell` writes to; leaving the watchdog does it too.

        Raises:
            PeerLost: in place of a collective's error that says no more than that.
        """
        if not isinstance(error, Exception) or self._has_met_error:
            return
        self._has_met_error = True
        gone = self._name_ended() if isinstance(error, RuntimeError) else ""
        follows = faults.is_of_a_collective(error)
        alike = isinstance(error, Refused | Broken | StoppedError)
        # An error of the device may be its machine's fault.
        if follows or not (gone or alike or faults.is_of_a_gpu(error)):
            self._post_error(gone or f"{type(error).__name__}: {error}", follows=follows)
        if gone and follows:
            raise PeerLost(gone) from error

    def _post_error(self, why: str, *, follows: bool) -> None:
        """Tell the others, and the log, why this rank ends, so that it does not count as lost.

        The main rank's error is noted with the run's end. One that `follows` from the end of
        another rank, of which this one may not know, is not logged.
        """
        rank, why = self._world.rank, shown(why)
        briefly(lambda: self._mailbox.put(f"error {rank}", [follows, why]))
        if follows:
            return
        host = self._processes[rank].host
        said = f"failed: {host} (rank {rank}; {self._doing}): {why}"
        briefly(lambda: self._mailbox.put(_ERROR, said))
        if not self._world.is_main:
            briefly(lambda: self.tell(f"{host}: {said}"))

    def _send_report(self) -> None:
        self._beats += 1
        if compiles():  # this may take longer than the watchdog's patience
            self.mark("compiling an operator")
        report = [self._beats, self._marks, self._doing]
        self._mailbox.put(f"rank {self._world.rank}", report)

    def _exchange_reports(self) -> None:
        """Report and listen. The network may block this thread forever."""
        keys = [f"rank {rank}" for rank in range(len(self._ranks))]
        try:
            while not self._done.wait(_BEAT):
                self._send_report()
                *reports, verdict, self._error = self._mailbox.get([*keys, _VERDICT, _ERROR])
                self._read_reports(reports)
                if self._error and not self._failed_at:
                    self._failed_at = time.monotonic()
                self._verdict = self._verdict or verdict or ""
        except RuntimeError:
            return  # `_watch` notices that reports are missing

    def _read_reports(self, reports: Sequence[Any]) -> None:
        now = time.monotonic()
        moved = [r.update(m, now=now) for r, m in zip(self._ranks, reports, strict=True)]
        if any(moved):
            self._moved = now

    def _watch(self) -> None:
        last = self._began  # this thread may begin after a stop
        while not self._done.wait(_BEAT):
            self.clock()
            now = time.monotonic()
            self._discount(now - last - _BEAT)
            last = now
            self._verdict = self._verdict or self._diagnose()
            if self._verdict and not self._done.is_set():
                self._end()

    def _discount(self, paused: float) -> None:
        """Do not count time in which this process did not run as silence of the ranks."""
        if paused > 2 * _BEAT:
            self._moved += paused
            for rank in self._ranks:
                rank.reported_at += paused

    def _diagnose(self) -> str:
        """What is wrong, or nothing."""
        now = time.monotonic()
        if self._failed_at and now - self._failed_at > _GRACE and not self._has_met_error:
            return self._error
        silent = [now - rank.reported_at for rank in self._ranks]
        if max(silent) > self._patience:
            # Ranks lost together may have sent their last reports some beats apart.
            self._lost = {n for n, s in enumerate(silent) if s > self._patience - 4 * _BEAT}
            return f"lost: {self._named(self._lost)}: not heard from for {self._patience:g} s"
        if self._is_marked and self._world.is_main and now - self._moved > self._patience:
            least = min(rank.marks for rank in self._ranks)
            behind = [n for n, rank in enumerate(self._ranks) if rank.marks == least]
            return f"hung: {self._named(behind)}: no rank made progress for {self._patience:g} s"
        return ""

    def _named(self, ranks: Iterable[int]) -> str:
        """Such as "n2 (ranks 2, 3; computing)", host by host."""
        hosts: dict[str, list[int]] = {}
        for rank in sorted(ranks):
            hosts.setdefault(self._processes[rank].host, []).append(rank)
        return ", ".join(
            f"{host} (rank{'s' * (len(own) > 1)} {', '.join(map(str, own))}"
            f"{self._last_seen(own[0])})"
            for host, own in hosts.items()
        )

    def _last_seen(self, rank: int) -> str:
        """What a rank did, if it reports to this one."""
        return f"; {self._ranks[rank].doing}" if rank < len(self._ranks) else ""

    def _prints_for_machine(self) -> bool:
        """Whether this is the lowest rank of its machine that still runs."""
        before, mine = self._processes[: self._world.rank], self._processes[self._world.rank]
        return all(
            rank in self._lost or process.has_ended() or process.is_stopped()
            for rank, process in enumerate(before)
            if process.machine == mine.machine
        )

    def _print_once(self, what: str, *, tells: bool = True) -> None:
        """Print it once on each machine; the first two log it: the network may be cut."""
        if not self._prints_for_machine():
            return
        line = f"{self._processes[self._world.rank].host}: {what}"
        print(line, file=sys.stderr, flush=True)
        if tells and self._world.rank // self._world.local_size < 2:
            briefly(lambda: self.tell(line))

    def _end(self) -> None:
        """Print the verdict and exit."""
        self._print_once(self._verdict)
        briefly(self.dump)
        if self._world.is_main:
            briefly(lambda: self._mailbox.put(_VERDICT, self._verdict))
        # The others need the store, which may be in this process, and to see that this one lives.
        time.sleep(4 * _BEAT)
        os._exit(FAILED)

    def _name_ended(self) -> str:
        """Name the ranks that have ended, if any, before any rank prints its error.

        Those whose end followed from another's are named only where no other is found.
        """
        end, errors = time.monotonic() + 5 * _BEAT, self._errors_of_ended()
        while all(follows for follows, _ in errors.values()) and time.monotonic() < end:
            time.sleep(0.1)
            errors = self._errors_of_ended()
        self._lost |= errors.keys()
        causes = {rank: why for rank, (follows, why) in errors.items() if not follows}
        named = causes or {rank: why for rank, (_, why) in errors.items()}
        said = [f"failed: {self._named({r})}: {why}" for r, why in sorted(named.items()) if why]
        for each in said:
            self._print_once(each, tells=not causes)  # a cause has logged it itself
        if lost := {rank for rank, why in named.items() if not why}:
            said.append(f"lost: {self._named(lost)}: ended")
            self._print_once(said[-1])
        if said:
            time.sleep(2 * _BEAT)  # all errors come after what the lowest rank has printed
        return "; ".join(said)

    def _errors_of_ended(self) -> dict[int, tuple[bool, str]]:
        """Of the ranks that have ended: whether that followed from another's end, and why."""
        return {rank: self._error_of(rank) for rank in self._ended()}

    def _error_of(self, rank: int) -> tuple[bool, str]:
        """As above, of one rank; "" where it was killed and posted no error."""
        found: list[Any] = []
        briefly(lambda: found.extend(self._mailbox.get([f"error {rank}"])))
        match found:
            case [[bool(follows), str(why)]]:
                return follows, why
        return rank > 0 and not found, ""  # the store has ended, and with it the main rank

    def _ended(self) -> set[int]:
        """The ranks that are known to have ended, here or by their silence."""
        silent = time.monotonic() - 4 * _BEAT
        ended = {n for n, process in enumerate(self._processes) if process.has_ended()}
        return ended | {n for n, rank in enumerate(self._ranks) if rank.reported_at < silent}
