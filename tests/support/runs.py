"""Tiny training runs for the tests, what they left on disk, and how two states differ."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import ranks
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.config import settings

STAGES = (1, 2, 3)
#: Numbers of ranks; no parameter's size divides by 3. The slow tests train on 4 as well.
WORLDS = (2, 3)
#: Images of a step, which divide among 1, 2, 3 and 4 ranks; a run has 6 steps.
STEP, STEPS = 12, 6
HALF, END = STEPS // 2 * STEP, STEPS * STEP
SIZES = (
    f"training.batch = {STEP}",
    f"training.images = {END}",
    "training.micro_batch = 4",
    f"training.warmup_images = {HALF}",
    f"intervals.log = {STEP}",
    f"intervals.checkpoint = {HALF}",
)
EVERY = (f"intervals.checkpoint = {STEP}",)
#: A run that is over on no machine before a test ends it.
ENDLESS = (f"training.images = {10**7 * STEP}", "intervals.keep = 10000000")
GRIDS = (
    f"intervals.samples = {END}",
    "intervals.samples_count = 3",
    'intervals.samples_steps = "ddim5"',
)


@dataclass(frozen=True)
class Place:
    """Where the runs of this module are, and the preset they train."""

    root: Path
    preset: Path

    @classmethod
    def of_digits(cls, root: Path) -> "Place":
        """One outside of pytest, with the digits packed."""
        from data import pack
        from tests.conftest import TINY

        pack.main(["digits", str(root / "digits"), "--size", "8"])
        (root / "tiny.toml").write_text(TINY.format(shards=root / "digits"))
        return cls(root, root / "tiny.toml")

    def run(self, name: str) -> Path:
        return self.root / name

    def arguments(
        self,
        name: str,
        *,
        stage: int = 2,
        fp16: bool = False,
        offload: bool = False,
        loss_scale: int = 0,
        sets: tuple = (),
    ) -> list:
        ds_config = json.loads((ranks.ROOT / "ds_config.json").read_text())
        ds_config["zero_optimization"]["stage"] = stage
        # Without this, stage 3 would leave parameters of so few numbers whole on every rank.
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if fp16:
            ds_config["fp16"] |= {"initial_scale_power": 20, "loss_scale_window": 2}
        if offload:
            ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        ds_config["fp16"]["loss_scale"] = loss_scale
        file = self.root / f"ds-{stage}-{fp16}-{offload}-{loss_scale}.json"
        file.write_text(json.dumps(ds_config))
        sets = (*SIZES, *sets, *(('training.precision = "fp16"',) if fp16 else ()))
        sets = tuple(s for i, s in enumerate(sets) if settings.without([s], sets[i + 1 :]))
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

    def train_all(self, world: int) -> None:
        """Train 6 steps on so many ranks in every ZeRO stage, once, keeping every checkpoint.

        The run in stage 3, say, is "3x3". On more than 2, "3x3-again" is the same, forked at its
        third step and resumed; on 3 also "3x3-offload", with the optimizer's state on the host.
        """
        names = [f"{world}x{stage}" for stage in STAGES]
        done = self.root / f"all-on-{world}"
        if done.exists():
            return
        runs = [
            self.arguments(name, stage=stage, sets=(*EVERY, *GRIDS))
            for stage, name in zip(STAGES, names, strict=True)
        ]
        assert self.train(*runs, world=world) == [0] * len(runs)
        again = []
        suffixes = {2: (), 3: ("again", "offload")}.get(world, ("again",))
        for stage, name in zip(STAGES, names, strict=True):
            for suffix in suffixes:
                if not self.run(f"{name}-{suffix}").exists():  # where a test was ended in between
                    self.fork(name, f"{name}-{suffix}", images=HALF)
                offload = suffix == "offload"
                again.append(self.arguments(f"{name}-{suffix}", stage=stage, offload=offload))
        assert self.train(*again, world=world) == [0] * len(again)
        done.touch()

    def values(self, name: str, key: str) -> dict[int, float]:
        """A value by images, the last one written where a step was done again."""
        rows = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").open()]
        return {row["images"]: row[key] for row in rows if key in row}

    def log(self, name: str) -> str:
        return (self.run(name) / "log.txt").read_text()

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

    def weights(self, name: str, images: int) -> dict[str, Tensor]:
        """The weights of a checkpoint by parameter name."""
        path = self.run(name) / "checkpoints" / f"{images:012d}"
        return load_file(path / "model.safetensors")

    def fork(self, name: str, new: str, *, images: int) -> None:
        """A copy of a run as it was at a checkpoint."""
        shutil.copytree(self.run(name), self.run(new))
        for path in (self.run(new) / "checkpoints").iterdir():
            if int(path.name) > images:
                shutil.rmtree(path)


#: What `Engine.step` is given where a test does not judge its steps.
UNJUDGED: dict[str, Any] = {"loss": torch.zeros(()), "judge": lambda loss, grad_norm: None}


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


def build_start(place: Place) -> dict[str, Tensor]:
    """The weights that the seed gives."""
    torch.manual_seed(3)
    return build(configs.load(place.preset).model).state_dict()
