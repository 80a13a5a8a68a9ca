"""Cluster files: what is wrong in one is refused in one line, and what is read from it."""

import dataclasses
import math
import pwd
from pathlib import Path

import pytest

from launch import cluster as clusters
from launch import records
from launch.cluster import Cluster, Slurm
from tests.test_launch_texts import big_job


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
        (
            "[slurm]\npartition = 'main # old'",
            "slurm.partition = 'main # old': must be without spaces",
        ),
        ("[slurm]\naccount = 'a --exclusive'", "slurm.account = .*: must be without spaces"),
        ("[slurm]\nqos = '''\nhigh\n'''", "slurm.qos = .*: must be without spaces"),
        ("[slurm]\noptions = ['--exclusive\\nreboot']".replace("'", '"'), "slurm.options = "),
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
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as for a user of a container
    with pytest.raises(ValueError, match="~/venv/bin/python: HOME is not set: write whole paths"):
        clusters.load(file)


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
    ("site", "section"),
    [("slurm", "slurm"), ("slurm-pyxis", "container"), ("kubernetes", "kubernetes")],
)
def test_each_setting_of_a_section_changes_the_text(site: str, section: str) -> None:
    others = {
        "time": "2:00:00", "cpus_per_task": 7, "gpus_flag": "gpus-per-node", "requeue": False,
        "options": ("--nice",), "kind": {"container": "apptainer"}.get(section, "TrainJob"),
        "mounts": ("/a:/b",), "resources": {"memory": "1Gi"}, "tolerations": ("a",), "restarts": 3,
        "mount": "/",
    }  # fmt: skip
    job = big_job(site)
    now = getattr(job.cluster, section)
    for field in dataclasses.fields(now):
        other = dataclasses.replace(now, **{field.name: others.get(field.name, "other")})
        assert getattr(other, field.name) != getattr(now, field.name)
        cluster = dataclasses.replace(job.cluster, **{section: other})
        text = records.text(dataclasses.replace(job, cluster=cluster))
        is_told = text != records.text(job)
        assert is_told, f"{section}.{field.name} is left out"
