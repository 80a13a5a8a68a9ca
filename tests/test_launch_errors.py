"""User errors are refused on the login node: in one line, with status 78, nothing is written."""

import ast
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.exits import REFUSED
from launch import cluster as clusters
from launch import records
from launch.__main__ import main
from launch.cluster import Cluster, Slurm
from tests.test_launch_texts import ROOT, big_job

SLURM = str(ROOT / "launch" / "clusters" / "slurm.toml")
DRY_RUNS = pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["", "dry-run"])


def refused(*words: object) -> None:
    """Run `python -m launch`, which must return 78."""
    assert main([str(word) for word in words]) == REFUSED == 78


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lancher = 'slurm'", r"unknown setting 'lancher' \(nearest: 'launcher'\)"),
        ("partition = 'gpu'", r"'partition' \(nearest: 'slurm.partition', in \[slurm\]\)"),
        ("launcher = 'pbs'", 'launcher = \'pbs\': must be one of "slurm", "mpirun"'),
        ("[slurm]\ntime = 5", "slurm.time = 5: must be a string"),
        ("[slurm]\ntime = '1 day'", "slurm.time = '1 day': must be such as"),
        ("[slurm]\ntime = '24h'", "slurm.time = '24h': must be such as"),
        ("[slurm]\ntime = '1:2:3:4'", "slurm.time = '1:2:3:4': must be such as"),
        ("[slurm]\ntime = ''", "slurm.time = '': must be such as"),
        ("[slurm]\ngres = ''", "slurm.gres = '': must be such as .* or \"none\" to leave it out"),
        ("[slurm]\ngres = 'gpu:4'", "slurm.gres = 'gpu:4': must be such as .* without a number"),
        ("[slurm]\ngres = 'gpu:h100:4'", "slurm.gres = 'gpu:h100:4': must be such as"),
        ("seconds_to_save = 0", "seconds_to_save = 0: must be from 1 to 65535"),
        ("[slurm]\nseconds_to_save = 0", "seconds_to_save = 0: must be from 1 to 65535"),
        ("patience = 1", "patience = 1: must be at least 10 seconds"),
        ("launcher = 'kubernetes'", r"add a section \[kubernetes\]"),
        ("[kubernetes]\nimage = 'x'", "setting 'kubernetes.claim' is missing"),
        ("launcher = 'mpirun'\n[container]\nkind = 'pyxis'\nimage = 'x'", 'must be "slurm" with'),
        ("python = '$SCRATCH/venv/bin/python'", "python = '.SCRATCH.*': must be without variables"),
        ("python = '~you/venv/bin/python'", "python = '~you/.*': must be without variables"),
        ("[environment]\nHF_HOME = '$HOME/hf'", "environment.HF_HOME = .* export it in `setup`"),
        (
            "[slurm]\noptions = ['--comment=$(date)']",
            "slurm.options = .* must be without variables",
        ),
        ("[environment]\n'A B' = 'x'", "environment = 'A B': must be a table"),
        ("python = ''", "python = '': must be one program, without options"),
        ("python = 'python3 -u'", "python = 'python3 -u': must be one program"),
        ("hosts = ['n1', '']", "hosts = '': must be names of machines"),
        ("hosts = ['a b']", "hosts = 'a b': must be names of machines"),
        ("hosts = ['-oProxyCommand=x']", "hosts = '-oProxyCommand=x': must be names"),
        ("hosts = ['n1', 'n2', 'me@n1']", "hosts = 'n1': must be in the list once"),
        ("port = -1", "port = -1: must be from 1 to 65535"),
        ("port = 70000", "port = 70000: must be from 1 to 65535"),
        ("launcher = ", "is not valid TOML"),
    ],
)
def test_an_invalid_cluster_file_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        clusters.load(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_home_directory_is_expanded_as_a_shell_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "site.toml"
    file.write_text(
        "python = '~/venv/bin/python'\nsetup = ['source ~/env.sh $SCRATCH']\n"
        "[environment]\nLD_LIBRARY_PATH = '~/lib:~/lib64:/a~/b'\n"
        "[container]\nkind = 'pyxis'\nimage = '~/adm.sqsh'\nmounts = ['~/data:/data', '/a:/b']"
    )
    site = clusters.load(file)
    assert site.python == "/home/me/venv/bin/python"
    assert site.setup == ("source ~/env.sh $SCRATCH",)
    assert site.environment == {"LD_LIBRARY_PATH": "/home/me/lib:/home/me/lib64:/a~/b"}
    assert site.container is not None
    assert site.container.image == "/home/me/adm.sqsh"
    assert site.container.mounts == ("/home/me/data:/data", "/a:/b")


def test_seconds_to_save_is_still_read_from_the_section_slurm(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text("[slurm]\nseconds_to_save = 120\n")
    assert clusters.load(file).seconds_to_save == 120
    file.write_text("seconds_to_save = 120\n[slurm]\nseconds_to_save = 120\n")
    assert clusters.load(file).seconds_to_save == 120
    file.write_text("seconds_to_save = 60\n[slurm]\nseconds_to_save = 120\n")
    message = "slurm.seconds_to_save = 120: must be equal to seconds_to_save = 60, or absent"
    with pytest.raises(ValueError, match=message):
        clusters.load(file)


@pytest.mark.parametrize(
    "lines",
    [
        "time = '5'",
        "time = '0-0:5'",
        "time = '4:01'",
        "time = '8:00:00'\noptions = ['--time=3']",
        "options = ['--time 3']",
    ],
)
def test_a_time_limit_that_leaves_no_time_to_train_is_refused_in_words(
    lines: str, tmp_path: Path
) -> None:
    file = tmp_path / "site.toml"
    file.write_text(f"[slurm]\n{lines}\n")
    message = (
        r"slurm.time is \d min 0 s: must be above seconds_to_save, 5 min 0 s, or no time is left"
    )
    with pytest.raises(ValueError, match=message):
        clusters.load(file)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("6", 360),
        ("90:30", 91 * 60),  # Slurm rounds up to minutes
        ("2:00:00", 7200),
        ("1-12", 36 * 3600),
        ("1-12:30", 36 * 3600 + 1800),
        ("1-12:30:00", 36 * 3600 + 1800),
        ("0", math.inf),
        ("unlimited", math.inf),
        ("INFINITE", math.inf),
    ],
)
def test_a_time_limit_is_read_as_slurm_reads_it(time: str, seconds: float) -> None:
    assert Cluster(slurm=Slurm(time=time)).slurm.limit() == seconds


def test_a_time_limit_of_a_minute_is_enough_where_little_is_kept_to_save() -> None:
    site = Cluster(slurm=Slurm(time="1"), seconds_to_save=25)
    assert site.slurm.limit() == 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digitz", "--run", "r"], "unknown preset 'digitz' (nearest: 'digits')"),
        (["logs", "runs/a"], "a file of your own ends in .toml; verbs are status, stop, check, "),
        (["digits", "--run", "r", "--nodes", "2"], "--nodes = 2: must be 1 on this machine"),
        (["digits", "--run", "r", "--nodes", "0"], "--nodes = 0: must be at least 1"),
        (["digits", "--run", "r", "--set", "lr"], "--set 'lr' is not TOML"),
        (["digits", "--run", "r", "--cluster", "none.toml"], "cannot read none.toml"),
        (["digits", "--run", "r", "--check"], "--check: not available with launcher = 'alone'"),
        (["digits", "--run", "a b"], "/a b': must be a path whose last part"),
        (["digits", "--run", "/proc/1/none"], "/proc/1/none"),
        (["status", "nowhere"], "nowhere is not a run directory"),
        (["stop", "nowhere"], "is not a run directory"),
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
        ["check", "--rank", "x"],
        ["digits", "--run", ""],
        ["digits", "--run=~/x"],
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


@DRY_RUNS
@pytest.mark.parametrize("verb", ["", "sweep"])
def test_an_unknown_setting_is_refused_on_the_login_node(
    verb: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--runs" if verb else "--run", tmp_path / "runs")
    words = (*filter(None, [verb]), "digits", *where, "--set", "training.lrr = 1", *options)
    refused(*words, "--cluster", SLURM)
    said = capsys.readouterr()
    assert "unknown setting 'training.lrr' (nearest: 'lr')" in said.err
    assert said.out == "" and not (tmp_path / "runs").exists()


@DRY_RUNS
@pytest.mark.parametrize("verb", ["", "sweep"])
def test_a_batch_that_does_not_divide_among_the_ranks_is_refused_on_the_login_node(
    verb: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--runs" if verb else "--run", tmp_path / "runs")
    size = ("--nodes", 3, "--gpus-per-node", 7)
    words = (*filter(None, [verb]), "imagenet64", *where, *size, *options)
    refused(*words, "--cluster", SLURM)
    said = capsys.readouterr()
    assert "training.batch = 2048 does not divide among 21 ranks" in said.err
    assert said.out == "" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("run", "shards", "message"),
    [
        ("/runs/512-lsun", "/runs/shards", "beginning with a letter"),
        ("/runs/" + 51 * "x", "/runs/shards", "at most 50 letters"),
        ("/elsewhere/lsun", "/runs/shards", "must be below kubernetes.mount = '/runs'"),
        ("/runs/lsun", "shards/lsun", "data.shards = 'shards/lsun': must be an absolute path"),
    ],
)
def test_names_and_directories_that_pods_cannot_have_are_refused(
    run: str, shards: str, message: str
) -> None:
    job = dataclasses.replace(big_job("kubernetes"), run=Path(run), shards=shards)
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
    ast.parse((ROOT / "launch" / "__main__.py").read_text(), feature_version=(3, 8))
    done = subprocess.run([sys.executable, "-c", OLD], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == REFUSED
    assert "Python 3.9.18 (" in done.stderr and "must be Python 3.11 or newer" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_the_output_may_leave(tmp_path: Path, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "launch", "digits", "--run", str(tmp_path / "run")]
    ended = subprocess.run(
        [*command, "--cluster", SLURM, "--dry-run"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")
