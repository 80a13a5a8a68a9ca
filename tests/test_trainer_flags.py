"""Flags of guided-diffusion become presets."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import golden
from tests.test_trainer_config import PUBLISHED
from trainer.adm.config import DiffusionConfig
from trainer.config import experiment as configs
from trainer.config.__main__ import main as print_config
from trainer.config.experiment import Config
from trainer.config.flags import to_preset


def read(text: str, folder: Path, *, ranks: int | None = None) -> Config:
    file = folder / "preset.toml"
    file.write_text(to_preset(text, ranks=ranks))
    return configs.load(file)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_flags_give_the_preset_that_is_there(preset: str, tmp_path: Path) -> None:
    flags = golden.table("published_models")[PUBLISHED[preset]]["flags"]
    text = " ".join(f"--{name} {value}" for name, value in flags.items())
    wanted = configs.load(preset)
    if preset == "imagenet512":
        # Its published flags are of sampling, in fp32.
        training = dataclasses.replace(wanted.training, precision="fp32")
        wanted = dataclasses.replace(wanted, training=training)
    assert read(text, tmp_path) == wanted


def test_training_flags_are_settings_and_a_batch_is_that_of_all_processes(tmp_path: Path) -> None:
    flags = (
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True "
        "--class_cond True --attention_resolutions 32,16,8 --resblock_updown True "
        "--use_new_attention_order True --num_head_channels 64 --noise_schedule cosine "
        "--dropout 0.1 --use_fp16 True "
        "--lr 2e-4 --batch_size=16 --microbatch 4 --ema_rate 0.999,0.9999 --data_dir /data "
        "--schedule_sampler loss-second-moment"
    )
    config = read(flags, tmp_path, ranks=8)
    training = config.training
    assert (training.batch, training.micro_batch, training.lr) == (128, 4, 2e-4)
    assert training.ema == (0.999, 0.9999)
    assert training.ema_images == 128
    assert training.images == 540_000 * 128
    assert training.timesteps == "loss-second-moment"
    assert config.model == configs.load("imagenet64").model
    assert "--data_dir: pack it first" in (tmp_path / "preset.toml").read_text()


def test_intervals_are_those_given_or_as_many_steps_as_in_the_preset(tmp_path: Path) -> None:
    """In images, 5,000 steps of the preset would be more than all of a run of 16 images a step."""
    flags = "--image_size 64 --class_cond True --noise_schedule cosine --batch_size 16"
    preset, config = configs.load("imagenet64"), read(flags, tmp_path, ranks=1)
    assert config.training.images == 540_000 * 16
    for name in ("log", "checkpoint", "keep_every", "samples"):
        assert getattr(config.intervals, name) * 2048 == getattr(preset.intervals, name) * 16
    given = f"{flags} --log_interval 20 --save_interval 500"
    intervals = read(given, tmp_path, ranks=1).intervals
    assert (intervals.log, intervals.checkpoint) == (20 * 16, 500 * 16)
    assert intervals.samples == config.intervals.samples


@pytest.mark.parametrize(
    ("flags", "absent"),
    [
        # guided-diffusion's README: MODEL_FLAGS of 64x64.
        (
            "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1"
            " --image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 "
            "--num_head_channels 64 --num_res_blocks 3 --resblock_updown True "
            "--use_new_attention_order True --use_scale_shift_norm True",
            {
                "lr": "0.0001",
                "batch_size": "1",
                "use_fp16": "False",
                "log_interval": "10",
                "save_interval": "10000",
            },
        ),
        (
            "--image_size 128 --classifier_depth 2",
            {
                "weight_decay": "0.0",
                "iterations": "150000",
                "anneal_lr": "False",
                "batch_size": "4",
                "classifier_use_fp16": "False",
                "log_interval": "10",
            },
        ),
        (
            "--image_size 64 --classifier_depth 4",
            {
                "noise_schedule": "linear",
                "lr": "0.0003",
                "weight_decay": "0.0",
                "iterations": "150000",
                "anneal_lr": "False",
                "batch_size": "4",
                "classifier_use_fp16": "False",
                "log_interval": "10",
            },
        ),
    ],
)
def test_each_training_flag_that_is_left_to_the_preset_is_named_until_it_is_given(
    flags: str, absent: dict[str, str], tmp_path: Path
) -> None:
    said = re.findall(
        r"^# --(\w+) absent: .* from the preset; there (.+)$", to_preset(flags, ranks=None), re.M
    )
    assert dict(said) == absent
    given = " ".join(f"--{name} {default}" for name, default in said)
    config = read(f"{flags} {given}", tmp_path, ranks=1)
    assert " absent" not in (tmp_path / "preset.toml").read_text()
    training = config.training
    assert (training.precision, training.anneal, training.weight_decay) == ("fp32", False, 0)
    assert training.batch == int(absent["batch_size"])


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ("--large_size 256 --small_size 64", "upsample64_256"),
        ("--large_size 128 --small_size 32", "upsample64_256"),
        ("--large_size 512 --small_size 128 --attention_resolutions 32,16", "upsample128_512"),
        ("--image_size 256", "imagenet256"),
    ],
)
def test_what_no_flag_says_of_an_upsampler_is_from_an_upsampler_and_of_others_is_not(
    sizes: str, nearest: str
) -> None:
    """A network with the width of the other kind was taken for it."""
    width = "192 --num_heads 4" if "image" in sizes else "256 --num_head_channels 64"
    flags = f"{sizes} --num_channels {width} --learn_sigma True --resblock_updown True"
    said = to_preset(f"{flags} --class_cond True", ranks=None)
    assert f"is from the preset {nearest}\n" in said


def test_without_flags_the_network_is_guided_diffusions_default(tmp_path: Path) -> None:
    config = read("--image_size 64", tmp_path)
    assert config.model == golden.unet_config(
        {
            "image_size": 64,
            "num_channels": 128,
            "num_res_blocks": 2,
            "attention_resolutions": "16,8",
            "resblock_updown": False,
            "use_scale_shift_norm": True,
            "class_cond": False,
            "learn_sigma": False,
        }
    )
    diffusion = DiffusionConfig(schedule="linear", variance="fixed_large", loss="simple")
    assert config.diffusion == diffusion
    classifier = read("--image_size 64 --classifier_width 128", tmp_path)
    assert classifier.model == golden.classifier_config(
        {
            "image_size": 64,
            "classifier_width": 128,
            "classifier_depth": 2,
            "classifier_attention_resolutions": "32,16,8",
            "classifier_use_scale_shift_norm": True,
            "classifier_resblock_updown": True,
            "classifier_pool": "attention",
        }
    )


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--use_kl True", {"variance": "fixed_large", "loss": "vlb_rescaled"}),
        ("--use_kl True --learn_sigma True", {"loss": "vlb_rescaled"}),
        ("--learn_sigma True --rescale_learned_sigmas True", {"loss": "hybrid_rescaled"}),
        ("--learn_sigma True --predict_xstart True", {"loss": "hybrid", "predict": "x0"}),
    ],
)
def test_flags_of_the_diffusion_are_settings(
    flags: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    diffusion = read(f"--image_size 64 {flags}", tmp_path).diffusion
    assert diffusion == DiffusionConfig(schedule="linear", **wanted)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--image_sise 64", "no flag of this kind of network .nearest: 'image_size'"),
        ("--image_size", "must be pairs"),
        ("--class_cond maybe", "must be True or False"),
        ("--num_channels many", "must be int"),
        ("--image_size 96", "or give --channel_mult"),
        ("--batch_size 4", "say with --ranks"),
        ("--attention_resolutions a,b", "must be numbers"),
        ("--channel_mult 1,x", "--channel_mult = '1,x': must be numbers"),
        ("--ema_rate a,b", "--ema_rate = 'a,b': must be numbers"),
        (
            "--diffusion_steps 4000 --rescale_timesteps True",
            "or --rescale_timesteps False given with it",
        ),
        ("--diffusion_steps 4000", "--diffusion_steps = 4000: must be 1000, or"),
        (
            "--attention_resolutions 32,16,8 --classifier_scale 1.0 --classifier_depth 4",
            "--attention_resolutions and --classifier_depth are of two networks: give",
        ),
        ("--num_channels 64 --classifier_use_fp16 True", "are of two networks"),
        ("--attention_resolutions 64,4", "[(]model.attention is --attention_resolutions[)]$"),
        ("--classifier_attention_resolutions 2", "model.attention is --classifier_attention_resol"),
        (
            "--num_channels 100",
            r"\(model.channels is --num_channels, model.channel_mult is --channel_mult\)$",
        ),
        (
            "--large_size 256 --small_size 100",
            r"\(model.small_size is --small_size, model.image_size is --large_size\)$",
        ),
        ("--large_size 96 --small_size 48", "^--large_size = 96: must be one of"),
        ("--ema_rate 2", r"^training.ema = .*\(training.ema is --ema_rate\)$"),
        ("--lr_anneal_steps -5", "^--lr_anneal_steps = -5: must be at least 0"),
        ("--classifier_depth 2 --iterations 0", "^--iterations = 0: must be at least 1"),
        ("--dropout '0.1", "^--from-flags .*: No closing quotation"),
    ],
)
def test_wrong_flags_are_named(flags: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        to_preset(flags, ranks=None)


def test_a_network_of_improved_diffusion_has_its_multipliers_and_plain_timesteps(
    tmp_path: Path,
) -> None:
    flags = "--image_size 32 --diffusion_steps 4000 --rescale_timesteps False --data_dir /a/b=1/c"
    config = read(flags, tmp_path)
    assert config.model.channel_mult == (1, 2, 2, 2)
    assert config.diffusion.steps == 4000
    steps = "--diffusion_steps 500 --rescale_timesteps False"
    assert read(f"--image_size 64 --classifier_depth 4 {steps}", tmp_path).diffusion.steps == 500


def test_the_command_prints_it(capsys: Any) -> None:
    for source in (["digits"], ["--from-flags", "--image_size 64 --batch_size 4"]):
        for ranks in ("0", "-2"):
            assert print_config([*source, "--ranks", ranks]) == 78
            assert f"--ranks = {ranks}: must be at least 1" in capsys.readouterr().err
    assert print_config(["--from-flags", "--image_size 64"]) == 0
    assert "image_size = 64" in capsys.readouterr().out
    assert print_config(["--from-flags", "--image_sise 64"]) == 78
    for change in (["--set", "training.lr = 1e-3"], ["--unset", "training.clip"]):
        assert print_config(["--from-flags", "--image_size 64", *change]) == 78
        assert f"{change[0]} = ['{change[1]}']: must be absent with" in capsys.readouterr().err
    assert print_config(["--from-flags", "--image_size 64", "--ranks", "7"]) == 78
    said = capsys.readouterr().err
    assert "does not divide among 7 ranks" in said and "(training.batch is --batch_size)" in said
    assert print_config(["--from-flags", "--image_size 64 --batch_size -4", "--ranks", "7"]) == 78
    assert "error: --batch_size = -4: must be at least 1" in capsys.readouterr().err
