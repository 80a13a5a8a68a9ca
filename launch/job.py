"""A run to be started: what it asks for, and the commands of its ranks.

`launch.slurm`, `launch.kubernetes` and `launch.hosts` render it to text, and that is pure. The text
is what runs: it is kept in the run directory, `--dry-run` prints it, and `bash`, `sbatch` and
`kubectl` get nothing else.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import Cluster
from launch.shell import quoted
from trainer.adm.config import check
from trainer.config import settings
from trainer.ranks import world


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run on `nodes` machines, with a rank for each of their `gpus_per_node` GPUs."""

    run: Path
    nodes: int
    gpus_per_node: int
    cluster: Cluster
    #: The current directory of the user: relative paths in the preset start here.
    directory: Path
    #: The file of the run's settings, of which the job reads its own copy; None for one that draws.
    preset: Path | None = None
    #: Changed settings of the preset, as `--set` takes them.
    overrides: tuple[str, ...] = ()
    #: Settings left out of the preset, as `--unset` takes them.
    unset: tuple[str, ...] = ()
    #: The weights that a new run starts from, and the parts of the network that do not.
    init: Path | None = None
    init_skip: tuple[str, ...] = ()
    #: The checkpoint that the run goes back to, once.
    back: str | None = None
    #: DeepSpeed's settings in place of the checkout's; the job reads its own copy.
    ds_config: Path | None = None
    #: Run the preflight check before training.
    check: bool = False
    #: Draw images by trainer.sample with these words, and train nothing.
    sample: tuple[str, ...] | None = None
    #: `data.shards` of the preset, which the preflight check tries to read.
    shards: str | None = None

    def __post_init__(self) -> None:
        check(self.nodes >= 1, "--nodes", self.nodes, "at least 1")
        check(self.gpus_per_node >= 1, "--gpus-per-node", self.gpus_per_node, "at least 1")
        for path in (self.run, self.directory):
            assert path.is_absolute()
        plain = self.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        characters = "a path whose last part, the job's name, has only letters, digits, - _ and ."
        check(plain, "--run", str(self.run), characters)
        is_writable = self.cluster.launcher != "slurm" or "\\" not in str(self.run)
        check(is_writable, "--run", str(self.run), "a path without backslashes under Slurm")
        self._check_launcher()

    def _check_launcher(self) -> None:
        """Refuse a size or a preflight check that the launcher cannot start."""
        launcher, hosts = self.cluster.launcher, len(self.cluster.hosts)
        if launcher == "alone":
            one = "1 on this machine; for more, set `launcher` in a --cluster file"
            check(self.nodes == 1, "--nodes", self.nodes, one)
        if self.check and launcher not in ("slurm", "mpirun"):
            raise ValueError(
                f"--check: not available with launcher = {launcher!r}; start "
                "`python -m launch check` on every rank yourself"
            )
        if launcher in ("mpirun", "deepspeed", "torchrun"):
            listed = f"the number of `hosts` in the cluster file, {hosts}"
            check(self.nodes == hosts, "--nodes", self.nodes, listed)

    @property
    def name(self) -> str:
        """The job's name in a queue: that of the run directory."""
        return self.run.name

    @property
    def ranks(self) -> int:
        """How many ranks train together."""
        return self.nodes * self.gpus_per_node

    @property
    def code(self) -> Path:
        """The code that runs: a copy made when the job was submitted."""
        return self.run / "code"

    @property
    def records(self) -> Path:
        """The directory of the job's files: preset, script, job id, events, output."""
        return self.run / "launch"

    @property
    def ds_config_copy(self) -> Path:
        """DeepSpeed's settings that the job reads."""
        return (self.code if self.ds_config is None else self.records) / "ds_config.json"

    @property
    def script(self) -> Path:
        """The script, or for Kubernetes the manifest, that starts the job."""
        is_manifest = self.cluster.launcher == "kubernetes"
        return self.records / ("job.yaml" if is_manifest else "job.sh")

    @property
    def port(self) -> int:
        """Where the ranks of `deepspeed` and torchrun meet: by default a port of this run's own."""
        return self.cluster.port or 20000 + zlib.crc32(str(self.run).encode()) % 10000

    @property
    def gpus_shown(self) -> tuple[str, ...]:
        """The option that says how many GPUs each node must show."""
        if self.cluster.cpu:
            return ("--gpus", "0")
        # Without a cluster file a run takes what there is.
        is_any = self.cluster.launcher == "alone"
        return () if is_any else ("--gpus", str(self.gpus_per_node))

    @property
    def rank_words(self) -> tuple[str, ...]:
        """The command line of a rank after `python`."""
        if self.sample is None:
            return self._train_words
        words = ["-m", "trainer.sample", "--patience", str(self.cluster.patience), *self.sample]
        return (*words, "--job", str(self.run), "--ranks", str(self.ranks), *self.gpus_shown)

    @property
    def _train_words(self) -> tuple[str, ...]:
        words = ["-m", "trainer.train", f"{self.records}/preset.toml", "--run", str(self.run)]
        words += ["--ds-config", str(self.ds_config_copy), "--ranks", str(self.ranks)]
        words += ["--patience", str(self.cluster.patience), *self.gpus_shown]
        words += settings.words(self.overrides, self.unset)
        words += ["--init", str(self.init)] if self.init else []
        words += ["--init-skip", *self.init_skip] if self.init_skip else []
        words += ["--from", self.back] if self.back else []
        return tuple(words)

    @property
    def check_words(self) -> tuple[str, ...]:
        """The preflight check's command line after `python`."""
        data = ("--data", self.shards) if self.shards else ()
        words = ("-m", "launch", "check", "--ranks", str(self.ranks), *self.gpus_shown)
        return (*words, "--run", str(self.run), *data)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every rank's environment.

        PYTHONSAFEPATH keeps the current directory, which may be a checkout, out of the imports.
        """
        ours = {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.cluster.cpu else {}
        return {**self.cluster.environment, **ours, **hidden}


def preamble(job: Job) -> str:
    """The first lines of every script: the directory, the site's setup, the environment.

    What the user's shell says of ranks is of another job. The setup and the environment may set it.
    The setup sees the site's environment, which site modules read, and what it changes there is
    changed back.
    A script that defines `refuse` goes before; a rank of `deepspeed` gets its number in RANK.
    """
    enter = f"cd {quoted([job.directory])} || refuse {quoted([f'cannot enter {job.directory}'])}"
    enter += '" on $(hostname): rerun the command in a directory that every machine has"'
    forget = f"case $1 in check | rank) ;; *) unset {quoted(world.VARIABLES)} ;; esac"
    setup, exports = setup_lines(job), _exports(job.environment)
    before = _exports(job.cluster.environment) if setup else []
    python = Path(job.cluster.python)
    if python.is_absolute():  # the tools beside it go first, as in an activated environment
        exports.insert(0, f"export PATH={quoted([python.parent])}:$PATH")
    return "\n".join([enter, forget, *before, *setup, *exports])


def _exports(environment: Mapping[str, str]) -> list[str]:
    return [f"export {name}={quoted([value])}" for name, value in environment.items()]


def setup_lines(job: Job) -> list[str]:
    """The site's setup; a line that fails ends the job and is named.

    It may set variables and clean up at the script's end, but not how the script after it ends: a
    file that it sources may begin with `set -euo pipefail`.
    """
    ended = "ended=$? failed=$setup setup="
    said = 'with status $ended: $failed"'
    # Also where a line, or a file that it sources, exits: the job would end without a word.
    ends = (
        f'trap \'{ended}; [ -z "$failed" ] || refuse "the setup line ended the script {said}\' EXIT'
    )
    run = f'eval "$setup" || {{ {ended}; refuse "the setup line failed {said}; }}'
    lines = [f"setup={quoted([line])}; {run}" for line in job.cluster.setup]
    return [ends, *lines, "setup=; set +eEu; trap - ERR"] if lines else []
