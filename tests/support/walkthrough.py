"""A place in which the commands of the pages run in seconds: everything in it is small.

The rules, all of them: pictures have an eighth of the side, networks 32 channels, runs 4 steps of
16 images; counts in the commands are those of `SMALLER`; a job has at most 2 ranks; what a cluster
or a download would bring is replaced by `STAND_INS`, or not run.
"""

import os
import re
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from tests.support import ranks
from tests.support.data_fixtures import image_file
from tests.support.pages import ROOT, Command
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.config import settings

#: Settings of every preset.
_SMALL = (
    "model.channels = 32", "model.channel_mult = [1, 2]", "model.blocks = 1", "model.heads = 2",
    "training.images = 64", "training.batch = 16", "training.micro_batch = 8",
    'training.precision = "fp32"', 'training.kernels = "plain"', "training.compile = false",
    "data.streams = 2", "data.block = 8", "data.workers = 0",
    "intervals.log = 16", "intervals.checkpoint = 64",
)  # fmt: skip
#: What is left out, where a preset has it.
_SIDES = ("image_size", "small_size")
_ABSENT = ("model.head_channels", "intervals.keep_every", "intervals.samples")
#: Numbers in commands, and what stands for them here.
SMALLER = (
    (r"--size (\d+)", lambda found: f"--size {int(found[1]) // 8}"),
    (r"--images \d+", "--images 16"),
    (r"--batch \d+", "--batch 8"),
    (r"--steps 250|--steps 1000", "--steps 2"),
    (r"ddim25", "ddim2"),
    (r"evaluate nll", "evaluate nll --steps 4"),
    (r"training\.images = [\d_]+", "training.images = 64"),
    (r"training\.batch = \d+", "training.batch = 8"),
    (r"training\.micro_batch = \d+", "training.micro_batch = 4"),
    (r"intervals\.validate = [\d_]+", "intervals.validate = 32"),
    (
        r"intervals\.evaluate = [\d_]+",
        "intervals.evaluate = 64' --set 'evaluation.images = 16' "
        '--set \'evaluation.labels = "random"',
    ),
    (r"intervals\.averages = [\d_]+", "intervals.averages = 16"),
    (r"checkpoints/0000\d{8}", "checkpoints/000000000064"),
    (r"--at \d+", "--at 64"),
    (r"power-([\d.]+)-\d{12}", r"power-\1-000000000064"),
)
#: Files of others: what stands for them is made by these commands, or by `Walkthrough`.
STAND_INS = (
    (r"weights-inception-2015-12-05-6726825d\.pth", "runs/classifier64"),
    (r"(?<!\w)/data/", "data-of-the-site/"),
    (r"launch sample runs/digits", "launch sample runs/imagenet64"),
)
#: What is made before the first page, in this order.
FIRST = (
    "python -m data.pack /data/imagenet/train shards/imagenet64 --size 64",
    "python -m data.pack /data/imagenet/train shards/imagenet256_original --size 256 "
    "--keep-original",
    "torchrun --nproc-per-node 8 -m -- trainer.train imagenet64 --run runs/imagenet64",
    "python -m data.pack /data/imagenet/val shards/val64 --size 64 --class-map val.txt "
    "--classes-of shards/imagenet64",
    "python -m trainer.train classifier64 --run runs/classifier64",
    "torchrun --nproc-per-node 8 -m -- trainer.sample runs/imagenet64 --out samples.npz "
    "--images 50000 --steps 250 --classifier runs/classifier64 --scale 1.0",
    "python -m trainer.evaluate reference shards/imagenet64 --out VIRTUAL_imagenet64_labeled.npz "
    "--network weights-inception-2015-12-05-6726825d.pth",
)
#: What runs with the small presets; the others count, check and print, and take the real ones.
_COMPUTES = ("trainer.train", "trainer.sample", "trainer.evaluate", "trainer.export", "trainer.ema")
#: Folders of photographs below /data that the pages name.
_FOLDERS = ("imagenet/train", "flowers", "own", "photos")
#: Weights files that the pages name, and their presets.
_WEIGHTS = {
    "64x64_diffusion.pt": "imagenet64",
    "64x64_classifier.pt": "classifier64",
    "256x256_diffusion.pt": "imagenet256",
    "64_256_upsampler.pt": "upsample64_256",
}


def smaller(preset: str) -> str:
    """A preset of a small network that trains 4 steps."""
    whole = settings.read(configs.PRESETS / f"{preset}.toml")
    sides = {name: whole["model"][name] // 8 for name in _SIDES if name in whole["model"]}
    changes = [f"model.{name} = {side}" for name, side in sides.items()]
    changes += [*_SMALL, f"model.attention = [{sides['image_size'] // 2}]"]
    unset = [n for n in _ABSENT if n.rpartition(".")[2] in whole[n.partition(".")[0]]]
    return configs.to_toml(configs.load(preset, changes, unset=unset))


class Walkthrough:
    """The directory in which commands run as in a checkout, and what each of them printed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._done: dict[str, tuple[int, str]] = {}
        shutil.copytree(ROOT / "trainer" / "presets", root / "presets")
        shutil.copytree(ROOT / "launch" / "clusters", root / "launch" / "clusters")
        shutil.copy(ROOT / "ds_config.json", root)
        shutil.copy(ROOT / "launch" / "clusters" / "slurm.toml", root / "my.toml")
        for preset in (root / "presets").glob("*.toml"):
            if not preset.stem.startswith("digits"):
                preset.write_text(smaller(preset.stem))
        self._make_data(root / "data-of-the-site")
        for name, preset in _WEIGHTS.items():
            torch.manual_seed(0)
            net = build(configs.load(root / "presets" / f"{preset}.toml").model)
            torch.save(net.state_dict(), root / name)
        for text in FIRST:
            self.run(Command("the beginning", 0, text))

    def _make_data(self, folder: Path) -> None:
        """Class folders of photographs, and a validation set with a file of its classes."""
        names = [f"n0144076{i}" for i in range(4)]
        for i in range(24):
            inside = [f"{name}/{names[i % 4]}/{i}.JPEG" for name in _FOLDERS]
            for seed, path in enumerate((*inside, f"imagenet/val/{i:04d}.JPEG")):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(image_file(i + 24 * seed, width=48, height=40))
        lines = [f"{i:04d}.JPEG {names[i % 4]}\n" for i in range(24)]
        (self.root / "val.txt").write_text("".join(lines))

    def run(self, command: Command) -> str:
        """Run a command of a page, once; returns what it printed.

        Raises:
            AssertionError: it ended with another status than 0.
        """
        text = self.text(command)
        if text not in self._done:
            self._done[text] = self._run(Command(command.page, command.line, text))
        status, said = self._done[text]
        assert status == 0, f"{command}\nas: {text}\nstatus {status}:\n{said}"
        return said

    def text(self, command: Command) -> str:
        """The command as it is run here."""
        text = command.text
        for pattern, other in (*SMALLER, *STAND_INS):
            text = re.sub(pattern, other, text)
        if re.search(r"-m launch (?!status|stop|check)", text) and "--dry-run" not in text:
            text += " --dry-run"
        return text

    def _run(self, command: Command) -> tuple[int, str]:
        count = re.search(r"--nproc-per-node (\d+)", command.text)
        world = min(2, int(count[1])) if count else 1
        words = [path for word in command.arguments for path in self._expanded(word)]
        assert command.module is not None
        task = partial(_main, self.root, command.module, words)
        job = ranks.fork(self.root / "jobs" / f"{len(self._done)}", task, ranks=world)
        said = job.wait()
        statuses = [process.exitcode for process in job.ranks]
        return max(status or 0 for status in statuses), said if statuses == [
            0
        ] * world else job.text

    def _expanded(self, word: str) -> list[str]:
        """A word as a shell expands it."""
        found = (
            sorted(str(path.relative_to(self.root)) for path in self.root.glob(word))
            if "*" in word
            else []
        )
        return found or [word]


def _main(root: Path, module: str, words: list[str]) -> int:
    """What `python -m MODULE WORDS` does, in the place."""
    os.chdir(root)
    if module in _COMPUTES:
        configs.PRESETS = root / "presets"
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0
