"""What may keep a start from beginning, outside of its run directory."""

import os
import pwd
import re
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from torch.utils import cpp_extension

from data.dataset import open_shards
from data.exits import FAILED, REFUSED
from tests.support import ranks
from trainer import export, train
from trainer import plan as planning
from trainer.config import experiment as configs
from trainer.engine import caches, compute, operators
from trainer.evaluation.features import open_network
from trainer.measures import due
from trainer.ranks.faults import Refused
from trainer.ranks.group import alone


def lock_of(root: Path, *, age: float, operator: str = "deepspeed_shm_comm") -> Path:
    """What a process leaves behind that was killed while it compiled."""
    lock = root / operator / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    return lock


def plan(extensions: Path, preset: Path, run: Path) -> int:
    """Read and check what a start is given, as one rank."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    arguments = train.parser().parse_args([str(preset), "--run", str(run)])
    train.TrainingPlan.make(arguments, ranks=1)
    return 0


def with_own_operators(
    directory: Path, extensions: Path, arguments: list[str], **variables: str
) -> int:
    """As `ranks.work`, with another directory of operators, and `variables`, on rank 1."""
    if os.environ["RANK"] == "1":
        os.environ.update(TORCH_EXTENSIONS_DIR=str(extensions), **variables)
    return ranks.work(directory, [arguments], fp16=False)


def test_an_operator_that_one_machine_cannot_compile_ends_all_ranks_with_the_reason(
    tmp_path: Path, tiny: Path
) -> None:
    no_directory = tmp_path / "deepspeed_shm_comm"
    no_directory.touch()
    arguments = ["train", str(tiny), "--run", str(tmp_path / "run")]
    task = partial(with_own_operators, tmp_path, tmp_path, arguments)
    job = ranks.fork(tmp_path, task, ranks=2)
    job.wait()
    (said,) = map(str, job.statuses)
    why = ("is wanted: name another", "File exists")  # the second by torch 2.15
    assert said.startswith(f"rank 1: {no_directory}") and said.endswith(why), said


def test_what_the_compiler_of_an_operator_says_is_one_line(tmp_path: Path, tiny: Path) -> None:
    arguments = ["train", str(tiny), "--run", str(tmp_path / "run")]
    (tmp_path / "own").mkdir()
    task = partial(with_own_operators, tmp_path, tmp_path / "own", arguments, CXX="no-compiler")
    job = ranks.fork(tmp_path, task, ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    said = r"^error: rank 1: DeepSpeed's .* cannot be compiled: .*no-compiler: .*not found \("
    assert re.search(said, job.text, re.MULTILINE) and "Traceback" not in job.text, job.text


def test_an_operator_of_another_kind_of_machine_is_named_with_the_way_out(
    tmp_path: Path, tiny: Path
) -> None:
    """Nodes of several kinds may share a home directory; ninja takes their operators for one."""
    ranks.forks()  # has it compiled for this machine
    (so,) = operators._compiled("*.so")
    copy = shutil.copytree(so.parent, tmp_path / so.parent.name) / so.name
    written, library = copy.stat().st_mtime_ns, bytearray(copy.read_bytes())
    library[18] ^= 0xFF  # the processor, in the header of ELF
    copy.write_bytes(library)
    os.utime(copy, ns=(written, written))
    arguments = ["train", str(tiny), "--run", str(tmp_path / "run")]
    job = ranks.fork(tmp_path, partial(with_own_operators, tmp_path, tmp_path, arguments), ranks=2)
    said = job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    way_out = rf"delete {copy.parent}, or set TORCH_EXTENSIONS_DIR to a directory of this kind"
    assert re.search(rf"^error: rank 1: .* cannot be loaded: {copy}: .*: {way_out}", said, re.M), (
        said
    )


@pytest.mark.skipif(not hasattr(cpp_extension, "FileBaton"), reason="torch before 2.14")
def test_a_stale_lock_of_a_killed_compiler_is_named_before_anything_waits_for_it(
    tmp_path: Path, tiny: Path
) -> None:
    lock = lock_of(tmp_path, age=7200)
    job = ranks.fork(tmp_path / "job", partial(plan, tmp_path, tiny, tmp_path / "run"), ranks=1)
    said = job.wait()
    assert job.ranks[0].exitcode == REFUSED
    assert re.search(rf"error: {lock} was made 2 h \d min ago by a process that compiles", said)
    assert "delete it" in said and said.count("\n") == 1


def test_a_lock_of_the_system_is_named_while_it_is_held_however_old_its_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since torch 2.14 the file stays."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delattr(cpp_extension, "FileBaton", raising=False)
    lock = lock_of(tmp_path, age=7200)
    assert operators.locks() == []
    with FileLock(lock):
        assert operators.locks() == [
            f"{lock} is held by a process that compiles; this start waits for it"
        ]
    assert operators.locks() == []


@pytest.mark.parametrize("ahead", [0, 86400, -86400])
def test_a_lock_that_may_be_in_use_is_named_and_waited_for(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its age is by the clock of the file server; this machine's may be ahead of it by a day."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    lock_of(tmp_path, age=7200, operator="of_another_project")
    assert operators.locks() == []
    assert [said.startswith("DeepSpeed compiles") for said in operators.notice()] == [True]
    lock, now = lock_of(tmp_path, age=90), time.time
    monkeypatch.setattr(time, "time", lambda: now() + ahead)
    (said,) = operators.locks()
    assert re.match(rf"{lock} was made 1 min 3\d s ago", said) and "waits for it" in said
    (lock.parent / "deepspeed_shm_comm.so").touch()
    assert operators.notice() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert operators.locks() == []


@pytest.mark.parametrize(
    ("variable", "on_gpus"),
    [
        ("HOME", False),
        ("TORCH_EXTENSIONS_DIR", False),
        ("TRITON_CACHE_DIR", True),
        ("TORCHINDUCTOR_CACHE_DIR", True),
    ],
)
def test_a_place_for_what_is_compiled_that_cannot_be_written_is_named_before_anything_is(
    variable: str, on_gpus: bool, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if not on_gpus:
        monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/none")  # which a CPU has no use for
    monkeypatch.setenv(variable, "/proc/none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpus)
    compiled = ["--set", 'training.kernels = "fused"', "--set", "training.compile = true"]
    arguments = train.parser().parse_args([str(tiny), "--run", str(tmp_path / "run"), *compiled])
    wanted = "TORCH_EXTENSIONS_DIR" if variable == "HOME" else variable
    said = rf"^/proc is not writable \(.*\): set {wanted} to a directory that is writable$"
    with pytest.raises(ValueError, match=said):
        train.TrainingPlan.make(arguments, ranks=1)
    # On many clusters /tmp and the like are mounted so.
    monkeypatch.setenv(wanted, str(tmp_path / "kept"))
    flags = {tmp_path: os.ST_NOEXEC}
    monkeypatch.setattr(os, "statvfs", lambda at: SimpleNamespace(f_flag=flags.get(at, 0)))
    said = rf"^{tmp_path}/kept is on a disk .*noexec.*: set {wanted} to a .* on another disk$"
    with pytest.raises(ValueError, match=said):
        train.TrainingPlan.make(arguments, ranks=1)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_torch_makes_though_it_compiles_nothing_is_named_by_all_that_need_it(
    tmp_path: Path,
    tiny: Path,
    network: Path,
    weights: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "set TORCHINDUCTOR_CACHE_DIR to a directory that is writable"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = train.parser().parse_args([str(tiny), "--run", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=said):
        train.TrainingPlan.make(arguments, ranks=1)
    assert planning.main([str(tiny), "--gpus", "1"]) == REFUSED
    assert said in capsys.readouterr().err
    assert export.main([*weights["unet"], "--to", str(tmp_path / "out.pt")]) == REFUSED
    assert said in capsys.readouterr().err
    with alone(), pytest.raises(Refused, match=said):
        open_network(str(network), device=torch.device("cpu"))
    # Nothing is written to one that is there, nor loaded from there.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc")
    caches.check_made()


def test_a_machine_of_gpus_without_a_compiler_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    training = configs.load("imagenet64").training
    monkeypatch.setenv("CC", "nowhere-cc")
    with pytest.raises(ValueError, match="needs the compiler of CC = 'nowhere-cc', which is not"):
        compute.check(training)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r'kernels = "fused": needs a C compiler .*: install gcc'):
        compute.check(training)
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "cuda_utils.cpython-312-x86_64-linux-gnu.so").touch()
    compute.check(training)


@pytest.mark.parametrize(("named", "own"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_variable_by_which_deepspeed_would_compute_elsewhere_is_named(
    named: str, own: str, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a login node, or a node with GPUs, that a profile takes for the other."""
    monkeypatch.setenv("DS_ACCELERATOR", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: own == "cuda")
    arguments = train.parser().parse_args([str(tiny), "--run", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=f"^DS_ACCELERATOR = '{named}', .* must be '{own}' on"):
        train.TrainingPlan.make(arguments, ranks=1)
    assert not (tmp_path / "run").exists()


def test_a_user_without_a_home_directory_is_told_where_to_have_the_operator_compiled(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be in a directory that is called ~."""
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as for a user of a container
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("USER", "me")
    arguments = train.parser().parse_args([str(tiny), "--run", str(tmp_path / "run")])
    said = r"^user me has no home .*: set TORCH_EXTENSIONS_DIR to a directory that is writable$"
    with pytest.raises(ValueError, match=said):
        train.TrainingPlan.make(arguments, ranks=1)


def test_an_upsamplers_grid_of_more_images_than_there_are_is_refused(
    tmp_path: Path, tiny: Path, digits: Path
) -> None:
    count = open_shards(digits).count

    def make(samples: int) -> train.TrainingPlan:
        sets = ("model.small_size = 4", f"intervals.samples_count = {samples}")
        options = [word for each in (*sets, "intervals.samples = 8") for word in ("--set", each)]
        arguments = train.parser().parse_args([str(tiny), "--run", str(tmp_path / "run"), *options])
        return train.TrainingPlan.make(arguments, ranks=1)

    assert make(count).config.intervals.samples_count == count
    refused = rf"samples_count = {count + 1}: .* data.shards has {count}: lower intervals"
    with pytest.raises(ValueError, match=refused):
        make(count + 1)


@pytest.mark.parametrize(
    "changes",
    [
        ("training.images = 6000", "training.batch = 6000", "training.micro_batch = 6000"),
        ("training.micro_batch = 6000", "data.validation = '{digits}'", "intervals.validate = 8"),
    ],
    ids=["training", "validation"],
)
def test_too_little_memory_for_decoded_images_is_refused_before_the_engine_is_built(
    tmp_path: Path, tiny: Path, digits: Path, changes: tuple[str, ...]
) -> None:
    """A mebibyte holds 5242 images of 8 pixels."""

    def make(workers: int) -> None:
        sets = (*changes, "data.prefetch_mb = 1", f"data.workers = {workers}")
        options = [word for each in sets for word in ("--set", each.format(digits=digits))]
        arguments = train.parser().parse_args([str(tiny), "--run", str(tmp_path / "run"), *options])
        train.TrainingPlan.make(arguments, ranks=1)

    with pytest.raises(ValueError, match=r"data\.prefetch_mb = 1 holds no .* \d+00 images; set it"):
        make(1)
    make(0)


@pytest.mark.parametrize("every", [8, 12, 20, 100])
def test_work_is_due_once_for_each_multiple_of_its_interval_that_is_crossed(every: int) -> None:
    clocks = [clock for clock in range(8, 401, 8) if due(every, images_seen=clock, batch_size=8)]
    assert clocks == [-(-n // 8) * 8 for n in range(every, 401, every)]
    assert not due(None, images_seen=8, batch_size=8)
