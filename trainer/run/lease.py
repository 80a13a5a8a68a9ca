"""The right to write a run: one process has it at a time, and one that has lost it finds out.

After a requeue an old main rank may still be alive, on a node that the scheduler gave up. So the
right is a token in `RUN/launch/writer.json`: a start takes it, and a process checks before each
append or commit that the token is still its own. The holder touches the file every few seconds.
Clocks of machines are not compared: only a change of the file's time counts.
"""

import errno
import json
import os
import secrets
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data import files
from trainer.config import settings
from trainer.ranks.process import Process, has_ended
from trainer.ranks.world import scheduler_job
from trainer.run.runstate import RunState

# Seconds between two signs of life, and how long their absence is watched before it is believed.
BEAT, PATIENCE = 2.0, 30.0
# Seconds for which the holder's file may be missing before it is written again.
MOMENT = 3.0
# Seconds after which another machine must see what was written.
SEEN = 90.0


def unmarked(_: str) -> None:
    """No watchdog waits for this process."""


class LeaseLost(ValueError):
    """Another start has taken the run over, or it is gone: this one must not write any more."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that may write a run."""

    token: str
    host: str
    pid: int
    #: Tells a machine and its process numbers from another of the same name.
    machine: str
    #: The scheduler's number of the job, and how often it was started again before.
    job: str | None = None
    start: int
    #: The run's directory; None in files of earlier releases.
    run: str | None = None

    @classmethod
    def here(cls, run: Path) -> "Holder":
        """This process, as the writer of `run`."""
        (job, start), me = scheduler_job(), Process.here()
        return cls(
            token=secrets.token_hex(8),
            host=me.host,
            pid=me.pid,
            machine=me.machine,
            job=job,
            start=start,
            run=str(run.absolute()),
        )

    def __str__(self) -> str:
        job = f"job {self.job}" if self.job else f"process {self.pid}"
        return f"{job} on {self.host}"

    def is_followed_by(self, other: "Holder") -> bool:
        """Whether the scheduler itself started `other` in place of this one."""
        return self.job is not None and self.job == other.job and self.start < other.start

    def writes(self, run: Path) -> bool:
        """Whether it writes `run`, and not the run that `run` is a copy of.

        A directory that is not found may have another name on this machine.
        """
        if self.run is None or self.run == str(run.absolute()):
            return True
        try:
            return os.path.samefile(self.run, run)
        except OSError:
            return True

    def is_gone(self) -> bool:
        """Whether this is a process of this machine that has ended."""
        return has_ended(self.pid, on=self.machine)


def holder(run: Path) -> Holder | None:
    """The process that holds the run; None if there is none, or the file is damaged or copied.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        found: Holder = settings.from_json(Holder, _file(run).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # its server has begun anew: it shows as if it were missing
            return None
        raise
    return found if found.writes(run) else None


def live_holder(run: Path, *, mark: Callable[[str], None] = unmarked) -> Holder | None:
    """Who writes the run now. Takes up to `PATIENCE` seconds when someone did and says nothing.

    `mark` gets what is waited for, again and again: the patience of a watchdog may be shorter.
    """
    found = holder(run)
    if found is None or found.is_gone():
        return None
    last, end = beat(run), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        mark(f"waiting for a sign of life of {found}")
        time.sleep(0.2)
        if beat(run) != last:
            return holder(run)
    return None


class Lease:
    """The right to write a run, from `claim` until it is released or lost.

    `stop_requested` turns true when someone has asked for that by `request_stop`.
    """

    def __init__(self, run: Path, me: Holder) -> None:
        self._run = run
        #: This process, whose token names the claim.
        self.me = me
        #: The run's count of starts, this one included; None until it is known.
        self.starts: int | None = None
        self._released, self._checking = threading.Event(), threading.Lock()
        self.stop_requested = stop_requested(run)
        threading.Thread(target=self._show_life, daemon=True).start()

    def check(self) -> None:
        """Raise LeaseLost unless this process still is the one that writes."""
        with self._checking:  # a run's records are written beside its steps
            found = holder(self._run) or self._restored()
        if found.token != self.me.token:
            raise LeaseLost(f"{found} has taken over {self._run}: {self.me} stops without writing")

    def _restored(self) -> Holder:
        """Who holds a run whose file is missing or damaged: this process writes it again.

        A network file system may show no file for a moment; and another start, which would count
        itself in the run's state, may have come and gone.
        """
        end = time.monotonic() + MOMENT
        while (found := holder(self._run)) is None and time.monotonic() < end:
            if not self._run.is_dir():
                raise LeaseLost(f"{self._run} is gone: it was moved or removed during the run")
            time.sleep(0.1)
        if found is not None:
            return found
        state = RunState.read(self._run)
        if self.starts is not None and state is not None and state.starts != self.starts:
            raise LeaseLost(
                f"another start has written {self._run}: {self.me} stops without writing"
            )
        _write(self._run, self.me)
        return self.me

    def release(self) -> None:
        """Let the next start begin at once."""
        self._released.set()
        found = holder(self._run)
        if found is not None and found.token == self.me.token:
            _file(self._run).unlink(missing_ok=True)

    def _show_life(self) -> None:
        while not self._released.wait(BEAT):
            try:
                found = holder(self._run)
                if found is not None and found.token != self.me.token:
                    return
                os.utime(_file(self._run))
                self.stop_requested = stop_requested(self._run)
            except OSError:
                continue  # a network file system may fail for a while


def claim(run: Path, *, mark: Callable[[str], None] = unmarked) -> Lease:
    """Take the right to write `run`; ValueError where another job does. `mark`: see above."""
    me = Holder.here(run)
    _file(run).parent.mkdir(parents=True, exist_ok=True)
    # NFS may hold for a minute that there is none: to make it asks the server.
    with suppress(FileExistsError):
        _file(run).open("x").close()
    before = holder(run)
    if before is not None and not before.is_followed_by(me):
        busy = live_holder(run, mark=mark)
        if busy is not None:
            both = ""
            if me.job is not None and (me.job, me.start) == (busy.job, busy.start):
                both = (
                    "; if both were to train together, the launchers of this job did not find each "
                    "other: `srun` starts one rank for each task, torchrun needs --nnodes and "
                    "--rdzv-endpoint"
                )
            raise ValueError(
                f"{busy} is writing {run}: wait for it, stop it with `{stop_command(run)}`, or "
                f"name another --run directory{both}"
            )
    _write(run, me)
    return Lease(run, me)


def check_seen(run: Path, *, token: str, machine: str, mark: Callable[[str], None]) -> None:
    """Raise ValueError unless `run` is here the directory that the main rank has claimed."""
    # A network file system may show for a while that there was no file.
    files.look_again(_file(run).parent)
    is_here = machine == Process.here().machine
    end = time.monotonic() + (0 if is_here else SEEN)
    while (found := holder(run)) is None or found.token != token:
        if time.monotonic() >= end:
            way = (
                "give all ranks the same --run, and each of several jobs on a machine a port of "
                "its own, as in `deepspeed --master_port 29511 ...`"
                if is_here
                else "all ranks write --run, so put it on a disk that all machines share"
            )
            raise ValueError(f"{run.absolute()} is not the run directory of the main rank: {way}")
        mark("waiting to see the claim of the run")
        time.sleep(0.5)


def stop_file(run: Path) -> Path:
    """While it exists, the run saves, leaves and is not started again."""
    return run / "launch" / "stop"


def stop_command(run: Path) -> str:
    """What a user types to stop the process that writes the run."""
    return f"python -m launch stop {shlex.quote(str(run))}"


def stop_requested(run: Path) -> bool:
    """Whether it is there: opened, since NFS may show for a minute a file that was removed."""
    try:
        stop_file(run).open().close()
    except FileNotFoundError:
        return False
    except PermissionError:
        pass
    return True


def request_stop(run: Path) -> None:
    """Ask the process that writes the run to save and leave."""
    stop_file(run).touch()


def way_to_resume(run: Path) -> str:
    """How to resume a run that has stopped, in words: a request to stop stays."""
    if os.path.exists(stop_file(run)):  # False on errors, unlike that of a Path
        return f"to resume, run `python -m launch ...` or delete {stop_file(run)}"
    return "rerun the same command to resume"


def _write(run: Path, holder: Holder) -> None:
    files.write(_file(run), json.dumps(asdict(holder), indent=1) + "\n", writer=holder.token)


def _file(run: Path) -> Path:
    return run / "launch" / "writer.json"


def beat(run: Path) -> int:
    """The time of the last sign of life, in ns by the file system's clock; 0 if there is none."""
    return files.touched(_file(run))
