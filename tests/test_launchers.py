"""Every launcher on one machine trains the same run: two ranks, started as the README says."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.cluster import LIMIT, wait_until
from tests.support.runs import ENDLESS
from trainer.run.runstate import RunState

TRAIN = "trainer.train"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "--", TRAIN]
# As Open MPI numbers the ranks of a machine where it places them socket by socket.
LOCAL = "OMPI_COMM_WORLD_LOCAL_RANK"
OTHER_ORDER = ["bash", "-c", f'{LOCAL}=$((1 - {LOCAL})) exec "$@"', "-"]
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "mpirun": [*MPIRUN, "-n", "2", sys.executable, "-m", TRAIN],
    "mpirun by sockets": [*MPIRUN, "-n", "2", *OTHER_ORDER, sys.executable, "-m", TRAIN],
    "torchrun in mpirun": [*MPIRUN, "-n", "1", *TORCHRUN],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--module", TRAIN],
    "alone": [sys.executable, "-m", TRAIN],
}


def train(launcher: str, run: Path, tiny: Path) -> tuple[str, list[float]]:
    """Two steps of the tiny preset; what was printed, and the losses."""
    sets = ["--set", "training.images = 16", "--set", "intervals.checkpoint = 16"]
    done = subprocess.run(
        [*LAUNCHERS[launcher], str(tiny), "--run", str(run), *sets],
        cwd=ranks.ROOT,
        env=ranks.environment(),
        text=True,
        timeout=ranks.LIMIT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    rows = (run / "metrics.jsonl").read_text().splitlines()
    return (run / "log.txt").read_text(), [json.loads(row)["loss"] for row in rows]


@pytest.mark.slow
def test_all_launchers_train_the_same_run(tmp_path: Path, tiny: Path) -> None:
    reference = None
    for launcher, command in LAUNCHERS.items():
        if shutil.which(command[0], path=ranks.environment()["PATH"]) is None:
            pytest.fail(f"{command[0]} is missing; `make test` installs it")
        log, losses = train(launcher, tmp_path / launcher, tiny)
        assert f"{1 if launcher == 'alone' else 2} ranks" in log
        reference = reference or losses
        assert losses == pytest.approx(reference, rel=1e-5)


@pytest.mark.slow
def test_a_machine_whose_own_name_has_no_address_trains(tmp_path: Path, tiny: Path) -> None:
    """torchrun's ranks meet at that name unless it is told another, and wait for minutes."""
    rename = ["unshare", "--uts", "sh", "-c", 'hostname of.no.address && exec "$@"', "-"]
    if subprocess.run([*rename, "true"], check=False).returncode:
        pytest.skip("may not change the host's name for a process")
    site = tmp_path / "site.toml"
    site.write_text('launcher = "alone"\ncpu = true\n')
    sets = ["--set", "training.images = 16", "--gpus-per-node", "2"]
    words = [sys.executable, "-m", "launch", tiny, "--run", tmp_path / "run", "--cluster", site]
    subprocess.run(
        [*rename, *words, *sets],
        cwd=ranks.ROOT,
        env=ranks.environment(),
        timeout=ranks.LIMIT,
        check=True,
    )
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 ranks" in log and "finished" in log
    check = [*rename, sys.executable, "-m", "trainer.preflight"]
    found = subprocess.run(check, cwd=ranks.ROOT, capture_output=True, text=True, check=True)
    assert "of.no.address has no address" in found.stdout


@pytest.mark.slow
def test_usr1_to_mpirun_saves_the_run(tmp_path: Path, tiny: Path) -> None:
    """At TERM and Ctrl-C it kills its ranks (open-mpi/ompi#12149)."""
    words = [*LAUNCHERS["mpirun"], tiny, "--run", tmp_path / "run", "--set", ENDLESS[0]]
    job = subprocess.Popen(words, cwd=ranks.ROOT, env=ranks.environment())
    wait_until((tmp_path / "run" / "metrics.jsonl").exists, "steps")
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=LIMIT)
    state = RunState.read(tmp_path / "run")
    assert state is not None and state.state == "stopped" and state.checkpoint


@pytest.mark.slow
def test_the_ranks_of_mpirun_check_the_machines_and_train(tmp_path: Path, tiny: Path) -> None:
    site = tmp_path / "site.toml"
    options = ", ".join(f'"{option}"' for option in MPIRUN[1:])
    site.write_text(
        f'launcher = "mpirun"\ncpu = true\nhosts = ["127.0.0.1"]\noptions = [{options}]\n'
        f'python = "{sys.executable}"\n'
    )
    words = [sys.executable, "-m", "launch", tiny, "--run", tmp_path / "run", "--cluster", site]
    size = ["--check", "--nodes", "1", "--gpus-per-node", "2", "--set", "training.images = 16"]
    subprocess.run(
        [*words, *size], cwd=ranks.ROOT, env=ranks.environment(), timeout=ranks.LIMIT, check=True
    )
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 ranks" in log and "finished" in log
