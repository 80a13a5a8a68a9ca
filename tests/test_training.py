"""Properties of real runs: real ranks over gloo, real DeepSpeed-ZeRO, real shards.

Tiny runs of 6 steps are trained once on 2 and 3 ranks in every ZeRO stage, in a handful of jobs
(those on 4 are slow); each test holds what they left on disk against a property.
"""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.dataset import open_shards
from data.order import Order
from tests.support import ranks
from tests.support.runs import (
    END,
    ENDLESS,
    EVERY,
    GRIDS,
    HALF,
    STAGES,
    STEP,
    STEPS,
    WORLDS,
    Place,
    build_start,
    distance,
    equal,
)
from trainer.run.checkpoint import read
from trainer.run.lease import request_stop, stop_file

SHORT = (f"training.images = {HALF}",)
four = pytest.param(4, marks=pytest.mark.slow)
on_every_world = pytest.mark.parametrize("world", [*WORLDS, four])
in_every_stage = pytest.mark.parametrize("stage", STAGES)


def assert_resumed(place: Place, name: str, *, of: str) -> None:
    """Return if a run that was resumed at its third step is the uninterrupted one bit for bit."""
    assert f"resumes from checkpoint {HALF:012d}" in place.log(name)
    assert place.losses(name)[:STEPS] == place.losses(of)
    last = f"checkpoints/{END:012d}"
    assert read(place.run(name) / last).files == read(place.run(of) / last).files  # checksums


@pytest.mark.parametrize("world", [3, four])
@in_every_stage
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    place: Place, world: int, stage: int
) -> None:
    """On two ranks the next test holds it."""
    place.train_all(world)
    assert_resumed(place, f"{world}x{stage}-again", of=f"{world}x{stage}")


@in_every_stage
def test_offload_to_the_host_learns_alike(place: Place, stage: int) -> None:
    place.train_all(3)
    name = f"3x{stage}"
    assert place.losses(f"{name}-offload") == pytest.approx(place.losses(name), rel=1e-5)
    assert distance(place.checkpoint(f"{name}-offload", END), place.checkpoint(name, END)) < 5e-5


def test_a_killed_run_resumes_bit_for_bit(place: Place) -> None:
    place.train_all(2)
    jobs = [
        ranks.start(
            place.root / f"kill-{stage}",
            ranks=2,
            runs=[place.arguments(f"killed{stage}", stage=stage, sets=ENDLESS)],
        )
        for stage in STAGES
    ]
    for stage, job in zip(STAGES, jobs, strict=True):
        # A checkpoint at step 3 alone; the ranks are killed, at no chosen moment, after it.
        checkpoints = place.run(f"killed{stage}") / "checkpoints"
        ranks.wait_for(checkpoints / f"{HALF:012d}")
        job.kill()
        for later in checkpoints.iterdir():
            if later.name != f"{HALF:012d}":
                shutil.rmtree(later)
    runs = [place.arguments(f"killed{stage}", stage=stage) for stage in STAGES]
    assert place.train(*runs, world=2) == [0, 0, 0]
    for stage in STAGES:
        assert_resumed(place, f"killed{stage}", of=f"2x{stage}")


@pytest.fixture(scope="module")
def alone(place: Place) -> str:
    """The name of the run on one rank."""
    pruned = (*EVERY, "intervals.keep = 2", "intervals.keep_every = 30")
    assert place.train(place.arguments("one", sets=(*GRIDS, *pruned)), world=1) == [0]
    return "one"


@on_every_world
@in_every_stage
def test_the_number_of_ranks_and_the_stage_change_no_step_and_no_grid(
    place: Place, alone: str, world: int, stage: int
) -> None:
    place.train_all(world)
    name = f"{world}x{stage}"
    assert place.losses(name) == pytest.approx(place.losses(alone), rel=1e-5)
    for key in ("grad_norm", "param_norm"):
        assert place.losses(name, key) == pytest.approx(place.losses(alone, key), rel=1e-4)
    assert distance(place.checkpoint(name, END), place.checkpoint(alone, END)) < 5e-5
    picture = f"samples/{END:012d}.png"
    one, grid = (np.asarray(Image.open(place.run(run) / picture)) for run in (alone, name))
    assert one.std() > 10
    assert np.abs(one.astype(int) - grid).max() <= 1


def test_a_long_term_checkpoint_stays_for_each_multiple_that_the_batch_does_not_divide(
    place: Place, alone: str
) -> None:
    kept = {int(path.name) for path in (place.run(alone) / "checkpoints").iterdir()}
    assert kept == {36, 60, 72}  # for 30 and 60; and the newest two


def test_tensorboard_has_what_a_run_is_watched_by(place: Place) -> None:
    events = EventAccumulator(str(place.run("2x2") / "tensorboard"))
    events.Reload()
    groups = {
        "train": ("loss", "mse", "vb", "bad_share"),
        "optimizer": ("grad_norm", "param_norm", "lr", "loss_scale", "skipped", "skipped_total"),
        "speed": ("images_per_second", "data_wait_share", "mfu_measured"),
        "memory": ("memory_gib", "host_memory_gib", "host_memory_growth_gib"),
        "0_overview": ("loss", "share_done", "hours_left", "mfu"),
        "goodput": ("productive", "starting", "lost", "saving"),
    }
    named = {f"{group}/{name}" for group, names in groups.items() for name in names}
    assert named <= set(events.Tags()["scalars"])
    assert {f"{name}/q{q}" for name in ("loss", "mse", "vb") for q in range(4)} <= set(
        events.Tags()["scalars"]
    )
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(STEP, END + 1, STEP))
    assert [event.value for event in losses] == pytest.approx(place.losses("2x2"), rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [END]
    (text,) = events.Tensors("config/text_summary")
    assert b"channel_mult = [1.0, 2.0]" in text.tensor_proto.string_val[0]


def test_a_checkpoint_resumes_in_another_world_and_stage(place: Place) -> None:
    place.train_all(2)
    place.fork("2x2", "moved", images=HALF)
    place.fork("2x3", "gathered", images=HALF)
    place.fork("2x1", "spread", images=HALF)
    runs = [place.arguments("moved", stage=1), place.arguments("gathered", stage=2)]
    assert place.train(*runs, world=1) == [0, 0]
    assert place.train(place.arguments("spread", stage=3), world=3) == [0]
    for name in ("moved", "gathered", "spread"):
        assert place.losses(name) == pytest.approx(place.losses("2x2"), rel=1e-5)
        assert distance(place.checkpoint(name, END), place.checkpoint("2x2", END)) < 5e-5


@on_every_world
@in_every_stage
def test_sharded_averages_equal_their_closed_form(place: Place, world: int, stage: int) -> None:
    place.train_all(world)
    name = f"{world}x{stage}"
    weights = [build_start(place), *(place.weights(name, n * STEP) for n in range(1, STEPS + 1))]
    last = place.checkpoint(name, END)
    for decay in (0.5, 0.9):
        for key in weights[0]:
            expected = decay**STEPS * weights[0][key].double()
            for n in range(1, STEPS + 1):
                expected += (1 - decay) * decay ** (STEPS - n) * weights[n][key].double()
            found = last[f"ema-{decay}:{key}"].double()
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7), (decay, key)


def test_damaged_images_are_counted_on_all_ranks_and_stop_the_run_beyond_their_share(
    place: Place, digits: Path
) -> None:
    shards = open_shards(shutil.copytree(digits, place.root / "damaged-digits"))
    order = Order(shards.sizes, seed=3, streams=4, block=16)
    for shard, row in zip(*order.locate([1, 4, 18])[1:], strict=True):  # of ranks 1, 0, 0
        path = Path(shards.root) / shards.shards[shard].tar
        content = bytearray(path.read_bytes())
        content[int(shards.index(shard)[row]["offset"]) + 30] ^= 1
        path.write_bytes(content)
    where = f'data.shards = "{shards.root}"'
    statuses = place.train(
        place.arguments("damaged", sets=(where,)),
        place.arguments("refused", sets=(where, "data.max_bad = 0.0002")),
        world=2,
    )
    assert statuses[0] == 0
    shares = place.losses("damaged", "bad_share")
    assert shares == [2 / STEP, 1 / STEP, 0, 0, 0, 0]
    assert "3 of 24 images were damaged and replaced" in place.log("damaged")
    assert "3 of 24 images are damaged, more than data.max_bad = 0.0002" in statuses[1]


def test_a_signal_to_one_rank_stops_all_and_saves(place: Place) -> None:
    job = ranks.start(
        place.root / "stop",
        ranks=2,
        runs=[place.arguments(n, sets=ENDLESS) for n in ("requested", "requested", "stopped")],
    )
    ranks.wait_for(place.run("requested") / "checkpoints" / f"{HALF:012d}")
    request_stop(place.run("requested"))
    ranks.wait_for(place.run("stopped") / "checkpoints" / f"{HALF:012d}")
    job.signal(1, signal.SIGTERM)
    job.wait()
    assert job.statuses == [75, 0, 75]  # a launcher does not repeat what ends with 0
    stop = stop_file(place.run("requested"))
    way = f"to resume, run `python -m launch ...` or delete {stop}"
    said = re.findall(rf"stop.*{re.escape(way)}", place.log("requested"))
    assert said == [f"stopped by `python -m launch stop`; {way}", f"stop requested; {way}"]
    assert "stopped by a signal; rerun the same command to resume" in place.log("stopped")
    saved = max(int(p.name) for p in (place.run("stopped") / "checkpoints").iterdir())
    assert saved == max(
        json.loads(line)["images"] for line in (place.run("stopped") / "metrics.jsonl").open()
    )


def test_a_finished_run_says_so_and_refusals_touch_nothing(place: Place) -> None:
    before = {p: p.read_bytes() for p in place.run("2x2").rglob("*") if p.is_file()}
    statuses = place.train(
        place.arguments("2x2", sets=EVERY),
        place.arguments("2x2", sets=("model.channels = 64",)),
        place.arguments("2x2", sets=("data.block = 8",)),
        place.arguments("none", sets=("training.batch = 7", "training.images = 70")),
        world=2,
    )
    assert statuses[0] == 0
    assert "started with another config: model.channels = 32 (now 64)" in statuses[1]
    assert re.search(rf"data.block = 16 \(now 8\).*--init {place.run('2x2')} to ", statuses[2])
    assert "training.batch = 7 does not divide among 2 ranks" in statuses[3]
    assert not place.run("none").exists()
    after = {p: p.read_bytes() for p in place.run("2x2").rglob("*") if p.is_file()}
    log = place.run("2x2") / "log.txt"
    state = place.run("2x2") / "launch" / "state.json"
    assert json.loads(after.pop(state))["starts"] == json.loads(before.pop(state))["starts"] + 1
    assert after.pop(log).endswith(b"finished: 72 images; to train longer, raise training.images\n")
    before.pop(log)
    timeline = place.run("2x2") / "launch" / "timeline.jsonl"
    assert after.pop(timeline).startswith(before.pop(timeline))
    assert after == before


def test_sixteen_bits_learn_alike(place: Place) -> None:
    sets = ('training.precision = "bf16"', f"training.images = {4 * STEP}")
    brain = [place.arguments(f"brain{stage}", stage=stage, sets=sets) for stage in STAGES]
    assert place.train(*brain, world=2) == [0, 0, 0]
    for stage in STAGES:
        assert place.losses(f"brain{stage}") == pytest.approx(place.losses("2x2")[:4], rel=0.02)


@pytest.mark.slow
def test_loss_aware_timesteps_dropout_and_recomputed_activations_resume_exactly(
    place: Place,
) -> None:
    aware = (
        'training.timesteps = "loss-second-moment"',
        "diffusion.steps = 21",
        f"training.images = {40 * STEP}",
        f"intervals.checkpoint = {20 * STEP}",
    )
    thrifty = ("model.dropout = 0.2", "model.checkpoint = true", "training.deterministic = true")
    runs = {"aware": (2, aware, 20 * STEP), "thrifty": (3, thrifty, HALF)}
    for suffix in ("", "-again"):
        if suffix:
            for name, (_, _, images) in runs.items():
                place.fork(name, name + suffix, images=images)
        assert place.train(
            *(place.arguments(name + suffix, stage=stage, sets=sets)
              for name, (stage, sets, _) in runs.items()),
            world=2,
        ) == [0, 0]  # fmt: skip
    assert equal(place.checkpoint("aware", 40 * STEP), place.checkpoint("aware-again", 40 * STEP))
    assert equal(place.checkpoint("thrifty", END), place.checkpoint("thrifty-again", END))


def test_a_run_without_a_checkpoint_takes_a_corrected_config(place: Place) -> None:
    """The first start diverged before its first checkpoint; the second has a smaller network."""
    wide = ("training.lr = 1e20", "model.channels = 64")
    both = (place.arguments("corrected", sets=sets) for sets in (wide, SHORT))
    refused, finished = place.train(*both, world=2)
    assert "the run has diverged" in refused and finished == 0
    assert "model.channels changes from 64 to 32" in place.log("corrected")
    assert equal(place.checkpoint("corrected", HALF), place.checkpoint("2x2", HALF))


def test_a_run_whose_checkpoints_are_gone_says_that_it_starts_again(place: Place) -> None:
    place.fork("2x2", "emptied", images=HALF)
    place.run("emptied").joinpath("checkpoints").rename(place.root / "elsewhere")
    assert place.train(place.arguments("emptied", sets=SHORT), world=2) == [0]
    assert "was committed: the run starts from the beginning" in place.log("emptied")
    assert place.losses("emptied") == place.losses("2x2")[: STEPS // 2]
