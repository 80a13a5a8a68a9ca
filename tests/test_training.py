"""Properties of real runs: real ranks over gloo, real DeepSpeed-ZeRO, real shards.

Tiny runs of 8 steps are trained once for the module, in a handful of jobs; each test holds what
they left on disk against a property.
"""

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import ranks
from trainer import config as configs
from trainer.train import build

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
        if fp16:
            mechanics["fp16"]["initial_scale_power"] = 24
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

    def losses(self, name: str, key: str = "loss") -> list[float]:
        """The loss of every step, the last one written where a step was done again."""
        rows = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").open()]
        return [v for _, v in sorted({row["images"]: row[key] for row in rows}.items())]

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
    assert place.train(place.arguments("one"), world=1) == [0]
    assert place.train(place.arguments("four"), world=4) == [0]
    for other in ("one", "four", "zero1", "zero3"):
        assert place.losses(other) == pytest.approx(place.losses("zero2"), rel=1e-5)
        assert place.losses(other, "grad_norm") == pytest.approx(
            place.losses("zero2", "grad_norm"), rel=1e-4
        )


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


def test_an_overflow_skips_the_step_and_halves_the_scale(place: Place) -> None:
    sets = ("intervals.checkpoint = 8", "training.images = 32")
    runs = [place.arguments(f"half{stage}", stage=stage, fp16=True, sets=sets) for stage in STAGES]
    assert place.train(*runs, world=2, fp16=True) == [0, 0, 0]
    for stage in STAGES:
        name = f"half{stage}"
        skipped = [bool(v) for v in place.losses(name, "skipped")]
        scales = place.losses(name, "loss_scale")
        assert skipped[0], "the first step at a scale of 2^24 must overflow"
        for n in range(1, 4):
            assert scales[n] == (scales[n - 1] / 2 if skipped[n - 1] else scales[n - 1])
        before = build_start(place)
        after = place.checkpoint(name, STEP)
        for key, value in before.items():
            for kind in ("model", "ema-0.5", "ema-0.9"):
                assert torch.equal(after[f"{kind}:{key}"], value)
        assert not any(v.any() for k, v in after.items() if k.startswith("adam"))


def build_start(place: Place) -> dict[str, Tensor]:
    """The weights that the seed gives."""
    torch.manual_seed(3)
    return build(configs.load(place.preset).model).state_dict()


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


def test_loss_aware_timesteps_and_dropout_resume_exactly(place: Place) -> None:
    sets = (
        'training.timesteps = "loss-second-moment"',
        "diffusion.steps = 21",
        "model.dropout = 0.2",
        "training.images = 320",
        "intervals.checkpoint = 160",
        "intervals.log = 8",
    )
    assert place.train(place.arguments("aware", sets=sets), world=2) == [0]
    place.fork("aware", "aware-again", images=160)
    assert place.train(place.arguments("aware-again", sets=sets), world=2) == [0]
    assert equal(place.checkpoint("aware", 320), place.checkpoint("aware-again", 320))
