"""Properties of real runs: real ranks over gloo, real DeepSpeed-ZeRO, real shards.

Tiny runs of 8 steps are trained once for the module, in a handful of jobs; each test holds what
they left on disk against a property.
"""

import json
import resource
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from data.order import Order
from data.shards import open_shards
from launch.exits import FAILED
from tests import ranks
from trainer import config as configs
from trainer.adm.unet import build

STAGES = (1, 2, 3)
STEP = 8  # images


@dataclass(frozen=True)
class Place:
    """Where the runs of this module are, and the preset they train."""

    root: Path
    preset: Path

    def run(self, name: str) -> Path:
        return self.root / name

    def arguments(self, name: str, *, stage: int = 2, fp16: bool = False, sets: tuple = ()) -> list:
        mechanics = json.loads((ranks.ROOT / "ds_config.json").read_text())
        mechanics["zero_optimization"]["stage"] = stage
        # Without this, stage 3 would leave parameters of so few numbers whole on every rank.
        mechanics["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if fp16:
            mechanics["fp16"] |= {"initial_scale_power": 20, "loss_scale_window": 2}
        file = self.root / f"ds-{stage}-{fp16}.json"
        file.write_text(json.dumps(mechanics))
        sets = (*sets, 'training.precision = "fp16"') if fp16 else sets
        return [
            "train", str(self.preset), "--run", str(self.run(name)), "--ds-config", str(file),
            *(word for change in sets for word in ("--set", change)),
        ]  # fmt: skip

    def train(self, *runs: list, world: int, fp16: bool = False) -> list:
        """Train the runs one after the other on `world` ranks; their statuses."""
        name = f"job-{len(list(self.root.glob('job-*')))}"
        job = ranks.start(self.root / name, ranks=world, runs=list(runs), fp16=fp16)
        job.wait()
        return job.statuses

    def values(self, name: str, key: str) -> dict[int, float]:
        """A value by images, the last one written where a step was done again."""
        rows = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").open()]
        return {row["images"]: row[key] for row in rows if key in row}

    def losses(self, name: str, key: str = "loss") -> list[float]:
        """The loss, or another value, of every step that has it."""
        return [value for _, value in sorted(self.values(name, key).items())]

    def checkpoint(self, name: str, images: int) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by file and parameter name."""
        path = self.run(name) / "checkpoints" / f"{images:012d}"
        return {
            f"{file.stem}:{key}": value
            for file in sorted(path.glob("*.safetensors"))
            for key, value in load_file(file).items()
        }

    def fork(self, name: str, new: str, *, images: int) -> None:
        """A copy of a run as it was at a checkpoint."""
        shutil.copytree(self.run(name), self.run(new))
        for path in (self.run(new) / "checkpoints").iterdir():
            if int(path.name) > images:
                shutil.rmtree(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Place:
    """Two ranks have trained 8 steps in every ZeRO stage, keeping the checkpoint of every step."""
    here = Place(tmp_path_factory.mktemp("runs"), tiny)
    every = ("intervals.checkpoint = 8",)
    runs = [here.arguments(f"zero{stage}", stage=stage, sets=every) for stage in STAGES]
    assert here.train(*runs, world=2) == [0, 0, 0]
    return here


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative L2 distance among the kinds of state."""

    def norm(state: dict[str, Tensor], kind: str) -> float:
        return sum(float(v.double().square().sum()) for k, v in state.items() if k[:5] == kind)

    assert a.keys() == b.keys()
    difference = {key: a[key] - b[key] for key in b}
    kinds = {key[:5] for key in b}
    return max((norm(difference, kind) / norm(b, kind)) ** 0.5 for kind in kinds)


def test_a_killed_run_resumes_bit_for_bit(place: Place) -> None:
    for stage in STAGES:
        name = f"killed{stage}"
        # A checkpoint at step 4 alone; the ranks are killed, at no chosen moment, after it.
        job = ranks.start(
            place.root / f"kill-{stage}",
            ranks=2,
            runs=[place.arguments(name, stage=stage, sets=("training.images = 8000",))],
        )
        ranks.wait_for(place.run(name) / "checkpoints" / f"{4 * STEP:012d}")
        job.kill()
        for later in (place.run(name) / "checkpoints").iterdir():
            if later.name != f"{4 * STEP:012d}":
                shutil.rmtree(later)
    runs = [place.arguments(f"killed{stage}", stage=stage) for stage in STAGES]
    assert place.train(*runs, world=2) == [0, 0, 0]
    for stage in STAGES:
        assert "resumes from" in (place.run(f"killed{stage}") / "log.txt").read_text()
        assert place.losses(f"killed{stage}")[:8] == place.losses(f"zero{stage}")
        assert equal(place.checkpoint(f"killed{stage}", 64), place.checkpoint(f"zero{stage}", 64))


def test_the_number_of_ranks_changes_no_step(place: Place) -> None:
    sets = ("intervals.samples = 32", "intervals.samples_count = 3",
            'intervals.samples_steps = "ddim5"')  # fmt: skip
    pruned = ("intervals.checkpoint = 8", "intervals.keep = 2", "intervals.keep_every = 24")
    assert place.train(place.arguments("one", sets=(*sets, *pruned)), world=1) == [0]
    assert place.train(place.arguments("four", sets=sets), world=4) == [0]
    kept = {int(path.name) for path in (place.run("one") / "checkpoints").iterdir()}
    assert kept == {24, 48, 56, 64}
    for other in ("one", "four", "zero1", "zero3"):
        assert place.losses(other) == pytest.approx(place.losses("zero2"), rel=1e-5)
        assert place.losses(other, "grad_norm") == pytest.approx(
            place.losses("zero2", "grad_norm"), rel=1e-4
        )


def test_the_number_of_ranks_changes_no_grid(place: Place) -> None:
    for name in ("000000000032.png", "000000000064.png"):
        grids = [place.run(run) / "samples" / name for run in ("one", "four")]
        one, four = (np.asarray(Image.open(grid)) for grid in grids)
        assert one.std() > 10
        assert np.abs(one.astype(int) - four).max() <= 1


def test_tensorboard_has_what_a_run_is_watched_by(place: Place) -> None:
    events = EventAccumulator(str(place.run("four") / "tensorboard"))
    events.Reload()
    assert {f"train/{name}" for name in ("loss", "mse", "vb", "grad_norm", "param_norm", "lr",
            "loss_scale", "skipped", "skipped_total", "images_per_second", "data_wait_seconds",
            "memory_gib")} <= set(events.Tags()["scalars"])  # fmt: skip
    assert {f"{name}/q{q}" for name in ("loss", "mse", "vb") for q in range(4)} <= set(
        events.Tags()["scalars"]
    )
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(8, 65, 8))
    assert [event.value for event in losses] == pytest.approx(place.losses("four"), rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [32, 64]
    (text,) = events.Tensors("config/text_summary")
    assert b"channel_mult = [1.0, 2.0]" in text.tensor_proto.string_val[0]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_harms_nothing(place: Place) -> None:
    place.fork("zero2", "full", images=32)
    before = place.checkpoint("full", 32)
    arguments = place.arguments("full", sets=("intervals.checkpoint = 8",))
    job = ranks.fork(
        place.root / "full-job",
        partial(with_little_room, place.root / "full-job", arguments),
        ranks=2,
    )
    job.wait()
    assert [process.exitcode for process in job.ranks] == [FAILED, FAILED]
    assert job.text.count("error: the checkpoint could not be written: rank ") == 1
    assert max(p.name for p in (place.run("full") / "checkpoints").glob("0*")) == f"{32:012d}"
    assert equal(place.checkpoint("full", 32), before)


def with_little_room(directory: Path, arguments: list) -> int:
    """Train where no file may be larger than a megabyte, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    return ranks.work(directory, [arguments], False)


def test_a_checkpoint_resumes_in_another_world_and_stage(place: Place) -> None:
    place.fork("zero2", "moved", images=32)
    place.fork("zero3", "gathered", images=32)
    place.fork("zero1", "spread", images=32)
    runs = [place.arguments("moved", stage=3), place.arguments("gathered", stage=1)]
    assert place.train(*runs, world=1) == [0, 0]
    assert place.train(place.arguments("spread", stage=2), world=4) == [0]
    for name in ("moved", "gathered", "spread"):
        assert place.losses(name) == pytest.approx(place.losses("zero2"), rel=1e-5)
        assert distance(place.checkpoint(name, 64), place.checkpoint("zero2", 64)) < 5e-5


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_averages_equal_their_closed_form(place: Place, stage: int) -> None:
    torch.manual_seed(3)
    start = build(configs.load(place.preset).model).state_dict()
    weights = [start] + [
        {
            k[6:]: v
            for k, v in place.checkpoint(f"zero{stage}", n * STEP).items()
            if k[:6] == "model:"
        }
        for n in range(1, 9)
    ]
    last = place.checkpoint(f"zero{stage}", 64)
    for decay in (0.5, 0.9):
        for name in start:
            expected = decay**8 * weights[0][name].double()
            for n in range(1, 9):
                expected += (1 - decay) * decay ** (8 - n) * weights[n][name].double()
            found = last[f"ema-{decay}:{name}"].double()
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7), (decay, name)


@pytest.fixture(scope="module")
def half(place: Place) -> tuple[str, ...]:
    """Runs of eight steps in fp16, in two stages; a window of the loss scale is two steps."""
    sets = ("intervals.checkpoint = 8", "training.images = 64")
    names = ("half2", "half3")
    runs = [
        place.arguments(name, stage=stage, fp16=True, sets=sets)
        for name, stage in zip(names, (2, 3), strict=True)
    ]
    assert place.train(*runs, world=2, fp16=True) == [0, 0]
    for run, name in zip(runs, names, strict=True):
        place.fork(name, f"{name}-again", images=48)
        run[run.index("--run") + 1] = str(place.run(f"{name}-again"))
    assert place.train(*runs, world=2, fp16=True) == [0, 0]
    return names


def test_an_overflow_skips_the_step_and_halves_the_scale(
    place: Place, half: tuple[str, ...]
) -> None:
    for name in half:
        skipped = [bool(v) for v in place.losses(name, "skipped")]
        scales = place.losses(name, "loss_scale")
        assert skipped[0], "the first step at a scale of 2^20 must overflow"
        good = 0
        for n in range(1, 8):
            good = 0 if skipped[n - 1] else good + 1
            factor = 0.5 if skipped[n - 1] else 2 if good in (3, 5, 7) else 1
            assert scales[n] == factor * scales[n - 1]
        assert any(a < b for a, b in pairwise(scales)), "the scale must grow again"
        before = build_start(place)
        after = place.checkpoint(name, STEP)
        for key, value in before.items():
            for kind in ("model", "ema-0.5", "ema-0.9"):
                assert torch.equal(after[f"{kind}:{key}"], value)
        assert not any(v.any() for k, v in after.items() if k.startswith("adam"))


def test_adam_sees_the_gradient_that_is_reported_also_where_the_scale_grows(
    place: Place, half: tuple[str, ...]
) -> None:
    for name in half:
        norms = place.values(name, "grad_norm")  # of the steps that were not skipped
        assert len(norms) > 3
        for images in norms:
            before, after = (place.checkpoint(name, n) for n in (images - STEP, images))
            squares = [
                (after[key] - 0.9 * before[key]).double().square().sum()
                for key in after
                if key.startswith("adam-m")
            ]
            seen = 10 * float(sum(squares)) ** 0.5
            assert seen == pytest.approx(min(1.0, norms[images]), rel=1e-3)


def test_a_run_in_fp16_resumes_bit_for_bit(place: Place, half: tuple[str, ...]) -> None:
    for name in half:
        assert equal(place.checkpoint(name, 64), place.checkpoint(f"{name}-again", 64))
        for key in ("loss", "loss_scale", "skipped"):
            assert place.losses(name, key) == place.losses(f"{name}-again", key)


def build_start(place: Place) -> dict[str, Tensor]:
    """The weights that the seed gives."""
    torch.manual_seed(3)
    return build(configs.load(place.preset).model).state_dict()


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
    assert shares == [2 / STEP, 0, 1 / STEP, 0, 0, 0, 0, 0]
    assert (
        "3 of 24 images were damaged and replaced" in (place.run("damaged") / "log.txt").read_text()
    )
    assert "3 of 24 images are damaged, more than data.max_bad = 0.0002" in statuses[1]


def test_a_signal_to_one_rank_stops_all_and_saves(place: Place) -> None:
    run = place.arguments("stopped", sets=("training.images = 80000",))
    job = ranks.start(place.root / "stop", ranks=2, runs=[run])
    ranks.wait_for(place.run("stopped") / "checkpoints" / f"{4 * STEP:012d}")
    job.signal(1, signal.SIGTERM)
    job.wait()
    assert job.statuses == [75]
    saved = max(int(p.name) for p in (place.run("stopped") / "checkpoints").iterdir())
    assert saved == max(
        json.loads(line)["images"] for line in (place.run("stopped") / "metrics.jsonl").open()
    )


def test_a_damaged_checkpoint_is_passed_over(place: Place) -> None:
    place.fork("zero2", "torn", images=48)
    checkpoints = place.run("torn") / "checkpoints"
    torn = checkpoints / f"{48:012d}" / "ema-0.5.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    flipped = checkpoints / f"{40:012d}" / "model.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    (checkpoints / f".{56:012d}.partial").mkdir()
    assert place.train(place.arguments("torn"), world=2) == [0]
    log = (place.run("torn") / "log.txt").read_text()
    assert "ema-0.5.safetensors has" in log and "model.safetensors does not match" in log
    assert f"resumes from checkpoint {32:012d}" in log
    assert equal(place.checkpoint("torn", 64), place.checkpoint("zero2", 64))


def test_a_finished_run_says_so_and_refusals_touch_nothing(place: Place) -> None:
    before = {p: p.read_bytes() for p in place.run("zero2").rglob("*") if p.is_file()}
    statuses = place.train(
        place.arguments("zero2", sets=("intervals.checkpoint = 8",)),
        place.arguments("zero2", sets=("model.channels = 64",)),
        place.arguments("zero2", sets=("data.block = 8",)),
        place.arguments("none", sets=("training.batch = 7", "training.images = 70")),
        world=2,
    )
    assert statuses[0] == 0
    assert "started with another config: model.channels = 32 (now 64)" in statuses[1]
    assert "data.block = 16 (now 8)" in statuses[2]
    assert "training.batch = 7 does not divide among 2 ranks" in statuses[3]
    assert not place.run("none").exists()
    after = {p: p.read_bytes() for p in place.run("zero2").rglob("*") if p.is_file()}
    log = place.run("zero2") / "log.txt"
    assert after.pop(log).endswith(b"the run is finished: 64 images\n")
    before.pop(log)
    assert after == before


def test_sixteen_bits_and_offload_learn_alike(place: Place) -> None:
    brain = [
        place.arguments(f"brain{stage}", stage=stage, sets=('training.precision = "bf16"',))
        for stage in STAGES
    ]
    offload = place.arguments("offload", stage=2)
    file = place.root / "offload.json"
    mechanics = json.loads(Path(offload[offload.index("--ds-config") + 1]).read_text())
    mechanics["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    file.write_text(json.dumps(mechanics))
    offload[offload.index("--ds-config") + 1] = str(file)
    assert place.train(*brain, offload, world=2) == [0, 0, 0, 0]
    assert place.losses("offload") == pytest.approx(place.losses("zero2"), rel=1e-5)
    for stage in STAGES:
        assert place.losses(f"brain{stage}") == pytest.approx(place.losses("zero2"), rel=0.02)


def test_loss_aware_timesteps_dropout_and_recomputed_activations_resume_exactly(
    place: Place,
) -> None:
    aware = (
        'training.timesteps = "loss-second-moment"',
        "diffusion.steps = 21",
        "training.images = 320",
        "intervals.checkpoint = 160",
    )
    thrifty = ("model.dropout = 0.2", "model.checkpoint = true")
    runs = {"aware": (2, aware, 160), "thrifty": (3, thrifty, 32)}
    for suffix in ("", "-again"):
        if suffix:
            for name, (_, _, images) in runs.items():
                place.fork(name, name + suffix, images=images)
        assert place.train(
            *(place.arguments(name + suffix, stage=stage, sets=sets)
              for name, (stage, sets, _) in runs.items()),
            world=2,
        ) == [0, 0]  # fmt: skip
    assert equal(place.checkpoint("aware", 320), place.checkpoint("aware-again", 320))
    assert equal(place.checkpoint("thrifty", 64), place.checkpoint("thrifty-again", 64))
