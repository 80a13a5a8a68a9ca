"""Who a rank is, by the variables of its launcher; and what refuses to be one."""

import os
import re
import socket
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from data.exits import FAILED, REFUSED
from tests.support import ranks
from trainer.ranks import meeting
from trainer.ranks import world as worlds
from trainer.ranks.faults import Broken, named_hosts
from trainer.ranks.meeting import exchange, meeting_store
from trainer.ranks.process import Process
from trainer.ranks.process_group import connected
from trainer.ranks.world import World, join

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
}
ENROOT = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"}


def test_in_enroot_which_tells_no_local_size_it_is_that_of_slurm() -> None:
    world = join({**STEP, **ENROOT})
    assert (world.rank, world.local_rank, world.local_size) == (5, 1, 2)
    assert join({**ENROOT, "LOCAL_SIZE": "3"}).local_size == 3  # `deepspeed`


def test_each_rank_of_a_step_has_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer is on a bad node, which `launch check` names."""
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert worlds.step_hosts() == ["n1"] * 4 + ["n2"] * 2


def test_ranks_of_torchrun_in_the_shell_of_a_task_have_no_gpu_each() -> None:
    """Two ranks on the one GPU of `srun --gpus=1 --pty bash` would both take it."""
    shell = {**STEP, "CUDA_VISIBLE_DEVICES": "0"}
    assert join(dict(shell)).own_gpu and join({**shell, **ENROOT}).own_gpu
    assert not join({**shell, **ENROOT, "TORCHELASTIC_RUN_ID": "7"}).own_gpu


def test_a_machine_has_the_name_that_slurm_excludes(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPICH hands the variables of its first machine's shell on to the ranks of all."""
    own = socket.gethostname()
    for name, value in {**STEP, "SLURMD_NODENAME": "gpu-1.site.org"}.items():
        monkeypatch.setenv(name, value)
    assert (worlds.host_name(), Process.here().host) == ("gpu-1.site.org",) * 2
    assert named_hosts(f"n1: lost: {Process.here().host} (rank 3; computing)") == "gpu-1.site.org"
    monkeypatch.setenv("PMI_RANK", "3")
    assert worlds.host_name() == own


def test_the_local_rank_of_open_mpi_is_the_rank_s_own() -> None:
    """DeepSpeed refuses ranks of which it is another: those of a torchrun that mpirun started."""
    env = {**ENROOT, "LOCAL_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert join(env).local_rank == 1 and env["OMPI_COMM_WORLD_LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", ""), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "x"), ("MASTER_PORT", "99999")],
)
def test_a_variable_that_holds_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} = '{value}', a variable of the environment: "):
        join({**ENROOT, "LOCAL_WORLD_SIZE": "2", name: value})


def test_two_steps_of_one_allocation_meet_at_ports_of_their_own() -> None:
    steps = range(4)
    ports = {join({**STEP, "SLURM_STEP_ID": str(step)}).port for step in steps}
    others = {join({**STEP, "SLURM_JOB_ID": str(41 + n)}).port for n in steps}
    assert len(ports | others) == 7


def test_ranks_of_mpich_inside_a_slurm_job_are_not_its_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They inherit those of the shell that `srun --pty` started: each would be the only rank."""
    monkeypatch.setattr(worlds, "_from_mpi", lambda env: World(launcher="mpi", size=2))
    shell = {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert join({**shell, "PMI_RANK": "0", "PMI_SIZE": "2"}).launcher == "mpi"
    assert join({**shell, "PMI_RANK": "1", "PMI_SIZE": "2"}).launcher == "mpi"
    assert join({**STEP, "PMI_RANK": "5", "PMI_SIZE": "6"}).launcher == "slurm"  # --mpi=pmi2
    monkeypatch.setattr(worlds, "_from_mpi", lambda env: World(launcher="mpi"))  # of Open MPI
    with pytest.raises(ValueError, match=r"1 processes came up \(mpi\), 2 were asked for: "):
        join({"PMI_RANK": "1", "PMI_SIZE": "2"})


def test_a_host_file_that_orders_the_ranks_says_where_they_meet(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    order = {"SLURM_HOSTFILE": str(file), "SLURM_DISTRIBUTION": "arbitrary"}
    with pytest.raises(ValueError, match=r"SLURM_HOSTFILE = .* cannot be read"):
        join({**STEP, **order})
    file.write_text("n2\nn2\nn1\n")
    assert join({**STEP, **order}).address == "n2"
    assert join({**STEP, **order, "SLURM_DISTRIBUTION": "block"}).address == "n1"


def test_a_script_of_sbatch_n4_without_srun_is_not_one_rank() -> None:
    batch = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    with pytest.raises(ValueError, match=r"job 41 of Slurm has 4 tasks, but .* without srun"):
        join(dict(batch))
    assert join({**batch, "SLURM_NTASKS": "1"}).size == 1
    assert join(dict(batch), expected_size=1).size == 1  # it was asked for


def wait_in_vain(rank: int) -> int:
    os.environ["RANK"] = str(rank)
    meeting_store(replace(join(), size=2), timeout=timedelta(seconds=0.5))
    return 0


def connect(*, gpus: int | None = None, port: int | None = None) -> int:
    """Meet the other ranks, as every command does."""
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    with connected(join(), patience=ranks.LIMIT, gpus=gpus) as device:
        print(device)
    return 0


def statuses(job: ranks.Job) -> list[int | None]:
    job.wait()
    return [process.exitcode for process in job.ranks]


def test_ranks_on_a_machine_without_the_gpus_of_the_job_are_refused(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(connect, gpus=2), ranks=2)
    assert statuses(job) == [REFUSED, REFUSED]
    host = socket.gethostname()
    said = f"error: {host} shows 0 GPUs, and the job needs 2: look at `nvidia-smi`"
    assert job.texts[0].startswith(said) and job.texts[0].count("\n") == 1
    assert job.texts[1] == ""


@pytest.mark.parametrize("gpus", [0, None])
def test_cpus_that_were_asked_for_are_no_fault(gpus: int | None, tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, partial(connect, gpus=gpus), ranks=1)
    assert statuses(job) == [0] and job.texts == ["cpu\n"]


def test_a_port_that_another_run_uses_is_named_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        job = ranks.fork(tmp_path, partial(connect, port=port), ranks=1)
        assert statuses(job) == [FAILED]
    lines = [line for line in job.texts[0].splitlines() if "error:" in line]
    assert lines == [line for line in lines if f"port {port} of " in line] and len(lines) == 1


@pytest.mark.parametrize(("rank", "said"), [(0, "1/2 clients joined"), (1, "trying to connect")])
def test_a_rank_that_no_other_meets_says_where_it_waited_in_one_line(
    rank: int, said: str, tmp_path: Path
) -> None:
    """As where a firewall is between the nodes, or two ranks have one number."""
    job = ranks.fork(tmp_path, partial(wait_in_vain, rank), ranks=1)
    assert statuses(job) == [FAILED]
    line = job.texts[0].splitlines()[-1]
    assert re.search(f"rank {rank} on .*: error: the ranks did not meet at 127.*{said}", line)
    assert "Traceback" not in job.texts[0]


def miss_a_third() -> int:
    meeting._TELL, world = 0.5, replace(join(), size=3)
    exchange(meeting_store(world, timeout=timedelta(seconds=5)), world, None)
    return 0


def test_ranks_that_wait_for_another_say_for_which_and_end_with_one_line(tmp_path: Path) -> None:
    """As where srun or ssh has started a rank whose Python does not start."""
    job = ranks.fork(tmp_path, miss_a_third, ranks=2)
    assert statuses(job) == [FAILED, FAILED]
    assert re.search(r"^waiting at 127\.0\.0\.1:\d+ for rank 2 of 3$", job.texts[0], re.MULTILINE)
    for rank, text in enumerate(job.texts):
        assert "Traceback" not in text
        assert f"rank {rank} on " in text and "the ranks did not meet at 127.0.0.1:" in text


def meet_one_that_ends() -> int:
    """Rank 1 ends as it is about to connect, as one does that a firewall or a name keeps out."""
    if os.environ["RANK"] == "1":
        dist.init_process_group = lambda *_, **__: os._exit(0)
    with connected(join(), patience=3 - 60):
        return 0


def test_a_rank_that_no_other_connects_to_ends_in_time_and_says_what_helps(tmp_path: Path) -> None:
    job = ranks.fork(tmp_path, meet_one_that_ends, ranks=2)
    assert statuses(job) == [FAILED, 0]
    line = job.texts[0].splitlines()[-1]
    assert "error: the ranks do not reach each other: " in line and "GLOO_SOCKET_IFNAME" in line


def come_late(debug: dist.DebugLevel) -> int:
    dist.set_debug_level(debug)
    distributed_c10d.default_pg_timeout = timedelta(seconds=1)  # half an hour is too long for tests
    with connected(join(), patience=3 - 60):
        for group in (None, dist.new_group()):  # DeepSpeed makes one like it
            time.sleep(1.5 * dist.get_rank())
            dist.barrier(group)
        return 0


@pytest.mark.parametrize("debug", [dist.DebugLevel.OFF, dist.DebugLevel.DETAIL])
def test_ranks_that_are_watched_wait_for_one_that_is_late(
    debug: dist.DebugLevel, tmp_path: Path
) -> None:
    assert statuses(ranks.fork(tmp_path, partial(come_late, debug), ranks=2)) == [0, 0]


def meet_at_a_store_that_stays(port: int) -> int:
    """Connect as ranks of torchrun do, and end as a killed process does."""
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    with connected(join(), patience=ranks.LIMIT) as device:
        if os.environ["RANK"] == "0":  # it reads weights meanwhile
            time.sleep(0.5)
        group = dist.new_group([0, 1])
        total = torch.ones(1, device=device)
        dist.all_reduce(total, group=group)
        print(f"{total.item():g} ranks", flush=True)
        os._exit(3)


@pytest.mark.parametrize(("rank", "missing"), [(0, "ranks 1"), (1, "the main rank")])
def test_ranks_whose_torchruns_have_stores_of_their_own_say_what_helps(
    rank: int, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `--nnodes 1:2`, when a node has joined and has rank 0."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = World(rank=rank, size=2, port=store.port, launcher="torchrun")
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(Broken, match=f"{missing} did not come .*SHARE_RDZV_TCP_STORE=1 in"):
        meeting_store(world, timeout=timedelta(seconds=0.2))


def test_a_node_that_cannot_resolve_where_the_ranks_meet_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "_TELL", 0.2)
    world = World(rank=1, size=2, address="n1.invalid", port=29555)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TimeoutError, match=r"did not meet at n1\.invalid:29555"):
        meeting_store(world, timeout=timedelta(seconds=1))
    said = f"{socket.gethostname()} cannot resolve n1.invalid (MASTER_ADDR), where the ranks meet: "
    assert said in capsys.readouterr().out


def test_a_node_whose_main_rank_does_not_answer_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where its node has started nothing, or the variables are those of another job."""
    monkeypatch.setattr(meeting, "_TELL", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and it does not listen
        world = World(rank=1, size=2, port=taken.getsockname()[1])
        for name, value in world.environment().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TimeoutError, match=r"did not meet at 127\.0\.0\.1:"):
            meeting_store(world, timeout=timedelta(seconds=1))
    said = f"{socket.gethostname()} waits for rank 0: nothing answers at 127.0.0.1:{world.port} "
    assert f"{said}(MASTER_ADDR, MASTER_PORT): Connection refused" in capsys.readouterr().out


def test_ranks_that_torchrun_starts_again_meet_each_other_and_not_those_that_ended(
    tmp_path: Path,
) -> None:
    """Its store has the addresses of the ranks before; with `--max-restarts` none got through."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start in range(2):
        task = partial(meet_at_a_store_that_stays, store.port)
        job = ranks.fork(tmp_path / str(start), task, ranks=2)
        assert statuses(job) == [3, 3], job.text
        assert job.texts == ["2 ranks\n"] * 2
