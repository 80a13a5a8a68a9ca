"""Submission, with a stand-in for sbatch: what it is given, and what is shown of its answer."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data.exits import REFUSED
from launch import records, status
from launch.__main__ import main

Sbatch = Callable[[str], None]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    """Makes sbatch a bash script of these lines, in the directory of the test."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def install(lines: str) -> None:
        file = tmp_path / "bin" / "sbatch"
        file.parent.mkdir()
        file.write_text(f"#!/bin/bash\n{lines}\n")
        file.chmod(0o755)

    return install


def submit(*lines: str) -> int:
    """Submit the digits by a cluster file with these lines in its section [slurm]."""
    Path("site.toml").write_text("\n".join(["[slurm]", *lines]))
    return main(["digits", "--run", "run", "--cluster", "site.toml"])


def test_a_job_submitted_from_an_interactive_job_inherits_nothing_of_it(
    sbatch: Sbatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch("env > env.txt; echo 7")
    inherited = {
        "SLURM_JOB_ID": "6",
        "SLURM_MEM_PER_CPU": "500",
        "SLURM_CPU_BIND": "none",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_EXPORT": "NONE",
        "SRUN_CPUS_PER_TASK": "1",
    }
    reach = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "east", "SLURM_JWT": "x"}
    for name, value in {**inherited, **reach}.items():
        monkeypatch.setenv(name, value)
    assert submit() == 0
    seen = set(Path("env.txt").read_text().splitlines())
    assert not seen & {f"{name}={value}" for name, value in inherited.items()}
    assert seen >= {f"{name}={value}" for name, value in reach.items()}


@pytest.mark.parametrize("lines", [(), ('account = "file"',)], ids=["", "in the file"])
def test_an_account_in_the_shell_counts_unless_the_cluster_file_names_one(
    lines: tuple[str, ...], sbatch: Sbatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch("env > env.txt; echo 7")
    monkeypatch.setenv("SBATCH_ACCOUNT", "shell")
    assert submit(*lines) == 0
    assert ("SBATCH_ACCOUNT=shell" in Path("env.txt").read_text()) == (not lines)


@pytest.mark.parametrize("said", ["47;east", "Submitted batch job 47 on cluster east"])
def test_the_job_id_is_found_behind_what_a_site_prints_before(
    said: str, sbatch: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch(f"echo '--- Welcome to cluster 3'; echo '--> Verifying 2 quotas...OK'; echo '{said}'")
    assert submit('time = "1:00:00"') == 0
    assert "job.sh as job 47; output: " in capsys.readouterr().out
    assert Path("run/launch/job").read_text() == "47\n"


def test_an_answer_without_a_job_id_is_shown(
    sbatch: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch("echo maintenance")
    assert submit('time = "1:00:00"') == REFUSED
    assert (
        "sbatch printed no job id: 'maintenance'; see in `squeue --me`" in capsys.readouterr().err
    )


def test_a_sweep_over_settings_has_a_run_for_each_combination(
    sbatch: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch("echo 7")
    Path("site.toml").write_text("")
    over = ["guards.spike = [9.0, inf]", "training.ema = [[0.99], [0.9, 0.99]]"]
    sets = [word for change in over for word in ("--over", change)]
    runs = Path("runs, #2")
    words = ["sweep", "digits", "--runs", f"{runs}", *sets, "--cluster", "site.toml"]
    assert main(words) == 0
    scripts = {file.parents[1].name: file.read_text() for file in runs.glob("*/*/job.sh")}
    assert set(scripts) == {
        f"digits-spike{spike}-ema{ema}"
        for spike in ("9.0", "inf")
        for ema in ("-0.99", "-0.9-0.99")
    }
    text = scripts["digits-spikeinf-ema-0.9-0.99"]
    assert "--set 'guards.spike = inf'" in text and "'training.ema = [0.9, 0.99]'" in text
    lines = (runs / "sweep.sh").read_text().splitlines()
    # sbatch splits a line at its spaces, and a comment begins with #.
    assert lines[1:3] == ["#SBATCH --job-name=runs-2-sweep", "#SBATCH --array=0-3%1"]
    # One job of the array still runs.
    squeue = Path("bin/squeue")
    squeue.write_text('#!/bin/bash\n[ "$3" != 7_1 ] || echo "RUNNING|None"\n')
    squeue.chmod(0o755)
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "digits-spike9.0-ema-0.9-0.99 is left out: job 7_1 of" in said
    assert "as job array 7: 3 jobs, 1 at once" in said


@pytest.mark.parametrize("launcher", ["slurm", "mpirun", "deepspeed", "torchrun", "alone"])
def test_sampling_is_a_job_of_every_launcher(
    launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.toml"
    hosts = [] if launcher in ("alone", "slurm") else ["n1"]
    site.write_text(f'launcher = "{launcher}"\nhosts = {hosts}\n')
    words = ["runs/a", "--out", f"{tmp_path}/a.npz", "--scale", "0,1", "--gpus-per-node", "2"]
    assert main(["sample", *words, "--cluster", str(site), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.replace("\\\n", "").split())
    draw = "trainer.sample --patience 600 runs/a --scale 0,1"
    rank = f"{draw} --out {tmp_path}/a.npz --job {tmp_path}/a.job --ranks 2"
    assert rank in said and not (tmp_path / "a.job").exists()


def test_a_greeting_in_another_encoding_hides_no_job_id(sbatch: Sbatch) -> None:
    sbatch(r"printf 'Acc\351s autoris\351\n'; echo 7")
    assert submit() == 0
    assert records.job_id(Path("run")) == "7"


def test_a_script_with_a_name_that_is_no_utf_8_is_submitted(
    sbatch: Sbatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gr\udcf6n").mkdir()
    monkeypatch.chdir(tmp_path / "gr\udcf6n")
    sbatch("echo 7")
    Path("site.toml").touch()
    words = ["sample", "/runs/digits", "--out", "a.npz", "--cluster", "site.toml"]
    assert main(words) == 0
    assert records.job_id(Path("a.job")) == "7"


def test_a_sampling_array_has_a_job_for_each_share(sbatch: Sbatch) -> None:
    sbatch("echo 7")
    Path("site.toml").write_text("")
    words = ["runs/a", "--out", "samples/", "--array", "3", "--at-most", "2"]
    assert main(["sample", *words, "--cluster", "site.toml"]) == 0
    assert "#SBATCH --array=0-2%2" in Path("samples.job/sweep.sh").read_text()
    for n in range(3):
        text = Path(f"samples.job/{n}/launch/job.sh").read_text()
        assert f"--out samples/ \\\n  --share {n}/3 " in text
        assert Path(f"samples.job/{n}/launch/job").read_text() == f"7_{n}\n"


REFUSAL = """\
sbatch: lua: the partition gpu needs a project.
sbatch: lua: Your projects: east, west.
sbatch: error: Batch job submission failed: Unspecified error"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_all_of_what_sbatch_says_on_refusal_is_shown(
    stream: str, sbatch: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch(f"echo '{REFUSAL}' > /dev/{stream}; exit 1")
    assert submit() == REFUSED
    assert capsys.readouterr().err == "error: " + REFUSAL.replace("\nsbatch: ", "\n") + "\n"


def test_the_status_has_one_line_for_what_squeue_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/bash\n"
        "printf 'squeue: error: one\\nsqueue: error: two%s\\n' $SQUEUE_STATES >&2; exit 1"
    )
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")  # the user's, which would hide the job
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "run" / "launch").mkdir(parents=True)
    (tmp_path / "run" / "launch" / "job").write_text("7\n")
    assert status.read(tmp_path / "run").job == "job 7: unknown (error: two)"
