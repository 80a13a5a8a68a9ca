"""The run directory: a run is a directory, and the same command on it resumes.

`RUN/`: `config.toml` and `ds_config.json` as resolved, `init.json`, `log.txt`, `metrics.jsonl`,
`incidents.jsonl`, `tensorboard/`, `samples/`, `evaluations/`, `checkpoints/`, `averages/`,
`launch/` with `state.json`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import files
from data.config import shown
from data.progress import duration, on_terminal
from data.version import version
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.config.settings import is_in
from trainer.ranks.faults import failed_hosts, named_hosts
from trainer.ranks.world import host_name
from trainer.run import goodput
from trainer.run import lease as leases
from trainer.run.checkpoint import config_of
from trainer.run.lease import Lease, LeaseLost
from trainer.run.records import Records
from trainer.run.runstate import RunState, committed

# What a run may not change when it is resumed: its weights or its order would mean another thing.
_FIXED = (
    "objective",
    "model",
    "diffusion",
    "training.seed",
    "training.timesteps",
    "training.label_dropout",
    "training.ema",
    "training.ema_images",
    "training.ema_warmup",
    "training.ema_widths",
    "data.streams",
    "data.block",
)
_FREE = ("model.checkpoint",)
# Seconds by which a machine's clock may be off without a word.
_MOST_SKEW = 60.0


@dataclass(frozen=True)
class Run:
    """The paths of a run, and its log. Only the main rank writes, once it has claimed the run."""

    path: Path
    #: The right to write the run; the main rank's alone.
    lease: Lease | None = None
    #: Names the claim of this start, on all ranks.
    token: str = ""
    # Writes what training goes on without; the main rank's alone.
    _records: Records | None = None

    @contextmanager
    def claimed(self, *, mark: Callable[[str], None] = leases.unmarked) -> Iterator["Run"]:
        """This run, with the right to write it. How it ends is noted in its state.

        `mark` is told what it waits for.

        Raises:
            ValueError: another job writes it.
        """
        last_sign = leases.beat(self.path) / 1e9
        lease = leases.claim(self.path, mark=mark)
        records = Records(self.path, check=lease.check, show=_show)
        run = replace(self, lease=lease, token=lease.me.token, _records=records)
        try:
            before = RunState.read(self.path)
            starts = 1 + (before.starts if before else 0)
            run._note(
                state="running",
                starts=starts,
                began=time.time(),
                version=version(),
                why=None,
                lost=None,
                job_id=lease.me.job,
            )
            lease.starts = starts
            job_id = lease.me.job
            run._tell_skew(goodput.note_start(self.path, last_sign=last_sign, job_id=job_id))
            yield run
            records.settle()
        except LeaseLost:
            raise
        except (Exception, KeyboardInterrupt) as error:
            # A full disk, or a lost lease, must not take the place of the error.
            with suppress(OSError, LeaseLost):
                records.wait()
                run.check_lease()
                run._note_failure(error)
            raise
        finally:
            with suppress(OSError, LeaseLost):
                run.check_lease()
                state = RunState.read(self.path)
                goodput.append(self.path, goodput.row("end", state=state.state if state else ""))
            with suppress(OSError):
                lease.release()

    def _tell_skew(self, ahead: float) -> None:
        """Log by how many seconds this machine's clock is ahead of the files', where it is much."""
        if abs(ahead) > _MOST_SKEW:
            host, how = host_name(), "ahead of" if ahead > 0 else "behind"
            self.log(
                f"the clock of {host} is {duration(abs(ahead))} {how} that of the file system of "
                f"{self.path}: times in this log and on the boards are by the clock of {host}"
            )

    def _note_failure(self, error: BaseException) -> None:
        found = RunState.read(self.path)
        if isinstance(error, KeyboardInterrupt):
            self._note(state="stopped", why="by Ctrl-C before it saved")
        # Where another rank's end was noted already, the error only follows from that.
        elif found is None or found.state == "running":
            state = "refused" if isinstance(error, ValueError) else "failed"
            why = shown(f"{error}") or type(error).__name__
            self._note(state=state, why=why, lost=failed_hosts(error))

    def check_lease(self) -> None:
        """Raise LeaseLost unless this process may still write. Ahead of every append and commit."""
        assert self.lease is not None, "claim the run before writing it"
        self.lease.check()

    @property
    def stop_requested(self) -> bool:
        """Whether `python -m launch stop` wants the run to end; the main rank knows."""
        return self.lease is not None and self.lease.stop_requested

    @property
    def config_file(self) -> Path:
        """The resolved config of the last start."""
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Where grids are kept."""
        return self.path / "samples"

    @property
    def evaluations(self) -> Path:
        """Where the results of evaluations are kept."""
        return self.path / "evaluations"

    def adopt(self, config: Config) -> Config:
        """`config` with EMA decays per step, if the run that is here counts them so.

        Version 0.1 knew no other way, and the presets' counts in images would be another average.

        Raises:
            ValueError: the run's config cannot be read.
        """
        training = config.training
        if training.ema_images is None or not committed(self.checkpoints):
            return config
        if not self.config_file.is_file() or self._before().training.ema_images is not None:
            return config
        return replace(config, training=replace(training, ema_images=None, ema_warmup=None))

    def check(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """What `config` changes of the run that is here; touches nothing.

        Raises:
            ValueError: the directory holds something else, or a run that `config` cannot continue.
        """
        files.check_text(str(self.path), option="--run")
        for path in (self.path, self.checkpoints):
            files.check_link(path)
        # What the launcher, or a start without a step, leaves.
        few = {"launch", "code", "log.txt"}
        if not self.path.exists() or (self.path.is_dir() and few.issuperset(os.listdir(self.path))):
            return {}
        if not self.config_file.is_file():
            raise ValueError(
                f"{self.path} exists and is no run directory (it has no config.toml): "
                "name a new directory with --run"
            )
        # Credentials of an address may change, and are not written.
        changes = configs.changes(configs.public(self._before()), configs.public(config))
        # Before the first checkpoint there is nothing that another config could not continue.
        if committed(self.checkpoints) and (fixed := fixed_among(changes)):
            raise ValueError(
                f"the run was started with another config: {', '.join(fixed)}; "
                "give the same preset and --set, or another --run directory (with --init "
                f"{self.path} to start from its weights)"
            )
        return changes

    def _before(self) -> Config:
        """The config of the run that is here.

        config.toml may have been edited since; a checkpoint says what it was trained with.
        """
        return config_of(self.checkpoints) or configs.load(self.config_file)

    def open(self, config: Config, *, ds_config: dict[str, Any]) -> None:
        """Create the directory, or update its record of the config."""
        self.check_lease()
        files.write(self.config_file, configs.to_toml(configs.public(config)))
        files.write(self.path / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")

    def attempt(self, what: str, write: Callable[[], object]) -> None:
        """Write what training can go on without, behind it and in order; see `Records`.

        Raises:
            ValueError: another start has taken the run over.
        """
        assert self._records is not None, "claim the run before writing it"
        self._records.write(what, write)

    def settle(self) -> None:
        """Wait for what is written behind, ahead of a commit; LeaseLost as `check_lease`."""
        assert self._records is not None, "claim the run before writing it"
        self._records.settle()
        self.check_lease()

    def note(self, **changes: Any) -> None:
        """Change entries of `launch/state.json`."""
        self.attempt("launch/state.json", lambda: self._note(**changes))

    def _note(self, **changes: Any) -> None:
        state = RunState.read(self.path) or RunState(state="running")
        replace(state, **changes).write(self.path)

    def keep(self, file: Path, content: bytes | str) -> None:
        """Write a file of a directory of the run, such as `samples/`, which is made if need be."""

        def write() -> None:
            file.parent.mkdir(exist_ok=True)
            files.write(file, content)

        self.attempt(f"{file.parent.name}/", write)

    def add_row(self, name: str, row: str) -> None:
        """Append a row to a file; where there is no room it waits for the next row of any file."""
        assert self._records is not None, "claim the run before writing it"
        self._records.add_row(name, row)

    def log(self, text: str) -> None:
        """A dated line to the terminal and to log.txt."""
        line = _dated(text)
        self.attempt("log.txt", lambda: self._append(line))
        _show(line)

    def log_lost_rank(self, text: str) -> None:
        """A dated line about a lost rank, and the state "failed". Any rank may call it."""
        if self._records is not None:
            self._records.wait()
        with suppress(OSError):  # it has been printed
            self._append(_dated(text))
        with suppress(OSError):
            holder = leases.holder(self.path)
            if holder is not None and holder.token == self.token:
                self._note(state="failed", why=text, lost=named_hosts(text))

    def _append(self, line: str) -> None:
        files.append(self.path / "log.txt", line + "\n")


def _dated(text: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S%z')}  {shown(text)}"


def _show(line: str) -> None:
    """Print a line; on a terminal it covers what the progress line left."""
    with suppress(OSError):  # the scheduler's file of it may be on the disk that is full
        print(line.ljust(79) if on_terminal() else line, flush=True)


def fixed_among(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Those of the changes that a run with a checkpoint may not make, in words."""
    return [
        f"{name} = {a!r} (now {b!r})"
        for name, (a, b) in changes.items()
        if name not in _FREE and any(is_in(name, part) for part in _FIXED)
    ]
