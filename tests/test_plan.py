"""The planner: presets of every kind are planned, and what it prints follows from counted costs."""

import json
import re
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench import gpu
from tests.support.data_fixtures import pack_folder
from tests.support.runs import Place
from trainer import plan
from trainer.adm.unet import build
from trainer.config import ds_config
from trainer.config import experiment as configs
from trainer.config.experiment import Config
from trainer.planning import costs
from trainer.planning.prediction import (
    GIB,
    Machine,
    largest_micro_batch,
    memory,
    memory_remark,
    operations,
    resized,
    step,
)

ZERO = ds_config.load("ds_config.json")["zero_optimization"]
PRESETS = ("imagenet64", "imagenet512", "upsample64_256", "classifier128")
ALL = {path.stem: configs.load(path.stem) for path in sorted(configs.PRESETS.glob("*.toml"))}
GPU_PRESETS = [name for name, config in ALL.items() if config.training.precision == "fp16"]


def machine(**changes: Any) -> Machine:
    rates = {"tflops": 989.0, "mfu": 0.4, "bandwidth": 40.0, "overlap": 0.8}
    rates |= {"host_ms": 0.0, "latency": 0.0}
    return Machine(**{"gpus": 8, "gpu_memory": 80.0, "reserve": 4.0, **rates, **changes})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_every_kind_are_planned(preset: str, capsys: pytest.CaptureFixture) -> None:
    assert plan.main([preset, "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert f"{costs.count(configs.load(preset)).parameters:,} parameters" in said
    assert "largest micro-batch" in said
    assert "does not fit" not in said.split("At 32 images")[0].split("At the preset")[1]


def test_without_a_network_or_a_host_a_step_takes_what_its_operations_take() -> None:
    config = configs.load("imagenet64")
    ideal = machine(bandwidth=1e9)
    for gpus in (1, 8, 64):
        now = step(config, machine=ideal, gpus=gpus, zero=ZERO)
        seconds = 2048 * operations(config) / (gpus * 0.4 * 989e12)
        assert now.seconds == pytest.approx(seconds, rel=1e-3)


def test_at_a_fixed_batch_more_gpus_are_used_less_well_and_the_limit_is_named() -> None:
    config = configs.load("imagenet64", ("training.micro_batch = 64",))
    there = [step(config, machine=machine(), gpus=n, zero=ZERO) for n in (8, 64, 512)]
    shares = [each.efficiency for each in there]
    assert shares == sorted(shares, reverse=True)
    assert there[-1].limit == "network"
    slow = step(config, machine=machine(host_ms=500.0), gpus=512, zero=ZERO)
    assert slow.limit.startswith("host")


def test_what_is_exposed_of_the_network_follows_ds_config() -> None:
    compiled = configs.load("imagenet64")
    config = configs.load("imagenet64", ("training.compile = false",))
    net = costs.count(config)

    def communication(
        gpus: int, *, latency: float = 0.0, mfu: float = 0.4, of: Config = config, **own: Any
    ) -> float:
        there = machine(latency=latency, mfu=mfu, overlap=1.0)
        zero = {**ZERO, **own}
        return step(of, machine=there, gpus=gpus, zero=zero).communication

    whole = 2 * 63 / 64 * 2 * net.parameters / 40e9  # an all-reduce of 16-bit gradients
    gather = whole / 2
    for size in (50_000_000, 200_000_000, 10**9):
        last = costs.buckets(net, zero={"reduce_bucket_size": size})[-1] / net.parameters
        exposed = communication(64, mfu=0.01, reduce_bucket_size=size)
        assert exposed == pytest.approx(gather + whole * last)
    assert communication(64, overlap_comm=False) == pytest.approx(gather + whole)
    # Beside the compiled upper half of the encoder the lower half's buckets are reduced.
    (_, late), *_ = net.parts
    late += ZERO["reduce_bucket_size"] / net.parameters
    assert communication(64, of=compiled, mfu=0.01) < gather + whole * late
    assert communication(64) < communication(64, of=compiled) < gather + 0.8 * whole
    # To each rank on its own: fewer bytes, and a message for each of so many ranks.
    own = {"use_multi_rank_bucket_allreduce": False, "overlap_comm": False}
    assert communication(64, **own) == pytest.approx(gather + whole / 2)
    assert communication(512, latency=5.0, **own) > 10 * communication(512, latency=5.0)


@pytest.mark.parametrize("preset", GPU_PRESETS)
def test_little_is_left_to_reduce_when_the_last_compiled_part_is_done(preset: str) -> None:
    net = costs.count(configs.load(preset))
    assert [round(sum(shares), 9) for shares in zip(*net.parts, strict=True)] == [1, 1]
    (operations, parameters), *_ = net.parts
    assert parameters < 0.15 < operations


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_image_more_than_the_largest_micro_batch_does_not_fit(stage: int) -> None:
    config = resized(configs.load("imagenet256"), batch=2048, micro_batch=8)
    there, zero = machine(), {**ZERO, "stage": stage}
    most = largest_micro_batch(config, zero=zero, ranks=there.gpus, room=there.memory_room)
    held = [
        sum(memory(config, zero=zero, ranks=8, micro_batch=size).values())
        for size in (most, most + 1)
    ]
    assert held[0] <= 76 * 2**30 < held[1]


def fits(config: Config, size: int, *, ranks: int) -> bool:
    """Whether 80 GiB hold a micro-batch, with the planner's reserve, below ZeRO-3."""
    stages = ({**ZERO, "stage": stage} for stage in (1, 2))
    sized = resized(config, batch=config.training.batch, micro_batch=size)
    held = [
        sum(memory(sized, zero=zero, ranks=ranks, micro_batch=size).values()) for zero in stages
    ]
    return max(held) <= 76 * GIB


@pytest.mark.parametrize("preset", GPU_PRESETS)
def test_the_micro_batch_of_a_preset_is_the_largest_power_of_two_that_80_gb_hold(
    preset: str,
) -> None:
    config = configs.load(preset)
    batch, micro = config.training.batch, config.training.micro_batch
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if batch % n == 0]
    assert batch % micro == 0 and micro & (micro - 1) == 0
    assert all(fits(config, micro, ranks=n) for n in counts if micro <= batch // n)
    twice = [n for n in counts if 2 * micro <= batch // n]
    assert not twice or not all(fits(config, 2 * micro, ranks=n) for n in twice)
    size = config.model.image_size
    assert preset != f"imagenet{size}" or gpu.LARGEST.get(size, micro) == micro


def test_a_gpu_that_holds_less_is_told_what_to_set(capsys: pytest.CaptureFixture) -> None:
    config = configs.load("digits")
    need = {
        size: sum(memory(config, zero=ZERO, ranks=2, micro_batch=size).values())
        for size in (16, 32)
    }
    assert memory_remark(config, zero=ZERO, ranks=2, room=need[32]) is None
    said = memory_remark(config, zero=ZERO, ranks=2, room=need[32] - 1)
    assert said is not None and "set training.micro_batch = 16" in said
    said = memory_remark(config, zero=ZERO, ranks=2, room=need[16] / 2)
    assert said is not None and "set model.checkpoint = true" in said
    assert plan.main(["imagenet256", "--gpus", "8", "--gpu-memory", "40"]) == 0
    assert "and it has 36 for them: if it runs out of memory, set training.micro_batch = 16" in (
        capsys.readouterr().out
    )


def test_a_run_tells_the_planner_the_speed_of_each_rank(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = place.run("2x2")
    config = configs.load(place.preset)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["images_per_second"] for line in lines]
    there = plan.measured(machine(), config=config, run=run)
    assert there.mfu * 989e12 == pytest.approx(median(rates) / 2 * operations(config))
    with pytest.raises(ValueError, match=r"MFU = [\d.]+: must be at most 1: .* --tflops"):
        plan.measured(machine(tflops=1e-9), config=config, run=run)
    assert plan.main(["imagenet64", "--gpus", "8", "--from", str(run)]) == 78
    assert "trains another network" in capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.toml", bare)
    with pytest.raises(ValueError, match=r"bare: a speed in metrics\.jsonl = None: must be there"):
        plan.measured(machine(), config=config, run=bare)
    shutil.copy(run / "metrics.jsonl", bare)
    with pytest.raises(ValueError, match=r"bare: ranks in its checkpoints = None: must be there"):
        plan.measured(machine(), config=config, run=bare)


def test_the_disk_is_what_real_checkpoints_take(place: Place) -> None:
    config = configs.load(place.preset, ["intervals.keep = 3", "intervals.keep_every = 36"])
    newest = max((place.run("2x2") / "checkpoints").iterdir())
    size = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    parameters = sum(p.numel() for p in build(config.model).parameters())
    line = "".join(plan._disk_lines(config, 1000 * parameters))
    found = re.search(r"Disk: ([\d.]+) GB per checkpoint, .* up to (\d+) at once", line)
    assert found and float(found[1]) == pytest.approx(size / 1e6, rel=0.05)
    # The newest three, one that is being written, and one for each 36 images.
    assert int(found[2]) == 3 + 1 + config.training.images // 36
    widths = ["training.ema_widths = [0.05, 0.1]", "intervals.averages = 36"]
    config = configs.load(place.preset, [*widths, "intervals.keep_every = 1"])
    disk, averages = plan._disk_lines(config, 10**9)
    assert f", {config.training.images // config.intervals.checkpoint} by intervals.keep" in disk
    count = config.training.images // 36
    assert averages == f"and {count} snapshots of averages, 4.00 GB each: {4 * count} GB"


def test_bytes_of_images_are_those_of_the_datasets_by_their_shares(
    place: Place, tmp_path: Path
) -> None:
    other = pack_folder(tmp_path, images=6)
    kilobytes = []
    for sets in ([], [f'data.shards = "{other.root}"'], [f'data.mix = ["{other.root}"]']):
        mixed = ["data.mix_shares = [0.25]"] if "mix" in "".join(sets) else []
        config = configs.load(place.preset, [*sets, *mixed])
        now = step(config, machine=machine(), gpus=2, zero=ZERO)
        line = next(iter(plan._data_lines(config, now)))
        found = re.search(r"MB/s at ([\d.]+) kB per image", line)
        assert found, line
        kilobytes.append(float(found[1]))
    digit, image, both = kilobytes
    assert image > 1.5 * digit
    assert both == pytest.approx(0.75 * digit + 0.25 * image, abs=0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus = 0: must be a finite number above 0"),
        (["--gpus", "1", "--tflops", "inf"], "--tflops = inf: must be a finite number above 0"),
        (["--gpus", "7"], "does not divide among 7 ranks"),
        (["--gpus", "8", "--mfu", "1.2"], "--mfu = 1.2: must be above 0, at most 1"),
        (["--gpus", "8", "--host-ms", "inf"], "--host-ms = inf: must be a finite number from 0"),
        (
            ["--gpus", "8", "--reserve", "90"],
            "--reserve = 90.0: must be from 0 to below --gpu-memory = 80",
        ),
        (["--gpus", "8", "--gpu-memory", "1"], "from 0 to below --gpu-memory = 1"),
        (["--gpus", "8", "--from", "no-such-run"], "no-such-run"),
        (["all", "--gpus", "4096"], "error: imagenet128: training.batch = 256 does not divide"),
        (
            ["all", "--gpus", "8", "--set", "training.lr = 1"],
            "--set = ['training.lr = 1']: must be ",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert plan.main(words if "all" in words else ["imagenet64", *words]) == 78
    out, error = capsys.readouterr()
    assert said in error and not out
    assert len(error.splitlines()) == 1
