"""Validation: what it measures, the same on any number of ranks, and nothing that it changes."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data import pack
from data.dataset import open_shards
from data.packing.begun import Request
from data.packing.plan import PackConfig
from data.packing.splits import Split
from tests.support import golden, ranks
from tests.support.data_fixtures import write_folder
from tests.support.runs import EVERY, STEP, Place, equal
from trainer import evaluate
from trainer.adm import keyed
from trainer.adm.diffusion import Diffusion, bits_per_dimension
from trainer.adm.objective import Denoise, to_range
from trainer.adm.timesteps import UniformTimesteps
from trainer.adm.unet import build
from trainer.config import experiment as configs
from trainer.engine.copies import network_of
from trainer.ranks.process_group import connected
from trainer.ranks.world import join
from trainer.validation import ValidationSet, means

IMAGES = 50  # no multiple of a part on any number of ranks
END = 3 * STEP
EVERY_SO_MANY = 3 * STEP // 2  # images: after the second and the third step
#: Stage and precision of each run.
KINDS = {"one": (1, "fp32"), "three": (3, "fp16")}


def sets(digits: Path) -> tuple[str, ...]:
    return (
        f'data.validation = "{digits}"',
        f"data.validation_images = {IMAGES}",
        f"intervals.validate = {EVERY_SO_MANY}",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path, digits: Path) -> Place:
    """Runs with and without validation; a classifier; and one whose best checkpoint comes early."""
    place = Place(tmp_path_factory.mktemp("validation"), tiny)
    common = (*EVERY, f"training.images = {END}", "training.micro_batch = 6", "model.dropout = 0.2")
    words = []
    for name, (stage, precision) in KINDS.items():
        own = (*common, f'training.precision = "{precision}"')
        words.append(place.arguments(name, stage=stage, sets=own))
        words.append(place.arguments(f"{name}-validated", stage=stage, sets=(*own, *sets(digits))))
    best = ("intervals.validate = 12", "intervals.keep_best = true", "intervals.keep = 1")
    wild = ("training.lr = 0.05", "training.warmup_images = 0", "training.ema = [0.0]")
    wild = (*common, *sets(digits), *best, *wild)
    words.append(place.arguments("wild", sets=wild))
    classify = tiny.with_name("tiny-classifier.toml")
    classify.write_text(tiny.read_text().replace('"denoise"', '"classify"'))
    classifier = Place(place.root, classify)
    words.append(classifier.arguments("classifier", sets=(*common, *sets(digits))))
    assert place.train(*words, world=2, fp16=True) == [0] * len(words)
    shutil.copytree(place.run("wild"), place.run("longer"))
    # As where the last validation was cut short.
    (place.run("longer") / "checkpoints" / f"{END:012d}" / "validation.json").unlink()
    rows = place.run("longer") / "metrics.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    assert '"validation/loss"' in lines[-1]
    rows.write_text("".join(lines[:-1]))
    longer = (*wild, f"training.images = {END + STEP}")
    assert place.train(place.arguments("longer", sets=longer), world=2) == [0]
    return place


@pytest.mark.parametrize("name", KINDS)
def test_a_run_with_validation_is_the_one_without_bit_for_bit(runs: Place, name: str) -> None:
    assert runs.losses(f"{name}-validated") == runs.losses(name)
    for images in range(STEP, END + 1, STEP):  # written before, with and after a validation
        validated = runs.checkpoint(f"{name}-validated", images)
        assert equal(validated, runs.checkpoint(name, images))
    assert list(runs.values(f"{name}-validated", "validation/loss")) == [2 * STEP, END]
    log = runs.log(f"{name}-validated")
    assert "validation on 50 images: loss" in log and "validation: 50 images of" in log
    share = f"about {2 * IMAGES / (3 * EVERY_SO_MANY):.1%} of"
    assert f"which is the training set itself every {EVERY_SO_MANY}, {share}" in log


def test_the_values_are_the_objective_of_the_averages_and_of_the_weights(
    runs: Place, digits: Path
) -> None:
    config = configs.load(runs.preset, sets(digits))
    images = ValidationSet.open(open_shards(digits), config, images=IMAGES)
    (batch,) = images.stream.parts(images=IMAGES, size=IMAGES, rank=0, ranks=1)
    spread = open_shards(digits).count // IMAGES
    assert batch.indices.tolist() == list(range(0, IMAGES * spread, spread))
    timesteps = UniformTimesteps(1000, seed=0)
    objective = Denoise(config.diffusion, timesteps=timesteps, seed=0, class_conditional=True)
    for group, kind in (("validation", "ema-0.5"), ("validation/raw", "model")):
        file = runs.run("one-validated") / "checkpoints" / f"{END:012d}" / f"{kind}.safetensors"
        net = network_of(config, load_file(file)).eval()
        with torch.no_grad():
            terms = objective(net, batch.images, batch.labels, batch.indices)
        quarter = terms["t"] * 4 // 1000
        for name in ("loss", "mse", "vb"):
            found = partial(runs.values, "one-validated")
            value = found(f"{group}/{name}")[END]
            assert value == pytest.approx(float(terms[name].mean()), rel=1e-5)
            for q in range(4):
                expected = float(terms[name][quarter == q].mean())
                assert found(f"{group}/{name}/q{q}")[END] == pytest.approx(expected, rel=1e-5)


def test_a_classifier_shows_its_accuracies_by_quarter_and_tensorboard_has_all(runs: Place) -> None:
    events = EventAccumulator(str(runs.run("classifier") / "tensorboard"))
    events.Reload()
    for group in ("validation", "validation/raw"):
        for name in ("loss", "acc1", "acc5"):
            for tag in (name, *(f"{name}/q{q}" for q in range(4))):
                value = runs.values("classifier", f"{group}/{tag}")[END]
                last = events.Scalars(f"{group}/{tag}")[-1]
                assert (last.step, last.value) == (END, pytest.approx(value))
                assert 0 <= value <= 1 or name == "loss"
    assert "accuracy@1" in runs.log("classifier")


@pytest.mark.parametrize(("name", "end"), [("wild", END), ("longer", END + STEP)])
def test_the_best_checkpoint_stays_also_when_the_run_is_resumed(
    runs: Place, name: str, end: int
) -> None:
    losses = runs.values(name, "validation/loss")
    best = min(losses, key=lambda images: losses[images])
    assert best < END, "this learning rate is too large to get better to the end"
    kept = {int(path.name): path for path in (runs.run(name) / "checkpoints").iterdir()}
    assert set(kept) == {best, end}
    noted = json.loads((kept[best] / "validation.json").read_text())
    assert noted["loss"] == losses[best] and noted["count"] == IMAGES


def test_a_validation_that_was_cut_short_is_made_at_the_next_start(runs: Place) -> None:
    cut, whole = (runs.values(name, "validation/loss") for name in ("longer", "wild"))
    assert {images: cut[images] for images in whole} == whole
    assert runs.log("longer").count("validation on 50 images") == 2 + len(whole)


def test_what_cannot_be_validated_is_refused_before_the_run_is_there(
    runs: Place, digits: Path, tmp_path: Path
) -> None:
    for name in ("0", "1", "cat"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name / "a.png")
    others = tmp_path / "others"
    assert pack.main([str(tmp_path / "pictures"), str(others), "--size", "8"]) == 0
    cases = {
        f'data.validation = "{others}"': "class 2 is 'cat', in data.shards '2'",
        f'data.validation = "{tmp_path}"': f"no dataset at {tmp_path}",
        'data.validation = "$NOWHERE/at-all"': "data.validation = $NOWHERE/at-all: ",
        "data.validation_images = 2000": "data.validation_images = 2000: must be at most 1797",
        "intervals.keep_best = true": "a multiple of intervals.checkpoint",
    }
    words = [
        runs.arguments("refused", sets=(*sets(digits), "intervals.checkpoint = 36", wrong))
        for wrong in cases
    ]
    for status, message in zip(runs.train(*words, world=1), cases.values(), strict=True):
        assert message in str(status) and len(str(status).splitlines()) == 1
    assert not runs.run("refused").exists()


def measure(preset: Path, digits: Path, out: Path) -> int:
    """One rank's part of a validation of a network with formula weights."""
    config = configs.load(preset)
    images = ValidationSet.open(open_shards(digits), config, images=IMAGES)
    net = build(config.model).eval()
    golden.set_formula_weights(net)
    objective = Denoise(
        config.diffusion,
        timesteps=UniformTimesteps(1000, seed=0),
        seed=0,
        class_conditional=True,
    )
    world = join()
    with connected(world, patience=ranks.LIMIT) as device, torch.no_grad():
        seen = []

        def stopped_on_one(rank: int) -> bool:
            return world.rank == rank and len(seen) >= 2

        for stop in (-1, world.size - 1):
            seen.clear()
            table = images.table(
                lambda batch: objective(net, batch.images, batch.labels, batch.indices),
                batch_size=4,
                world=world,
                device=device,
                stopped=partial(stopped_on_one, stop),
                on_images=seen.append,
            )
            if stop < 0:
                torch.save(table, out / f"{world.size}-{world.rank}.pt")
                assert table is not None and means(table, timesteps=1000)
            else:
                assert table is None and len(seen) < 5
    return 0


def test_every_number_of_ranks_measures_the_same_bits(
    tmp_path: Path, tiny: Path, digits: Path
) -> None:
    tables = []
    for world in (1, 2, 3):
        task = partial(measure, tiny, digits, tmp_path)
        job = ranks.fork(tmp_path / f"job-{world}", task, ranks=world)
        job.wait()
        tables += [tmp_path / f"{world}-{rank}.pt" for rank in range(world)]
    first, *others = (torch.load(file) for file in tables)
    assert len(first["loss"]) == IMAGES
    assert all(equal(first, other) for other in others)


def test_a_damaged_image_ends_the_run_with_one_line(runs: Place, digits: Path) -> None:
    shards = open_shards(shutil.copytree(digits, runs.root / "damaged"))
    path = Path(shards.root) / shards.shards[0].tar
    content = bytearray(path.read_bytes())
    content[int(shards.index(0)[0]["offset"]) + 30] ^= 1
    path.write_bytes(content)
    grids = ("model.small_size = 4", "intervals.samples = 8", f"data.shards = '{shards.root}'")
    words = [runs.arguments("broken", sets=each) for each in (sets(path.parent), grids)]
    for status in map(str, runs.train(*words, world=2)):
        assert "all of these images must be intact" in status and "\n" not in status


def held_out_values(runs: Place, digits: Path, words: list[str], *, world: int) -> dict:
    """What `trainer.evaluate` writes on so many ranks."""
    where = runs.root / f"held-out-{world}-{words[0]}"
    command, run, *more = words
    argv = [command, str(runs.run(run)), "--data", str(digits), "--images", "21", *more]
    argv += ["--batch", "4", "--out", str(where.with_suffix(".json"))]
    job = ranks.fork(where, partial(evaluate.main, argv), ranks=world)
    job.wait()
    assert where.with_suffix(".json").exists(), job.text
    return json.loads(where.with_suffix(".json").read_text())


def test_a_classifier_is_measured_alike_on_any_number_of_ranks(runs: Place, digits: Path) -> None:
    one, three = (
        held_out_values(runs, digits, ["classifier", "classifier"], world=world) for world in (1, 3)
    )
    assert one == three and one["images"] == 21
    assert {"acc1", "acc5/q0", "loss/q3"} <= one.keys()


def test_bits_per_dimension_are_alike_on_any_number_of_ranks(runs: Place, digits: Path) -> None:
    words = ["nll", "one", "--steps", "8"]
    one, two = (held_out_values(runs, digits, words, world=world) for world in (1, 2))
    by_step = {name: (one.pop(name), two.pop(name)) for name in ("vb", "mse")}
    kept = held_out_values(runs, digits, [*words[:3], "4"], world=1)
    assert one == two and len(kept["timesteps"]) == len(one["timesteps"]) == 8
    config = configs.load(runs.preset)
    images = ValidationSet.open(open_shards(digits), config, images=21)
    (batch,) = images.stream.parts(images=21, size=21, rank=0, ranks=1)
    checkpoint = runs.run("one") / "checkpoints" / f"{END:012d}"
    net = network_of(config, load_file(checkpoint / "ema-0.5.safetensors")).eval()
    drawn = partial(keyed.normal, batch.indices, seed=0, shape=(3, 8, 8))
    expected = bits_per_dimension(
        Diffusion(config.diffusion, respacing="8"),
        lambda x, t: net(x, t, batch.labels),
        to_range(batch.images),
        noise=lambda i: drawn(stream=keyed.SAMPLE_STEP + i),
    )
    for name, (ours, again) in by_step.items():
        assert ours == pytest.approx(again, rel=1e-12)
        assert ours == pytest.approx(expected[name].mean(0).tolist(), rel=1e-4)
    wanted = [expected["total"].mean(), expected["prior"].mean(), expected["total"].std() / 21**0.5]
    found = [one[name] for name in ("bits_per_dimension", "prior", "standard_error")]
    assert found == pytest.approx([float(value) for value in wanted], rel=1e-5)


def test_a_network_of_the_other_kind_is_refused(runs: Place, digits: Path) -> None:
    argv = ["nll", str(runs.run("classifier")), "--data", str(digits)]
    job = ranks.fork(runs.root / "other-kind", partial(evaluate.main, argv), ranks=1)
    assert "is a classifier: use `classifier` instead of `nll`" in job.wait()


def test_it_is_told_where_the_run_may_train_on_what_was_held_out(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=45)
    for config in (PackConfig(size=8, split=split) for split in (None, *get_args(Split))):
        pack.pack(Request(str(source), config), out=tmp_path / str(config.split))
    held_out = f'data.validation = "{tmp_path}/val"'
    sets = (held_out, "model.num_classes = 3", "intervals.validate = 256")
    config = configs.load("digits", sets)
    for part, told in (("None", True), ("train", False)):
        found = ValidationSet.of(config, training=open_shards(tmp_path / part))
        assert found is not None and ("(--split val), which" in found.shared) is told
