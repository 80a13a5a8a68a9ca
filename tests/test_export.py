"""Weights out and back: a diffusers folder draws our images, and other files load as they were."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from tests.support import golden
from tests.support.faults import full_disk
from trainer import diffusers_format, weights
from trainer.adm.config import UNetConfig
from trainer.adm.diffusion import Diffusion
from trainer.adm.sampler import ancestral, ancestral_step
from trainer.adm.unet import UNet, build
from trainer.config import experiment as configs
from trainer.export import _card, main
from trainer.networks import TrainedNetwork

SMALL = {
    "image_size": 16, "channels": 32, "channel_mult": (1, 2), "blocks": 2, "attention": (8,),
    "head_channels": 32,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "labels": {"num_classes": 5},
    "new order": {"qkv": "new", "head_channels": 16},
    "legacy, two heads": {"qkv": "legacy", "head_channels": 16},
    "three levels": {"channel_mult": (1, 1, 2), "attention": (8, 4), "blocks": 1},
    "convolutions": {"resample": "conv"},
    "added": {"conditioning": "add"},
    "fixed heads of one width": {"head_channels": None, "heads": 4},
    "upsampler": {"small_size": 4},
    "no learned variance": {"learn_sigma": False},
    "dropout": {"dropout": 0.25},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_computes_what_our_network_does(variant: str) -> None:
    config = UNetConfig(**{**SMALL, **VARIANTS[variant]})
    net = UNet(config)
    golden.set_formula_weights(net)
    net = net.double().eval()
    theirs = diffusers.UNet2DModel.from_config(diffusers_format.options(config)).double().eval()
    weights = diffusers_format.to_diffusers(net.state_dict(), config=config)
    theirs.load_state_dict(weights)
    blocks = [m for m in theirs.modules() if isinstance(m, diffusers.models.resnet.ResnetBlock2D)]
    assert {block.dropout.p for block in blocks} == {config.dropout}
    x = golden.wave("x", (2, config.in_channels, 16, 16), 1.0).double()
    t = torch.tensor([7, 803])
    y = torch.tensor([3, 1]) if config.num_classes else None
    found = theirs(x, t, class_labels=y).sample
    if config.small_size is None:
        wanted = net(x, t, y)
    else:
        low_res = golden.wave("low", (2, 3, 4, 4), 1.0).double()
        wanted = net(x[:, :3], t, low_res=low_res)
        enlarged = torch.nn.functional.interpolate(low_res, (16, 16), mode="bilinear")
        found = theirs(torch.cat((x[:, :3], enlarged), dim=1), t).sample
    assert (found - wanted).abs().max() < 1e-10 * wanted.abs().max()
    back = diffusers_format.from_diffusers(weights, config=config)
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in net.state_dict().items())
    with pytest.raises(AssertionError, match=r"no place in diffusers' network: a\.weight"):
        diffusers_format.to_diffusers({**net.state_dict(), "a.weight": x}, config=config)


@pytest.mark.parametrize(
    "sets",
    [
        ("variance = 'learned'", "loss = 'hybrid'", "schedule = 'cosine'"),
        ("variance = 'fixed_large'", "loss = 'simple'", "schedule = 'linear'", "steps = 250"),
        ("variance = 'fixed_small'", "loss = 'vlb'", "schedule = 'linear'", "predict = 'x0'"),
    ],
)
def test_diffusers_takes_the_same_steps(sets: tuple[str, ...]) -> None:
    config = configs.load("digits", [f"diffusion.{one}" for one in sets])
    diffusion = Diffusion(config.diffusion)
    theirs = diffusers.DDPMScheduler.from_config(diffusers_format.scheduler(config))
    torch.testing.assert_close(theirs.betas, diffusion.betas.float(), rtol=1e-4, atol=1e-7)
    x = golden.wave("x", (1, 3, 8, 8), 1.0)
    out = golden.wave("out", (1, config.model.out_channels, 8, 8), 0.5)
    for t in (0, 1, diffusion.steps // 2, diffusion.steps - 1):
        generator = torch.Generator().manual_seed(t)
        found = theirs.step(out, t, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=generator.manual_seed(t)) * (t > 0)
        p = diffusion.p_mean_variance(out, x, torch.tensor([t]), clip=True)
        golden.assert_close(found, ancestral_step(p, noise=noise, gradient=None), tolerance=1e-3)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' network with made-up weights, small enough that images stay in range."""
    net = build(configs.load("digits").model)
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.02 if parameter.dim() > 1 else 0.1)
    path = tmp_path_factory.mktemp("weights") / "digits.pt"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("export") / "digits"
    assert main([str(weights_file), "--preset", "digits", "--to", f"{to}/"]) == 0
    return to


def test_a_diffusers_pipeline_draws_our_images(folder: Path) -> None:
    found = TrainedNetwork.find(folder, preset=None, decay=None)
    net = build(found.config.model).eval()
    net.load_state_dict(found.weights())
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = diffusers.ConsistencyModelPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    labels = [3, 8]
    theirs = pipeline(
        batch_size=2, class_labels=labels, num_inference_steps=50,
        generator=torch.Generator().manual_seed(5), output_type="pt",
    ).images  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    shape = (2, 3, 8, 8)
    x = torch.randn(shape, generator=generator)
    diffusion = Diffusion(found.config.diffusion, respacing="50")
    y = torch.tensor(labels)
    with torch.no_grad():
        steps = ancestral(
            diffusion,
            lambda x, t: net(x, t, y),
            x,
            noise=lambda _: torch.randn(shape, generator=generator),
        )
        for _, x in steps:  # noqa: B007
            pass
    ours = (x / 2 + 0.5).clamp(0, 1)
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.std() > 0.05


def test_exports_are_on_disk_and_readable_as_the_umask_says(
    weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino) or sync(fd))
    mask = os.umask(0o027)
    try:
        for to in ("a.safetensors", "b.pt", "c/"):
            command = [str(weights_file), "--preset", "digits", "--to", f"{tmp_path}/{to}"]
            assert main(command) == 0
    finally:
        os.umask(mask)
    written = list(tmp_path.rglob("*"))
    assert len([path for path in written if path.is_file()]) == 2 + 6
    for path in (*written, tmp_path):
        assert path.stat().st_ino in synced, path
        assert path == tmp_path or path.stat().st_mode & 0o777 == (
            0o750 if path.is_dir() else 0o640
        )


def test_a_kill_leaves_no_name_and_the_next_write_takes_its_rest_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.ones(3)}

    def die(tensors: object, file: Path, **_: object) -> None:
        file.with_name(".tmp1a2b3c").touch()  # as safetensors does
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            monkeypatch.setattr(weights, "save_file", die)
            weights.save(tmp_path / "a.safetensors", tensors, metadata={})
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "a.safetensors").exists()
    weights.save(tmp_path / "a.safetensors", tensors, metadata={})
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.slow
def test_a_folder_is_utf_8_whatever_the_locale(weights_file: Path, tmp_path: Path) -> None:
    preset, to = tmp_path / "größe.toml", tmp_path / "café"
    text = (configs.PRESETS / "digits.toml").read_text()
    preset.write_text(text.replace('shards = "', 'shards = "größe/'), encoding="utf-8")
    posix = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [weights_file, "--preset", os.fsencode(preset), "--to", os.fsencode(f"{to}/")]
    command = [sys.executable, "-m", "trainer.export", *words]
    done = subprocess.run(command, env={**os.environ, **posix}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert configs.load(to / "config.toml").data.shards.startswith("größe/")
    assert "# café" in (to / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.safetensors", "cannot write {}: "), ("a.pt", "[Errno 27] File too large: '{}'\n")],
)
def test_a_disk_that_is_full_is_one_line_that_names_the_file(
    weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, said: str
) -> None:
    command = [str(weights_file), "--preset", "digits", "--to", str(tmp_path / name)]
    with full_disk(1000):
        assert main(command) == 1
    assert capsys.readouterr().err.startswith("error: " + said.format(command[-1]))
    assert os.listdir(tmp_path) == []


def test_every_kind_of_export_loads_as_the_network_that_it_was(
    weights_file: Path, folder: Path, tmp_path: Path
) -> None:
    wanted = weights.load(weights_file)
    for name in ("a.safetensors", "b.pt"):
        assert main([str(folder), "--to", str(tmp_path / name)]) == 0
    sources = [(folder, None), (tmp_path / "a.safetensors", None), (tmp_path / "b.pt", "digits")]
    for path, preset in sources:
        found = TrainedNetwork.find(path, preset=preset, decay=None)
        assert found.config.model == configs.load("digits").model
        loaded = found.weights()
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[key], value) for key, value in wanted.items())
        with pytest.raises(ValueError, match=r"--ema = 0\.99: must be absent for a weights file"):
            TrainedNetwork.find(path, preset=preset, decay=0.99)
    card = (folder / "README.md").read_text()
    assert "10 classes" in card
    assert "Licence" in card


@pytest.mark.parametrize(
    ("preset", "setting"),
    [
        ("imagenet128", "model.heads"),
        ("imagenet512", "model.channel_mult"),
        ("classifier64", "objective"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_its_setting(preset: str, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}.*diffusers"):
        diffusers_format.options(configs.load(preset).model)


@pytest.mark.parametrize("count", [2, 10])
def test_the_model_card_draws_classes_that_the_network_has(count: int) -> None:
    config = configs.load("digits", [f"model.num_classes = {count}"])
    found = TrainedNetwork(config, Path("none.pt"), "0", "none")
    card = _card(Path("digits"), {}, found=found)
    labels = re.search(r"class_labels=\[([\d, ]+)\]", card)
    assert labels and all(int(label) < count for label in labels[1].split(", "))


def test_weights_that_are_not_finite_are_not_written(
    weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = weights.load(weights_file)
    said = {"fp32": "has values that are not finite\n", "fp16": "in fp16: give --precision bf16"}
    for value, (precision, message) in zip((torch.inf, 1e5), said.items(), strict=True):
        torch.save({**state, "out.2.bias": state["out.2.bias"] * 0 + value}, tmp_path / "a.pt")
        words = [str(tmp_path / "a.pt"), "--preset", "digits", "--precision", precision]
        assert main([*words, "--to", str(tmp_path / "b.pt")]) != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b.pt").exists()
    assert main([*words, "--to", str(tmp_path / "new" / "b.pt")]) != 0
    assert not (tmp_path / "new").exists()


def test_a_folder_of_diffusers_is_given_whole_and_with_its_network(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"a part of a folder of diffusers: give {folder}"):
        TrainedNetwork.find(folder / "unet", preset=None, decay=None)
    theirs = Path(shutil.copytree(folder / "unet", tmp_path / "theirs" / "unet")).parent
    with pytest.raises(ValueError, match=r"has no config.toml.*: add --preset"):
        TrainedNetwork.find(theirs, preset=None, decay=None)


def test_a_name_that_is_taken_or_means_nothing_is_refused(
    weights_file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (linked := tmp_path / "linked").symlink_to(tmp_path / "unmounted")
    for to, said in [
        (f"{folder}/", "does not exist yet"),
        (f"{linked}/", "does not exist yet"),
        (str(tmp_path / "weights.bin"), "FILE.safetensors, FILE.pt, or a directory"),
        (str(weights_file / "a.pt"), "its directory cannot be made (File exists)"),
        ("/proc/a.pt", "name another --to"),
    ]:
        assert main([str(weights_file), "--preset", "digits", "--to", to]) == 78
        assert said in capsys.readouterr().err
