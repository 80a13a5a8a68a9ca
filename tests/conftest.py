"""What several test files share: the digits' shards, and tiny presets to train on them."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import save_file

from data import pack
from data.dataset import Shards, open_shards
from tests.support import golden
from tests.support.cluster import Cluster, missing
from tests.support.data_fixtures import pack_folder
from tests.support.data_streams import IMAGES, SIZE
from tests.support.runs import EVERY, GRIDS, Place
from tests.support.site import Site
from trainer.adm.unet import build
from trainer.config import experiment as configs

# On a busy machine any example may take long.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")
# Some tests read as another user what this one wrote.
os.umask(0o022)
# A shell's background ignores Ctrl-C, and nohup HUP: so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

TINY = """
objective = "denoise"
[model]
image_size = 8
channels = 32
channel_mult = [1, 2]
blocks = 1
attention = [4]
heads = 2
num_classes = 10
[diffusion]
schedule = "cosine"
[training]
images = 64
batch = 8
micro_batch = 2
lr = 1e-3
warmup_images = 32
weight_decay = 0.01
clip = 1.0
ema = [0.5, 0.9]
precision = "fp32"
seed = 3
[data]
shards = "{shards}"
streams = 4
block = 16
workers = 0
flip = false
[intervals]
log = 8
checkpoint = 32
keep = 10
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the test cluster; skip what needs a GPU where there is none."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits, packed as they are: 8x8."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    assert pack.main(["digits", str(out), "--size", "8"]) == 0
    return out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A preset of 8 steps that takes no time."""
    preset = tmp_path_factory.mktemp("presets") / "tiny.toml"
    preset.write_text(TINY.format(shards=digits))
    return preset


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two machines under Slurm and ssh, and a login node. In CI it may not be missing."""
    if (why := missing()) is not None:
        assert os.environ.get("CI") != "true", why
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("cluster")) as machines:
        yield machines


@pytest.fixture(scope="session")
def site(cluster: Cluster, digits: Path) -> Site:
    """A user on the cluster's login node, with shards and a preset on the shared disk."""
    shards = shutil.copytree(digits, cluster.home / "digits")
    preset = cluster.home / "tiny.toml"
    preset.write_text(TINY.format(shards=shards))
    return Site(cluster, preset)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Place:
    """Two ranks have trained 6 steps in ZeRO stage 2, the run "2x2", keeping every checkpoint.

    A test of the other stages, or of 3 or 4 ranks, asks `Place.train_all` for theirs.
    """
    here = Place(tmp_path_factory.mktemp("runs"), tiny)
    assert here.train(here.arguments("2x2", sets=(*EVERY, *GRIDS)), world=2) == [0]
    return here


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, list[str]]:
    """Networks with formula weights: a UNet as a published `.pt`, a classifier as safetensors."""
    root = tmp_path_factory.mktemp("weights")
    text = tiny.read_text().replace('objective = "denoise"', 'objective = "classify"')
    (root / "classifier.toml").write_text(text)
    nets = {}
    for name, preset in (("unet", tiny), ("classifier", root / "classifier.toml")):
        nets[name] = build(configs.load(preset).model)
        golden.set_formula_weights(nets[name])
    torch.save(nets["unet"].state_dict(), root / "unet.pt")
    save_file(nets["classifier"].state_dict(), root / "classifier.safetensors")
    return {
        "unet": [str(root / "unet.pt"), "--preset", str(tiny)],
        "guide": [
            "--classifier", str(root / "classifier.safetensors"),
            "--classifier-preset", str(root / "classifier.toml"), "--scale", "3",
        ],
    }  # fmt: skip


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, list[str]]:
    """A base that was trained on dropped labels, and an upsampler from 8 to 16 px."""
    root = tmp_path_factory.mktemp("nets")
    large = tiny.read_text().replace("image_size = 8", "image_size = 16\nsmall_size = 8")
    texts = {
        "base": tiny.read_text().replace("seed = 3", "seed = 3\nlabel_dropout = 0.1"),
        "up": large.replace("attention = [4]", "attention = [8]"),
    }
    for name, text in texts.items():
        (root / f"{name}.toml").write_text(text)
        net = build(configs.load(root / f"{name}.toml").model)
        golden.set_formula_weights(net)
        torch.save(net.state_dict(), root / f"{name}.pt")
    up = [str(root / "up.pt"), "--upsampler-preset", str(root / "up.toml")]
    return {
        "base": [str(root / "base.pt"), "--preset", str(root / "base.toml")],
        "up": [str(root / "up.pt"), "--preset", str(root / "up.toml")],
        "and": ["--upsampler", *up, "--upsampler-steps", "ddim2", "--upsampler-batch", "3"],
    }


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fixed random network of features as an exported program."""
    from tests.support.exported import save  # imports DeepSpeed

    return save(tmp_path_factory.mktemp("network") / "convolutions.pt2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """A small dataset, for streams that break."""
    return pack_folder(tmp_path_factory.mktemp("whole"), images=IMAGES, size=SIZE)


@pytest.fixture
def copy(whole: Shards, tmp_path: Path) -> Shards:
    """A dataset that a test may damage after it was opened."""
    return open_shards(shutil.copytree(whole.root, tmp_path / "copy"))
