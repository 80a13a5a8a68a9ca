"""What a job runs from: copies of the code and of the preset, in the run directory.

The checkout may change while a job waits in a queue or between its starts; the run does not.
"""

import difflib
import json
import shutil
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch import kubernetes, slurm, writer
from launch.job import Job, local_text

ROOT = Path(__file__).parent.parent
_CODE = ("trainer", "data", "launch")


@dataclass(frozen=True)
class Submitted:
    """What is known of the job that was last started on a run."""

    launcher: str
    nodes: int
    gpus_per_node: int

    @classmethod
    def of(cls, run: Path) -> "Submitted | None":
        """What the run directory says; None when no job was started from `python -m launch`."""
        file = run / "launch" / "job.json"
        return cls(**json.loads(file.read_text())) if file.is_file() else None


def number(run: Path) -> str | None:
    """Slurm's number of the run's last job."""
    file = run / "launch" / "job"
    return file.read_text().strip() if file.is_file() else None


def find_preset(preset: str) -> Path:
    """The file of a preset's name or path.

    Raises:
        ValueError: there is none, or it is no TOML. What it says is for the trainer to check.
    """
    named = ROOT / "trainer" / "presets" / f"{preset}.toml"
    path = Path(preset) if preset.endswith(".toml") else named
    if not path.is_file():
        names = sorted(p.stem for p in named.parent.glob("*.toml"))
        near = difflib.get_close_matches(preset, names, n=1)
        hint = f" (nearest: {near[0]})" if near else f"; there are: {', '.join(names)}"
        raise ValueError(f"no preset {preset!r}{hint}")
    try:
        tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    return path


def check_changes(changes: tuple[str, ...]) -> None:
    """Return if every `--set` can be read.

    Raises:
        ValueError: one cannot.
    """
    for change in changes:
        try:
            tomllib.loads(change)
        except tomllib.TOMLDecodeError:
            raise ValueError(
                f"--set {change!r} is not TOML; write it as in the file: --set 'training.lr = 1e-4'"
            ) from None


def find_shards(preset: Path, changes: tuple[str, ...]) -> str | None:
    """Where the run's data is, as preset and `--set` say; the trainer checks what they say."""
    found = None
    for text in (preset.read_text(), *changes):
        data = tomllib.loads(text).get("data")
        found = data.get("shards", found) if isinstance(data, dict) else found
    return found if isinstance(found, str) else None


def text(job: Job) -> str:
    """What starts the job: a shell or batch script, or a manifest."""
    if job.cluster.launcher == "slurm":
        return slurm.text(job)
    if job.cluster.launcher == "kubernetes":
        return kubernetes.manifest(job)
    return local_text(job)


def script(job: Job) -> Path:
    """Where that text is kept."""
    manifest = job.cluster.launcher == "kubernetes"
    return job.records / ("job.yaml" if manifest else "job.sh")


def check_free(run: Path) -> None:
    """Return if no job is waiting for, or working on, the run.

    Raises:
        ValueError: one is.
    """
    job = number(run)
    state = slurm.state(job) if job else None
    if state is not None:
        raise ValueError(
            f"job {job} of {run} is {state}: wait for it, or stop it with "
            f"`python -m launch stop {run}`"
        )
    busy = writer.live_holder(run)
    if busy is not None:
        raise ValueError(f"{busy} is writing {run}: wait for it, or stop it")


def prepare(job: Job, *, preset: Path) -> Path:
    """Copy the code and the preset, and write the text; returns the text's file.

    What an earlier job left to tell its next start is removed.
    """
    job.records.mkdir(parents=True, exist_ok=True)
    _copy_code(job.code)
    shutil.copyfile(preset, job.records / "preset.toml")
    for left in ("stop", "failed-at", "job"):
        (job.records / left).unlink(missing_ok=True)
    facts: Mapping[str, object] = {
        "launcher": job.cluster.launcher,
        "nodes": job.nodes,
        "gpus_per_node": job.gpus_per_node,
    }
    (job.records / "job.json").write_text(json.dumps(facts) + "\n")
    script(job).write_text(text(job))
    return script(job)


def _copy_code(to: Path) -> None:
    partial = to.with_name(".code.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for package in _CODE:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / package, partial / package, ignore=ignored)
    shutil.copyfile(ROOT / "ds_config.json", partial / "ds_config.json")
    if to.exists():
        to.rename(to.with_name(f".code.{time.time_ns()}"))
    partial.rename(to)
    for old in to.parent.glob(".code.*"):
        shutil.rmtree(old)
