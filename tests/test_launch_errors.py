"""User errors are refused on the login node: in one line, with status 78, nothing is written."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.exits import REFUSED
from launch import records
from launch.__main__ import main
from launch.cluster import Cluster
from tests.support.data_fixtures import image_file
from tests.test_launch_texts import ROOT, big_job

SLURM = str(ROOT / "launch" / "clusters" / "slurm.toml")
DRY_RUNS = pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["", "dry-run"])


def refused(*words: object) -> None:
    """Run `python -m launch`, which must return 78."""
    assert main([str(word) for word in words]) == REFUSED == 78


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digitz", "--run", "r"], "unknown preset 'digitz' (nearest: 'digits')"),
        (["logs", "runs/a"], "a file of your own ends in .toml; verbs are status, stop, check, "),
        (["digits", "--run", "r", "--nodes", "2"], "--nodes = 2: must be 1 on this machine"),
        (["digits", "--run", "r", "--nodes", "0"], "--nodes = 0: must be at least 1"),
        (["digits", "--run", "r", "--set", "lr"], "--set 'lr' is not TOML"),
        (
            ["digits", "--run", "r", "--cluster", "none.toml"],
            "cannot read none.toml: no such file; copy",
        ),
        (["digits", "--run", "r", "--check"], "--check: not available with launcher = 'alone'"),
        (
            ["digits", "--run", "r", "--init", "none.pt"],
            "--init none.pt: no such file or directory",
        ),
        (["digits", "--run", "r", "--init-skip", "out"], "--init-skip out needs --init"),
        (["digits", "--run", "r", "--from", "8"], "--from 8: r has no such checkpoint; it has: no"),
        (["digits", "--run", "r", "--ds-config", "no.json"], "DeepSpeed config: no.json; leave"),
        (["digits", "--run", "a b"], "/a b': must be a path whose last part"),
        (["digits", "--run", "/proc/1/none"], "/proc/1/none"),
        (["digits", "--run", "gr\udcf6n", "--dry-run"], "/gr\\udcf6n': must be UTF-8"),
        (
            ["status", "nowhere"],
            "nowhere is not a run directory; there is nothing of this name: give the one that --r",
        ),
        (
            ["stop", "nowhere"],
            "is not a run directory; there is nothing of this name: give the one",
        ),
        (["stop", "/"], "/ is not a run directory; give the one that --run named"),
        (["sweep", "digits", "--runs", "r"], "launcher = 'alone': must be \"slurm\" for an array"),
        (["sweep", "digits", "--runs", "r", "--at-most", "0"], "--at-most = 0: must be at least 1"),
        (
            ["sweep", "digits", "--runs", "r", "--over", "training.lr = 1"],
            "--over = 'training.lr = 1'",
        ),
        (["sweep", "digits", "--runs", "r", "--over", "training.lr = [1, 1]"], "different values"),
        (
            ["digits", "--run", "r", *2 * ["--set", "training.lr = 1"]],
            "training.lr is set more than once",
        ),
        (
            ["digits", "--run", "r", "--set", "training = {lr = 1}", "--set", "training.lr = 2"],
            "training.lr is set more than once",
        ),
        (
            ["sweep", "digits", "--runs", "r", *2 * ["--over", "training.lr = [1, 2]"]],
            "training.lr is set more than once",
        ),
        (["sample", "r", "--out", "."], "--out = '.': must be a file FILE.npz, or a directory"),
        (["sample", "r", "--out", "o.npz", "--at-most", "2"], "must be absent without --array"),
        (["sample", "r", "--out", "o.npz", "--array", "0"], "--array = 0: must be at least 1"),
        (["sweep", "digits", "digits", "--runs", "r"], "must be presets of different names"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(*words)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["digits"],
        ["digits", "--run", "r", "--nodes", "two"],
        ["status"],
        ["stop", "a", "b"],
        ["sweep", "digits"],
        ["sample", "runs/a"],
        ["sample", "--out", "a.npz"],
        ["sample", "runs/a", "--out", "a.npz", "--stepz", "9"],
        ["sample", "runs/a", "--out", "a.npz", "--share", "3/3"],
        ["check", "--rank", "x"],
        ["digits", "--run", ""],
        ["digits", "--run=~/x"],
        ["sample", "r", "--out=~/x.npz"],
        ["sweep", "digits", "--runs", ""],
        ["digits", "--run", "r", "--cluster", ""],
    ],
    ids=" ".join,
)
def test_a_wrong_option_of_any_verb_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == REFUSED
    assert "usage: python -m launch" in capsys.readouterr().err


NETS = "w.pt --preset imagenet64 --out o.npz"


@DRY_RUNS
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("none --out o.npz", "SOURCE none: no such file or directory"),
        ("run --out o", "--out = 'o': must be a file that ends in .npz, or a directory, which end"),
        ("run --out o/ --images 0", "--images = 0: must be at least 1"),
        ("run --out o.npz --scale 2", "--scale = 2.0: must be absent without --classifier"),
        ("run --out o.npz --classifier none", "--classifier none: no such file or directory"),
        ("run --out o.npz --upsampler w.pt", "for a weights file, add --upsampler-preset"),
        ("run --out o.npz --low-res none.npz", "--low-res none.npz: no such file or directory"),
        ("run --out o.npz --labels none.txt", "--labels none.txt: no such file or directory"),
        ("w.pt --out o.npz", "w.pt is no run directory; for a weights file, add --preset"),
        ("w.pt --preset digitz --out o.npz", "unknown preset 'digitz' (nearest: 'digits')"),
        ("run --out o.npz --ranks 2", "--ranks = 2: must be absent: --nodes and --gpus-per-node s"),
        ("run --out o/ --array 2 --share 0/3", "--share = (0, 3): must be absent with --array"),
        ("run --out o/ --array 2 --upsampler run", "--array = 2: must be absent with --upsampler"),
        ("run --out o.npz --classifier-preset x", "--classifier-preset = 'x': must be absent wit"),
        ("run --out o.npz --ema 0.5", "--ema = 0.5: must be one that the run keeps: 0.99, 0.995"),
        ("run --out o.npz --steps 5000", "--steps: respacing = '5000': must be at most 1000"),
        ("run/checkpoints/0 --out o.npz --cfg 2", "trained without training.label_dropout"),
        (f"{NETS} --classifier w.pt --classifier-preset classifier128", "cannot guide the network"),
        (
            f"{NETS} --upsampler w.pt --upsampler-preset upsample128_512",
            "enlarges 128 px, and w.pt",
        ),
        (
            f"{NETS} --upsampler w.pt --upsampler-preset upsample64_256 --upsampler-steps ddim600",
            "--upsampler-steps: ",
        ),
        (f"{NETS} --ema 0.9999", "--ema = 0.9999: must be absent for a weights file"),
        (f"{NETS} --low-res w.pt", "w.pt (preset imagenet64) is no upsampler: leave out --low-res"),
        ("w.pt --preset classifier64 --out o.npz", "is a classifier; give it as --classifier"),
    ],
)
def test_what_drawing_would_refuse_is_refused_on_the_login_node(
    words: str,
    message: str,
    options: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waited in the queue first."""
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints/0").mkdir(parents=True)
    shutil.copy(ROOT / "trainer/presets/digits.toml", "run/config.toml")
    Path("w.pt").touch()
    refused("sample", *words.split(), "--cluster", SLURM, *options)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "w.pt"}


@DRY_RUNS
@pytest.mark.parametrize("verb", ["", "sweep"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("digits --set training.lrr=1", "unknown setting 'training.lrr' (nearest: 'lr')"),
        (
            "imagenet64 --nodes 3 --gpus-per-node 7",
            "training.batch = 2048 does not divide among 21 ranks",
        ),
    ],
)
def test_a_config_is_checked_with_its_ranks_on_the_login_node(
    words: str,
    message: str,
    verb: str,
    options: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ("--runs" if verb else "--run", tmp_path / "runs")
    refused(*filter(None, [verb]), *words.split(), *where, *options, "--cluster", SLURM)
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == "" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": Path("/runs/512-lsun")}, "beginning with a letter"),
        ({"run": Path("/runs/" + 51 * "x")}, "at most 50 letters"),
        ({"run": Path("/elsewhere/lsun")}, "must be below kubernetes.mount = '/runs'"),
        ({"shards": "shards/lsun"}, "data.shards = 'shards/lsun': must be an absolute path"),
        ({"init": Path("/home/w.pt")}, "--init = '/home/w.pt': must be below kubernetes.mount"),
    ],
)
def test_names_and_directories_that_pods_cannot_have_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    job = dataclasses.replace(
        big_job("kubernetes"), **{"run": Path("/runs/lsun"), "shards": "/runs/shards"} | changes
    )
    with pytest.raises(ValueError, match=message):
        records.text(job)


def test_hosts_must_be_as_many_as_nodes() -> None:
    one = Cluster(launcher="mpirun", hosts=("a",))
    message = "--nodes = 64: must be the number of `hosts` in the cluster file, 1"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(big_job("slurm"), cluster=one, check=False)


def test_a_machine_without_slurm_is_told_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("digits", "--run", tmp_path / "run", "--cluster", SLURM)
    assert "error: there is no sbatch on this machine: use a login node" in capsys.readouterr().err


OLD = """
import runpy, sys
sys.version_info = (3, 9, 18)
sys.modules["tomllib"] = None
runpy.run_module("launch", run_name="__main__")
"""


def test_an_old_python_on_the_login_node_is_told_which_one_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", OLD], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == REFUSED
    assert "Python 3.9.18 (" in done.stderr and "must be Python 3.11 or newer" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        (["launch", "digits", "--run", "{}/run", "--cluster", SLURM, "--dry-run"], ""),
        (["launch", "digits", "--run", "{}/run", "--cluster", SLURM, "--dry-run"], "1"),
        (["data.pack", "{}", "{}/out", "--dry-run"], ""),
        (["trainer.config.describe"], ""),
        (["trainer.preflight"], ""),
    ],
)
def test_a_reader_of_the_output_may_leave(
    tmp_path: Path, command: list[str], unbuffered: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    (tmp_path / "image.png").write_bytes(image_file(0, width=8, height=8, kind="PNG"))
    ended = subprocess.run(
        [sys.executable, "-m", *(word.format(tmp_path) for word in command)],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    lines = [line for line in ended.stderr.splitlines() if b"have no label" not in line]
    assert (ended.returncode, lines) == (128 + signal.SIGPIPE, [])
