"""The replay audit names the machine whose memory or arithmetic is at fault, and ends the job."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from data.exits import FAILED
from tests.support import faults, ranks
from tests.support.runs import STEP, Place
from trainer import train
from trainer.guards.audit import blame_weights, minority
from trainer.guards.replay import Replay

# As Slurm knows a machine of another name.
HOST = "gpu-1.site.org"
SETS = (f"intervals.audit = {STEP}", f"intervals.checkpoint = {STEP}")
#: A rank whose losses are off in the last place, from every image.
INEXACT = partial(faults.spoil, dict.fromkeys(range(1000), 1 + 2**-22))
CASES = [
    (2, 1, 2, partial(faults.flip_a_bit, at=2 * STEP), "has other weights than the masters: "),
    (3, 0, 2, partial(faults.flip_a_bit, at=2 * STEP), "has other weights than the masters: "),
    (2, 1, 3, INEXACT, "computes other gradients than most ranks"),
]


#: Torch adds lines for those who write kernels.
ECC = "CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`"


def as_a_step_of_slurm(task: Callable[[], int]) -> int:
    os.environ |= {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURMD_NODENAME": HOST}
    return task()


@pytest.mark.parametrize(("stage", "rank", "world", "fault", "said"), CASES)
def test_a_faulty_machine_is_named_and_ends_the_job(
    tmp_path: Path, tiny: Path, *, stage: int, rank: int, world: int, fault: Callable, said: str
) -> None:
    place = Place(tmp_path, tiny)
    run = place.arguments("run", stage=stage, sets=SETS)
    task = partial(faults.work_on_a_faulty_machine, tmp_path / "job", [run], fault, rank)
    job = ranks.fork(tmp_path / "job", partial(as_a_step_of_slurm, task), ranks=world)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED] * world, job.text
    assert re.search(rf"error: hardware fault: rank {rank} on {HOST} {said}", job.texts[0])
    assert (place.run("run") / "launch" / "lost-hosts").read_text() == f"{HOST}\n"
    (row,) = map(json.loads, (place.run("run") / "incidents.jsonl").open())
    assert f"rank {rank} on {HOST} {said}" in row["replay"]
    state = json.loads((place.run("run") / "launch" / "state.json").read_text())
    assert state["state"] == "failed" and HOST in state["why"] and state["lost"] == HOST


def train_with_a_broken_gpu(arguments: list[str], error: RuntimeError) -> int:
    if os.environ["RANK"] == "1":
        faults.fail_the_gpu(error)
    return train.main(arguments)


@pytest.mark.parametrize(
    ("error", "lost"), [(torch.AcceleratorError, HOST), (torch.OutOfMemoryError, None)]
)
def test_a_gpu_that_fails_before_a_run_begins_counts_against_its_host(
    tmp_path: Path, tiny: Path, *, error: type[RuntimeError], lost: str | None
) -> None:
    """Slurm may start the job there again and again."""
    place = Place(tmp_path, tiny)
    records = place.run("run") / "launch"
    records.mkdir(parents=True)  # with the job's script
    task = partial(train_with_a_broken_gpu, place.arguments("run")[1:], error(ECC))
    job = ranks.fork(tmp_path / "job", partial(as_a_step_of_slurm, task), ranks=2)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED] * 2, job.text
    assert f"rank 1: a GPU of {HOST} fails: {ECC.splitlines()[0]}\n" in job.text
    state = records / "state.json"
    assert (json.loads(state.read_text())["lost"] if state.exists() else None) == lost


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_losses_of_a_compiled_step_accuse_no_machine(
    tmp_path: Path, tiny: Path, is_compiled: bool
) -> None:
    """Its replay is not compiled: it has other dropout, and rounds otherwise."""
    place = Place(tmp_path, tiny)
    fault = partial(faults.spoil_the_first, [STEP + 1], is_compiled=is_compiled)
    run = place.arguments("run")
    task = partial(faults.work_on_a_faulty_machine, tmp_path / "job", [run], fault, 0)
    job = ranks.fork(tmp_path / "job", task, ranks=1)
    job.wait()
    assert [process.exitcode for process in job.ranks] == [0 if is_compiled else FAILED], job.text
    (row,) = map(json.loads, (place.run("run") / "incidents.jsonl").open())
    assert ("other losses in the step" in row["replay"]) == (not is_compiled), row


@pytest.mark.slow
def test_sound_machines_pass_every_audit_and_train_on_as_without_it(
    tmp_path: Path, tiny: Path
) -> None:
    place = Place(tmp_path, tiny)
    precisions = ("fp32", "bf16")
    runs = [
        place.arguments(
            f"{precision}-{len(sets)}",
            stage=stage,
            sets=(*sets, f'training.precision = "{precision}"', "model.dropout = 0.2"),
        )
        for precision, stage in zip(precisions, (2, 3), strict=True)
        for sets in ((), SETS[:1])
    ]
    assert place.train(*runs, world=2) == [0] * len(runs)
    for precision in precisions:
        without = place.losses(f"{precision}-0")
        exact = precision == "fp32"  # kernels of bf16 depend on where tensors are in memory
        assert place.losses(f"{precision}-1") == (
            without if exact else pytest.approx(without, 1e-2)
        )
        assert not (place.run(f"{precision}-1") / "incidents.jsonl").exists()


def test_who_differs_from_its_own_masters_is_blamed_and_not_those_who_differ_from_it() -> None:
    assert blame_weights([{}, {0: "a"}, {}]) == {1: "has other weights than the masters: a"}
    assert set(blame_weights([{1: "a"}, {1: "a"}, {1: "a"}])) == {1}


def test_ranks_that_no_majority_agrees_with_are_outvoted() -> None:
    same = dict.fromkeys(("losses", "norms", "products", "micro_norms"), (1.0,))
    a, b = (Replay(**same, loss_bits=(0,), bits=(bits,)) for bits in (0, 1))
    for votes, outvoted in (([a, b, a], [1]), ([a, b, a, b], [0, 1, 2, 3]), ([a, a], [])):
        assert minority(votes, bound=0.0) == outvoted


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [
        ("losses", (1.005, 0.1), (1.02, 0.1)),
        ("losses", (1.0, 0.105), (1.0, 0.11)),  # a small one: of the mean
        ("losses", (1.0, 0.1), (math.nan, 0.1)),
        ("norms", (3.02, 0.0), (3.04, 0.0)),
        ("norms", (3.0, 0.0002), (3.0, 0.0004)),  # a small one: of a hundredth of the whole
        ("norms", (3.0, 0.0), (math.inf, 0.0)),
        ("products", (-2.02, 0.0), (2.0, 0.0)),
    ],
)
def test_replays_in_which_sums_have_no_order_are_one_within_a_bound(
    name: str, within: tuple[float, ...], beyond: tuple[float, ...]
) -> None:
    """As on GPUs and in 16 bits, where the bits of sound machines differ too."""
    some = {"losses": (1.0, 0.1), "norms": (3.0, 0.0), "products": (-2.0, 0.0)}
    one = Replay(**some, loss_bits=(0,), bits=(0,), micro_norms=(3.0,))
    for values, is_same in ((within, True), (beyond, False)):
        other = replace(one, loss_bits=(1,), bits=(1,), **{name: values})
        assert one.is_same(other, bound=0.01) is is_same
        assert not one.is_same(other, bound=0.0)
        if name == "losses":
            assert one.has_losses(torch.tensor(values), bound=0.01) is is_same
            assert not one.has_losses(torch.tensor(values), bound=0.0)
    spoiled = replace(one, **{name: beyond})  # a loss that is not finite is so on both
    assert spoiled.is_same(replace(spoiled, bits=(1,)), bound=0.01)
