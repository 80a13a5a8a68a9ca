"""Submission, with a stand-in for sbatch: what it is given, and what is shown of its answer."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data.exits import REFUSED
from launch import queue, records, status
from launch.__main__ import main

Sbatch = Callable[[str], None]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    """Makes sbatch a bash script of these lines, in the directory of the test; no job is queued."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def install(lines: str) -> None:
        (tmp_path / "bin").mkdir()
        stand_in("squeue", "")
        stand_in("sbatch", lines)

    return install


def stand_in(program: str, lines: str) -> None:
    """Make a program of Slurm's a bash script of these lines."""
    file = Path(os.environ["PATH"].partition(":")[0]) / program
    file.write_text(f"#!/bin/bash\n{lines}\n")
    file.chmod(0o755)


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


@pytest.mark.parametrize("said", ["47", "Submitted batch job 47"])
def test_the_job_id_is_found_behind_what_a_site_prints_before(
    said: str, sbatch: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch(f"echo '--- Welcome to cluster 3'; echo '--> Verifying 2 quotas...OK'; echo '{said}'")
    assert submit('time = "1:00:00"') == 0
    assert "job.sh as job 47; output: " in capsys.readouterr().out
    assert Path("run/launch/job").read_text() == "47\n"


def test_what_a_site_says_of_a_job_that_it_has_changed_is_shown(
    sbatch: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch("echo 'sbatch: lua: time limit lowered to 1 hour' >&2; echo 47")
    assert submit('time = "2:00:00"') == 0
    said = capsys.readouterr()
    assert said.err == "sbatch: lua: time limit lowered to 1 hour\n" and "as job 47" in said.out


@pytest.mark.parametrize("said", ["47;east", "Submitted batch job 47 on cluster east"])
def test_a_job_of_another_cluster_is_looked_for_there(
    said: str, sbatch: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parsl#3675: the local cluster has a job 47 of its own, which a stop would cancel."""
    sbatch(f"echo '--- Welcome to cluster 3'; echo '{said}'")
    stand_in(
        "squeue", 'case "$*" in *east*%i*) echo "47|PENDING|" ;; *east*) echo "PENDING|" ;; esac'
    )
    stand_in("scancel", "echo $* >> cancelled; echo '#!/bin/bash' > bin/squeue")
    assert submit() == 0
    output = f"{Path.cwd()}/run/launch/slurm-47.out"
    assert f"job.sh as job 47 on cluster east; output: {output}" in capsys.readouterr().out
    assert status.read(Path("run")).job == "job 47 on cluster east, 1 x 1: PENDING"
    assert submit() == REFUSED
    assert "job 47 on cluster east of" in capsys.readouterr().err
    assert main(["stop", "run"]) == 0
    assert Path("cancelled").read_text() == "--clusters=east 47\n"


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
    stand_in("squeue", '[ "$3" != 7_1 ] || echo "RUNNING|None"')
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "digits-spike9.0-ema-0.9-0.99 is left out: job 7_1 of" in said
    assert "as job array 7: 3 jobs, 1 at once" in said


@pytest.mark.parametrize("launcher", ["slurm", "mpirun", "deepspeed", "torchrun", "alone"])
def test_sampling_is_a_job_of_every_launcher(
    launcher: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    site = tmp_path / "site.toml"
    hosts = [] if launcher in ("alone", "slurm") else ["n1"]
    site.write_text(f'launcher = "{launcher}"\nhosts = {hosts}\n')
    words = ["runs/a", "--out", f"{tmp_path}/a.npz", "--cfg", "1,2", "--gpus-per-node", "2"]
    assert main(["sample", *words, "--cluster", str(site), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.replace("\\\n", "").split())
    draw = "trainer.sample --patience 600 runs/a --cfg 1,2"
    rank = f"{draw} --out {tmp_path}/a.npz --job {tmp_path}/a.job --ranks 2"
    assert rank in said and not (tmp_path / "a.job").exists()


TIMED_OUT = """\
echo x >> tries
echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2
exit 1"""


def test_a_job_that_slurm_takes_though_sbatch_timed_out_is_submitted_once(
    sbatch: Sbatch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nextflow#970, toil#5459: a second job on the same run, and no number of the first."""
    monkeypatch.setattr(queue, "_PAUSES", (0.0, 0.0))
    sbatch(TIMED_OUT)
    queued = (
        f'echo "5|{Path.cwd()}/else.sh"; [ ! -e tries ] || echo "8|{Path.cwd()}/run/launch/job.sh"'
    )
    stand_in("squeue", queued)
    assert submit() == 0
    assert records.job_id(Path("run")) == "8" and Path("tries").read_text() == "x\n"
    stand_in("squeue", "")
    assert main(["digits", "--run", "other", "--cluster", "site.toml"]) == REFUSED
    said = "Socket timed out on send/recv operation; see in `squeue --me` whether it is queued"
    assert said in capsys.readouterr().err
    Path("tries").unlink()
    stand_in(
        "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    assert main(["digits", "--run", "other", "--cluster", "site.toml"]) == REFUSED
    assert not Path("tries").exists()  # what is there already could not be told from a new one


def test_what_a_user_sets_for_slurm_s_commands_changes_none_of_ours(
    sbatch: Sbatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SCANCEL_INTERACTIVE and no terminal scancel writes its question without end."""
    names = ("SCANCEL_INTERACTIVE", "SQUEUE_STATES", "SACCT_FORMAT")
    for name in names:
        monkeypatch.setenv(name, "true")
    sbatch("echo 7")
    assert submit() == 0
    stand_in("squeue", "echo 'RESV_DEL_HOLD|Reservation maintenance was deleted'")
    stand_in("scancel", "env > env.txt; echo '#!/bin/bash' > bin/squeue")
    assert main(["stop", "run"]) == 0
    seen = {line.partition("=")[0] for line in Path("env.txt").read_text().splitlines()}
    assert "PATH" in seen and not seen & set(names)


def test_a_controller_that_is_busy_does_not_end_the_wait_for_a_stop(sbatch: Sbatch) -> None:
    sbatch("echo 7")
    assert submit() == 0
    busy = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    stand_in("squeue", f"echo x >> n; case $(wc -l < n) in 1) echo 'RUNNING|' ;; 2) {busy} ;; esac")
    assert main(["stop", "run"]) == 0
    assert Path("n").read_text() == "x\nx\nx\n"


def test_a_path_that_slurm_cannot_write_the_output_to_is_refused(
    sbatch: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm takes backslashes out of a file's name: the job would end without a trace."""
    sbatch("echo 7")
    Path("site.toml").touch()
    assert main(["digits", "--run", "a\\b/run", "--cluster", "site.toml"]) == REFUSED
    assert "must be a path without backslashes" in capsys.readouterr().err
    assert main(["digits", "--run", "a\\b/run", "--dry-run"]) == 0


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
    words = ["sample", str(tmp_path), "--out", "a.npz", "--cluster", "site.toml"]
    assert main(words) == 0
    assert records.job_id(Path("a.job")) == "7"


def test_a_sampling_array_has_a_job_for_each_share(sbatch: Sbatch) -> None:
    sbatch("echo 7")
    Path("site.toml").write_text("")
    Path("runs/a").mkdir(parents=True)
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
