"""A user on the test cluster's login node: starts runs there and reads what they left on disk."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import Cluster, wait_until
from trainer.run.runstate import RunState

_SETTINGS = """\
launcher = "{launcher}"
hosts = ["n1", "n2"]
options = {options}
setup = {setup}
seconds_to_save = 25
cpu = true
[environment]
OMP_NUM_THREADS = "1"
GLOO_SOCKET_IFNAME = "eth0"
TORCH_EXTENSIONS_DIR = "{extensions}"
[slurm]
{slurm}
"""
#: A run of this length is over on no machine before a test ends it.
ENDLESS = "training.images = 80000000"
# Images of a step of the tiny preset, which reports after each.
_BATCH = 8
# The pretended GPUs are requested as real ones are.
_SLURM = {"cpus_per_task": 2, "memory": '"4000"', "options": '["--gres=gpu:2"]'}


@dataclass(frozen=True)
class Site:
    """The cluster, and the tiny preset on its shared disk."""

    cluster: Cluster
    preset: Path

    def settings(
        self, launcher: str, *options: str, setup: Sequence[str] = (), **slurm: object
    ) -> Path:
        """A file for `--cluster`."""
        names = [launcher, *options, *(str(value) for value in slurm.values())]
        file = self.cluster.home / f"{'-'.join(n.strip('-') for n in names)}.toml".replace('"', "")
        lines = [f"{name} = {value}" for name, value in {**_SLURM, **slurm}.items()]
        file.write_text(
            _SETTINGS.format(
                launcher=launcher,
                options=json.dumps(options),
                setup=json.dumps(setup),
                extensions=self.cluster.environment["TORCH_EXTENSIONS_DIR"],
                slurm="\n".join(lines),
            )
        )
        return file

    def run(self, name: str) -> Path:
        return self.cluster.disk / 'it\'s at 90%n, "new"' / name

    def words(self, *words: object) -> list[object]:
        """`python -m launch` with these words."""
        return [sys.executable, "-m", "launch", *words]

    def start(
        self, name: str, settings: Path, *changes: str, nodes: int = 2, gpus: int = 2
    ) -> list[object]:
        """The words that start a run of the tiny preset."""
        sets = [word for change in changes for word in ("--set", change)]
        size = ["--nodes", nodes, "--gpus-per-node", gpus]
        where = ["--run", self.run(name), "--cluster", settings]
        return self.words(self.preset, *where, *size, *sets)

    def submit(self, name: str, settings: Path, *changes: str, **size: int) -> str:
        """Submit a run from the login node; returns the job id."""
        self.cluster.run("ctl", *self.start(name, settings, *changes, **size))
        return (self.run(name) / "launch" / "job").read_text().strip()

    def state(self, job: str) -> str:
        """Such as "RUNNING"; empty when the job is no longer in the queue."""
        said = self.cluster.run("ctl", "squeue", "-h", "-j", job, "-o", "%T", check=False)
        return "" if "Invalid" in said else said.strip()

    def wait_gone(self, job: str) -> None:
        wait_until(lambda: not self.state(job), f"the end of job {job}")

    def events(self, name: str) -> str:
        """What the batch script said."""
        return _text(self.run(name) / "launch" / "events.txt")

    def recorded(self, name: str) -> RunState:
        """What the run last recorded about itself."""
        return RunState.read(self.run(name)) or RunState(state="running")

    def log(self, name: str) -> str:
        return _text(self.run(name) / "log.txt")

    def output(self, name: str) -> str:
        """What the job's ranks printed."""
        files = sorted((self.run(name) / "launch").glob("slurm-*.out"))
        return "".join(_text(file) for file in files)

    def rows(self, name: str) -> list[dict]:
        """The metrics, line by line."""
        text = _text(self.run(name) / "metrics.jsonl")
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def imports_torch(self, name: str) -> bool:
        """Whether a rank of the run imports torch, or has done so."""
        words = ["-m trainer.train", name]
        pids = [pid for node in self.cluster.names for pid in self.cluster.pids(node, words)]
        return any("libtorch" in _text(Path(f"/proc/{pid}/maps")) for pid in pids)

    def losses(self, name: str) -> dict[int, float]:
        """The loss by images of steps that were taken; of one done again, the last one."""
        return {row["images"]: row["loss"] for row in self.rows(name) if "loss" in row}

    def wait_start(self, name: str, number: int) -> None:
        """Wait until the run's start of that number, from 0, has trained five steps."""
        first: dict[int, int] = {}

        def trained() -> bool:
            state = self.recorded(name)
            # A start first keeps the clock of the one before, then sets it to its checkpoint.
            seen, number_now = state.images_seen, state.starts - 1
            first[number_now] = min(first.get(number_now, seen), seen)
            return number_now >= number and seen >= first[number_now] + 5 * _BATCH

        try:
            wait_until(trained, f"start {number} of {name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.events(name)}\n{self.output(name)[-3000:]}")  # noqa: B904


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
