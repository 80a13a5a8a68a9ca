"""What is wrong is said in one line that names it, before anything is started or written."""

import os
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch

from data.exits import REFUSED
from tests.support import golden
from tests.support.options import main_of
from trainer import initial
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.config.__main__ import main as print_config
from trainer.train import TrainingPlan, parser

PUBLISHED = {
    "imagenet64": "64x64_diffusion",
    "imagenet128": "128x128_diffusion",
    "imagenet256": "256x256_diffusion",
    "imagenet256_uncond": "256x256_diffusion_uncond",
    "imagenet512": "512x512_diffusion",
    "lsun256": "lsun_bedroom",
    "upsample64_256": "64_256_upsampler",
    "upsample128_512": "128_512_upsampler",
    "classifier64": "64x64_classifier",
    "classifier128": "128x128_classifier",
    "classifier256": "256x256_classifier",
    "classifier512": "512x512_classifier",
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_builds_the_published_model(preset: str) -> None:
    with torch.device("meta"):
        net = build(configs.load(preset).model)
    expected = golden.table("published_models")[PUBLISHED[preset]]["state"]
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == expected


@pytest.mark.parametrize("preset", sorted(p.stem for p in configs.PRESETS.glob("*.toml")))
def test_a_config_survives_its_own_file(preset: str, tmp_path: Path) -> None:
    # In a file a command may have several lines.
    odd = r'data.validation = "pipe:a \\\n\t\"é\" \u007f \u0001"'
    config = configs.load(preset, [odd, "intervals.validate = 1"])
    file = tmp_path / "config.toml"
    file.write_text(configs.to_toml(config))
    assert configs.load(file) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.lrr = 1e-4", "unknown setting 'training.lrr' (nearest: 'lr')"),
        ("training.steps = 700000", "unknown setting 'training.steps' (nearest: 'images')"),
        ("lr = 1e-4", "unknown setting 'lr' (nearest: 'training.lr', in [training])"),
        ("intervals.x = 1", "unknown setting 'intervals.x'; there are: log, checkpoint, "),
        ("model.learn_sigm = true", "unknown setting 'model.learn_sigm'; there are: "),
        ("training.LR = 1e-4", "unknown setting 'training.LR' (nearest: 'lr')"),
        ("training.clip = None", "is not TOML; "),
        ("data.shards=/a/b", """ text in quotes: --set 'data.shards = "/a/b"';"""),
        ("training.clip = None", "to leave a setting out: --unset NAME"),
        ('data.shards = "gr\udcf6n"', "gr\\udcf6n\"': must be UTF-8"),
        ("modell.channels = 3", "unknown setting 'modell' (nearest: 'model')"),
        ('training.lr = "fast"', "training.lr = 'fast': must be a number"),
        ("training.lr = 0", "training.lr = 0.0: must be a number above 0"),
        ("training.lr = nan", "training.lr = nan: must be a number above 0"),
        ("training.warmup_images = -32", "training.warmup_images = -32: must be at least 0"),
        ("training.seed = -1", "training.seed = -1: must be from 0"),
        ('intervals.samples_steps = "ddim60"', "intervals.samples_steps: respacing = 'ddim60'"),
        ("training.ema = []", "training.ema = (): must be one or more"),
        ("training.ema = [1.0]", "training.ema = (1.0,)"),
        ("training.ema_images = 0", "training.ema_images = 0: must be at least 1"),
        ("training.ema_warmup = 1.5", "training.ema_warmup = 1.5: must be a share"),
        ("training.ema_widths = [0.3]", "training.ema_widths = (0.3,): must be different widths"),
        ('training.precision = "fp8"', 'one of "fp32", "bf16", "fp16"'),
        ('model.resample = "fft"', "model.resample = 'fft': must be one of \"biggan\", "),
        ('diffusion.schedule = "sine"', "diffusion.schedule = 'sine'"),
        ("training.images = 100", "a multiple of training.batch"),
        ("training.images = 6400000000000", "training.images = 6400000000000: must be below 10^12"),
        ("model.channel_mult = [1, 2.3]", "model.channel_mult"),
        ("model.attention = [7]", "model.attention"),
        ("model = 3", "model"),
        ("intervals.keep = 0", "intervals.keep = 0: must be at least 1"),
        ('objective = "paint"', "objective = 'paint'"),
        ("training.lr 3", "is not TOML"),
        ("data.shards = https://me:pw@h/s?key", "shards = https://***@h/s?***' is not"),
    ],
)
def test_a_wrong_setting_is_named(change: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        configs.load("digits", [change])
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    # Which cannot be set.
    assert "learn_sigma" not in str(raised.value)


def test_averages_warm_up_only_where_their_spans_are_in_images() -> None:
    with pytest.raises(ValueError, match=r"training.ema_warmup = 0.25: must be absent without"):
        configs.load("digits", unset=["training.ema_images"])


def test_a_setting_can_be_left_out() -> None:
    absent = ["model.head_channels", "intervals.samples"]
    config = configs.load("digits", ["model.heads = 2"], unset=absent)
    assert (config.model.heads, config.model.head_channels) == (2, None)
    with pytest.raises(ValueError, match=r"model\.heads_up = 7: must be a divisor of the \[128\]"):
        configs.load("digits", ["model.heads = 2", "model.heads_up = 7"], unset=absent)
    assert config.intervals.samples is None
    message = r"--unset model.head_chanels: the preset .* \(nearest: 'model.head_channels'\)"
    with pytest.raises(ValueError, match=message):
        configs.load("digits", unset=["model.head_chanels"])


@pytest.mark.parametrize("name", ["training.lr", "training"])
def test_a_setting_is_not_set_and_left_out_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--unset {name}: --set sets it, too; give one"):
        configs.load("digits", ["training.lr = 1e-4"], unset=[name])


def test_a_setting_of_a_section_is_found_without_it() -> None:
    with pytest.raises(ValueError, match=r"--unset betas: .* .nearest: 'training\.betas'"):
        configs.load("imagenet64", unset=["betas"])


def test_a_preset_is_utf_8_whatever_the_locale_and_with_the_mark_of_windows(tmp_path: Path) -> None:
    file = tmp_path / "größe.toml"
    text = (configs.PRESETS / "digits.toml").read_text().replace('shards = "', 'shards = "größe/')
    file.write_text(text, encoding="utf-8-sig")
    posix = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    posix["PYTHONIOENCODING"] = "utf-8"
    command = [sys.executable, "-m", "trainer.config", os.fsencode(file)]
    done = subprocess.run(command, env={**os.environ, **posix}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert 'shards = "größe/' in done.stdout.decode()
    file.write_text(text, encoding="utf-16")
    with pytest.raises(
        ValueError, match=r"größe\.toml: byte 1 is not UTF-8: save the file in that"
    ):
        configs.load(file)


def test_an_unknown_preset_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'imagnet64' \(nearest: 'imagenet64'\)"):
        configs.load("imagnet64")
    with pytest.raises(ValueError, match="no such file"):
        configs.load(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("objective = ")
    with pytest.raises(ValueError, match="is not valid TOML"):
        configs.load(tmp_path / "broken.toml")
    text = (configs.PRESETS / "digits.toml").read_text().replace("lr = 1e-3\n", "")
    (tmp_path / "short.toml").write_text(text)
    with pytest.raises(ValueError, match=r"setting 'training.lr' is missing"):
        configs.load(tmp_path / "short.toml")


def test_the_learning_rate_warms_up_and_anneals() -> None:
    training = configs.load(
        "digits", ["training.warmup_images = 640", "training.anneal = true", "training.lr = 1.0"]
    ).training
    assert training.learning_rate(0) == pytest.approx(0.1)
    half = training.images // 2
    assert training.learning_rate(half) == pytest.approx(0.5)
    assert training.learning_rate(training.images) == 0.0


@pytest.mark.parametrize("ranks", [1, 2, 4, 16, 64])
def test_a_batch_is_cut_evenly(ranks: int) -> None:
    training = configs.load("digits").training
    micro = training.micro_batch_on(ranks)
    assert micro <= training.micro_batch
    assert training.batch % (ranks * micro) == 0


@pytest.mark.parametrize(
    ("change", "source"),
    [
        ("model.learn_sigma = false", "diffusion.variance"),
        ("data.image_size = 99", "model.image_size"),
    ],
)
def test_a_setting_that_follows_from_another_cannot_be_set(change: str, source: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be set: it follows from {source}"):
        configs.load("digits", [change])


def test_the_config_command_prints_what_it_resolved_or_the_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert print_config(["digits", "--set", "training.lr = 1", "--ranks", "2"]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert configs.load(printed) == configs.load("digits", ["training.lr = 1"])
    assert print_config(["imagenet64", "--ranks", "21"]) == REFUSED
    assert "2048 does not divide among 21 ranks" in capsys.readouterr().err
    assert print_config(["digits", "--set", "training.lrr = 1"]) == REFUSED
    assert "unknown setting 'training.lrr' (nearest: 'lr')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "ranks", "near"),
    [(64, 1, None), (1024, 8, None), (97, 1, "96 or 98"), (1016, 8, "1008 or 1024"), (6, 1, None)],
)
def test_a_batch_that_cuts_badly_is_told_with_one_near_it(
    batch: int, ranks: int, near: str | None
) -> None:
    sets = [f"training.batch = {batch}", f"training.images = {batch}", "training.micro_batch = 64"]
    said = configs.load("digits", sets).training.badly_cut_on(ranks)
    assert (said is None) if near is None else (said is not None and f"{near} would" in said)


@pytest.mark.parametrize(
    "command",
    ["trainer.config", "trainer.train", "trainer.sample", "launch", "data.pack", "data.shards"],
)
def test_a_wrong_option_ends_every_command_alike(command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(command)(["--no-such-option"])
    assert end.value.code == REFUSED


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--patience nan", "nan: must be from 10 to 1,000,000 seconds"),
        ("--patience inf", "inf: must be from 10 to 1,000,000 seconds"),
        ("--patience 9", "9: must be from 10 to 1,000,000 seconds"),
        ("--patience soon", "invalid seconds value: 'soon'"),
        ("--gpus=-1", "-1: must be at least 0"),
        ("--profile=-1", "-1: must be at least 0"),
    ],
)
def test_an_option_that_means_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], option: str, said: str
) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["digits", "--run", "run", *option.split()])
    assert end.value.code == REFUSED and said in capsys.readouterr().err


def make(run: Path, preset: Path | str, *changes: str) -> TrainingPlan:
    sets = [word for change in changes for word in ("--set", change)]
    return TrainingPlan.make(parser().parse_args([str(preset), "--run", str(run), *sets]), ranks=1)


def test_a_plan_refuses_before_anything_is_written(tmp_path: Path, tiny: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="no dataset at"):
        make(run, tiny, f'data.shards = "{tmp_path}"')
    with pytest.raises(ValueError, match="has 10 classes, the network 7"):
        make(run, tiny, "model.num_classes = 7")
    with pytest.raises(ValueError, match="streams"):
        make(run, tiny, "data.streams = 4000")
    with pytest.raises(ValueError, match="16"):
        make(run, tiny, "model.image_size = 16")
    words = [str(tiny), "--run", str(run), "--init", str(tmp_path / "none.pt")]
    plan = TrainingPlan.make(arguments := parser().parse_args(words), ranks=1)
    with pytest.raises(ValueError, match=r"none\.pt: no such file or directory"):
        initial.choose(arguments, run=plan.run, config=plan.config)
    assert not run.exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_is_refused_only_on_a_device_that_lacks_it(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    run, change = tmp_path / "run", f'training.precision = "{precision}"'
    name = f"is_{precision}_supported"
    monkeypatch.setattr(deepspeed.get_accelerator(), name, lambda: True)
    assert make(run, tiny, change).config.training.precision == precision
    monkeypatch.setattr(deepspeed.get_accelerator(), name, lambda: False)
    with pytest.raises(ValueError, match=f"'{precision}' does not run on this device"):
        make(run, tiny, change)
    assert not run.exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no run directory"):
        make(tmp_path, tiny)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
