"""Evaluation in training: what it measures, and nothing that it changes."""

import json
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.exits import FAILED
from tests.support import faults, ranks
from tests.support.runs import EVERY, STEP, Place, equal
from trainer import evaluate
from trainer.run import goodput
from trainer.run.runstate import RunState

IMAGES = 50  # no multiple of a part on any number of ranks
END = 3 * STEP
EVERY_SO_MANY = 3 * STEP // 2  # images: after the second and the third step
#: Stage, precision and micro-batch of each run.
KINDS = {"two": (2, "fp32", 4), "three": (3, "bf16", 6)}
COMMON = (*EVERY, f"training.images = {END}", "model.dropout = 0.2")
FIGURES = ("fid", "precision", "recall", "kid")


@pytest.fixture(scope="module")
def sets(digits: Path, network: Path) -> tuple[str, ...]:
    return (
        f'evaluation.reference = "{digits}"',
        f'evaluation.network = "{network}"',
        f"evaluation.images = {IMAGES}",
        'evaluation.steps = "ddim3"',
        f"intervals.evaluate = {EVERY_SO_MANY}",
    )


#: What one rank does not live through -> what happens to it, in which function, the ZeRO stage.
LACKS = {
    "grid": (faults.run_out_of_memory_in, "trainer.sampling.draw:draw", 3),
    "evaluation": (faults.be_killed_in, "trainer.evaluation.drawn:draw", 2),
    "validation": (faults.run_out_of_memory_in, "trainer.validation:Validation:_terms", 3),
}
#: What the other rank says of it.
ENDS = dict.fromkeys(LACKS, r"failed: \S+ \(rank 1; [^)]*\): OutOfMemoryError: .*")
ENDS["evaluation"] = r"lost: \S+ \(rank 1; [^)]*\): ended"
#: One rank has one turn more than the other.
GRID = ("intervals.samples_count = 9", 'intervals.samples_steps = "ddim5"')


def lacking(name: str, place: Place, *sets: str) -> ranks.Job:
    """Start a run in which rank 1 runs out of memory, or is killed, beside the first step."""
    happens, function, stage = LACKS[name]
    words = place.arguments(name, stage=stage, sets=(*COMMON, *sets))
    return with_a_fault(place, [words], partial(happens, function))


def with_a_fault(place: Place, runs: list, fault: Callable[[], None]) -> ranks.Job:
    """Start runs on two ranks, the second of which has a fault."""
    directory = place.root / f"faulty-{len(list(place.root.glob('faulty-*')))}"
    task = partial(faults.work_on_a_faulty_machine, directory, runs, fault, 1)
    return ranks.fork(directory, task, ranks=2)


@pytest.fixture(scope="module")
def lack(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, sets: tuple
) -> Iterator[dict[str, ranks.Job]]:
    """Jobs that mostly wait for the rank that fails, so they run beside the others."""
    place = Place(tmp_path_factory.mktemp("lack"), tiny)
    jobs = {
        "grid": lacking("grid", place, *GRID, f"intervals.samples = {STEP}"),
        "evaluation": lacking("evaluation", place, *sets, f"intervals.evaluate = {STEP}"),
    }
    yield jobs
    for job in jobs.values():
        job.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path, sets: tuple, lack: object) -> Place:
    """Runs with and without evaluation; and one that is stopped in its first grid, and resumed."""
    place = Place(tmp_path_factory.mktemp("evaluation"), tiny)
    words = []
    for name, (stage, precision, micro_batch) in KINDS.items():
        own = (*COMMON, f'training.precision = "{precision}"')
        own = (*own, f"training.micro_batch = {micro_batch}")
        words.append(place.arguments(name, stage=stage, sets=own))
        words.append(place.arguments(f"{name}-evaluated", stage=stage, sets=(*own, *sets)))
    for every in (1, 2):
        grids = (*GRID, f"intervals.samples = {every * STEP}", f"training.images = {2 * STEP}")
        words.append(place.arguments("halted", sets=(*EVERY, *grids)))
    job = with_a_fault(place, words, partial(faults.stop_in_a_grid, "halted", at=STEP))
    job.wait()
    assert job.statuses == [0, 0, 0, 0, 75, 0]
    return place


@pytest.mark.parametrize("name", KINDS)
def test_a_run_with_evaluation_is_the_one_without_bit_for_bit(runs: Place, name: str) -> None:
    assert runs.losses(f"{name}-evaluated") == runs.losses(name)
    for images in range(STEP, END + 1, STEP):
        evaluated = runs.checkpoint(f"{name}-evaluated", images)
        assert equal(evaluated, runs.checkpoint(name, images))


def test_figures_are_named_by_n_and_stand_with_their_spread_on_the_boards(runs: Place) -> None:
    events = EventAccumulator(str(runs.run("two-evaluated") / "tensorboard"))
    events.Reload()
    for figure in FIGURES:
        name = f"evaluation/{figure}_{IMAGES}"
        values = runs.values("two-evaluated", name)
        assert list(values) == [2 * STEP, END]
        last = events.Scalars(name)[-1]
        assert (last.step, last.value) == (END, pytest.approx(values[END]))
        file = runs.run("two-evaluated") / "evaluations" / f"{END:012d}.json"
        found = json.loads(file.read_text())
        assert found["figures"][f"{figure}_{IMAGES}"]["value"] == values[END]
        assert f"{figure}_{IMAGES}" in runs.log("two-evaluated")
    assert set(runs.values("two-evaluated", f"evaluation/not_finite_{IMAGES}").values()) == {0.0}
    # Three steps for each of 50 samples, against three passes for each of 18 images.
    share = f"about {IMAGES * 3 / (3 * EVERY_SO_MANY):.1%} of the training's compute"
    assert share in runs.log("two-evaluated")
    spent = goodput.account(goodput.read(runs.run("two-evaluated")))
    told = re.findall(r"evaluation of 50 samples: .*; ([0-9.]+) s", runs.log("two-evaluated"))
    assert len(told) == 2 and spent is not None
    assert spent.seconds["evaluating"] == pytest.approx(sum(map(float, told)), rel=0.05, abs=0.2)


def test_a_finished_run_is_evaluated_alike_on_any_number_of_ranks(runs: Place, sets: tuple) -> None:
    """It lacks the figures of its last image, as after a stop there."""
    for world in (1, 3):
        name = f"again-{world}"
        shutil.copytree(runs.run("two-evaluated"), runs.run(name))
        rows = (runs.run(name) / "metrics.jsonl").read_text().splitlines()
        left = [row for row in rows if not ("evaluation/" in row and f'"images": {END},' in row)]
        assert len(left) == len(rows) - 1
        (runs.run(name) / "metrics.jsonl").write_text("".join(f"{row}\n" for row in left))
        assert runs.train(runs.arguments(name, sets=(*COMMON, *sets)), world=world) == [0]
        for figure in FIGURES:
            key = f"evaluation/{figure}_{IMAGES}"
            first = runs.values("two-evaluated", key)
            assert runs.values(name, key) == pytest.approx(first, rel=1e-6)
        assert "finished" in runs.log(name).splitlines()[-3]


def test_the_figures_are_those_of_sampling_and_evaluating_the_checkpoint(
    runs: Place, digits: Path, network: Path
) -> None:
    checkpoint = runs.run("two-evaluated") / "checkpoints" / f"{END:012d}"
    drawn = runs.root / "drawn.npz"
    words = [checkpoint, "--out", drawn, "--images", IMAGES, "--steps", "ddim3", "--batch", 4]
    assert ranks.sample(runs.root, words) == [0]
    words = [drawn, "--reference", digits, "--network", network]
    assert evaluate.main(list(map(str, words))) == 0
    found, logged = (
        json.loads(file.read_text())["figures"]
        for file in (
            drawn.with_suffix(".evaluation.json"),
            runs.run("two-evaluated") / "evaluations" / f"{END:012d}.json",
        )
    )
    for figure in FIGURES:
        for of in ("value", "error"):
            name = f"{figure}_{IMAGES}"
            assert found[name][of] == pytest.approx(logged[name][of], rel=1e-4, abs=1e-6)


def test_a_stop_interrupts_it_and_the_next_start_begins_with_it(runs: Place, sets: tuple) -> None:
    long = ("evaluation.images = 20000", 'evaluation.steps = "ddim50"')
    place = Place(runs.root / "stopped", runs.preset)
    place.root.mkdir()
    words = place.arguments("run", sets=(*COMMON, *sets, *long))
    job = ranks.start(place.root / "job", ranks=2, runs=[words])
    log = place.run("run") / "log.txt"
    end = time.monotonic() + ranks.LIMIT
    while not (log.exists() and "drawing 20,000 samples" in log.read_text()):
        assert time.monotonic() < end, job.text
        time.sleep(0.1)
    job.signal(1, signal.SIGTERM)
    job.wait()
    assert job.statuses == [75]
    assert "the evaluation was interrupted" in place.log("run")
    assert (place.run("run") / "checkpoints" / f"{2 * STEP:012d}").is_dir()
    assert place.losses("run") == runs.losses("two")[:2]
    assert place.train(place.arguments("run", sets=(*COMMON, *sets)), world=2) == [0]
    for figure in FIGURES:
        key = f"evaluation/{figure}_{IMAGES}"
        assert place.values("run", key) == runs.values("two-evaluated", key)
    assert equal(place.checkpoint("run", END), runs.checkpoint("two", END))


@pytest.mark.parametrize("name", ["grid", "evaluation"])
def test_a_rank_that_fails_beside_the_steps_is_reported_and_ends_the_job(
    lack: dict[str, ranks.Job], name: str
) -> None:
    """It waits for no other rank, whatever those wait for."""
    check_named(lack[name], name)
    state = RunState.read(lack[name].directory.parent / name)
    # A machine is blamed where the rank said nothing.
    lost = socket.gethostname() if name == "evaluation" else None
    assert state is not None and (state.state, state.lost) == ("failed", lost)
    assert re.fullmatch(rf"\S+: {ENDS[name]}", state.why or "")
    log = (lack[name].directory.parent / name / "log.txt").read_text()
    assert len(re.findall(ENDS[name], log)) == 1


@pytest.mark.slow
def test_a_rank_that_fails_in_a_validation_blames_no_other(
    tmp_path: Path, tiny: Path, digits: Path
) -> None:
    sets = (f'data.validation = "{digits}"', f"intervals.validate = {STEP}")
    check_named(lacking("validation", Place(tmp_path, tiny), *sets), "validation")


def check_named(job: ranks.Job, name: str) -> None:
    job.wait()
    happens, function, _ = LACKS[name]
    is_killed = happens is faults.be_killed_in
    ended = -signal.SIGKILL if is_killed else FAILED
    assert [process.exitcode for process in job.ranks] == [FAILED, ended]
    assert re.search(ENDS[name], job.texts[0]), job.text
    assert "lost: " not in job.texts[1] and "Traceback" not in job.texts[0]
    if not is_killed:
        assert "rank 1 is out of memory, see " in job.texts[1]
        assert f"OutOfMemoryError: in {function}" in job.texts[1]


def test_a_stop_interrupts_a_grid_and_another_is_drawn_later(runs: Place) -> None:
    log = runs.log("halted")
    assert f"the grid of image {STEP} was interrupted and is left out" in log
    assert f"resumes from checkpoint {STEP:012d}" in log
    (drawn,) = (runs.run("halted") / "samples").iterdir()
    assert drawn.name == f"{2 * STEP:012d}.png"


def test_a_run_with_guided_samples_is_validated(runs: Place, sets: tuple, digits: Path) -> None:
    guided = ("training.label_dropout = 0.2", "evaluation.cfg = 2.0", f"intervals.validate = {END}")
    own = (*COMMON, *sets, *guided, f'data.validation = "{digits}"', "data.validation_images = 16")
    assert runs.train(runs.arguments("guided", sets=own), world=2) == [0]
    assert list(runs.values("guided", "validation/loss")) == [END]


def test_what_cannot_be_evaluated_is_refused_before_the_run_is_there(
    runs: Place, sets: tuple, real_large: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.npz"
    np.savez(few, arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, mu=np.zeros(48), sigma=np.eye(48))
    cases = {
        'evaluation.network = "none.pth"': "evaluation: network none.pth: no such file or run",
        'evaluation.reference = "s3://U:P@b/d"': "'s3://***@b/d': must be a path on this",
        'evaluation.reference = "none"': "evaluation: reference none: no such file or directory",
        f'evaluation.reference = "{real_large}"': "samples are 8 x 8, the images of",
        f'evaluation.reference = "{few}"': "has 3 images: must be at least 16",
        f'evaluation.reference = "{foreign}"': "give the Inception weights as the network",
        "evaluation.images = 15": "evaluation.images = 15: must be at least 16",
        'evaluation.steps = "ddim7000"': "evaluation.steps: ",
        "evaluation.cfg = 2.0": "evaluation.cfg = 2.0: must be absent without training.label",
    }
    arguments = [runs.arguments("refused", sets=(*COMMON, *sets, wrong)) for wrong in cases]
    for status, message in zip(runs.train(*arguments, world=2), cases.values(), strict=True):
        assert message in str(status) and len(str(status).splitlines()) == 1
    assert not runs.run("refused").exists()


@pytest.fixture
def real_large(tmp_path: Path) -> Path:
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((20, 16, 16, 3), np.uint8))
    return tmp_path / "large.npz"


def test_an_upsampler_enlarges_the_images_of_the_validation_in_the_features_of_a_classifier(
    tiny: Path, digits: Path, tmp_path: Path, sets: tuple
) -> None:
    preset, classifier = tmp_path / "up.toml", tmp_path / "classifier.toml"
    preset.write_text(tiny.read_text().replace("image_size = 8", "image_size = 8\nsmall_size = 4"))
    classifier.write_text(tiny.read_text().replace('"denoise"', '"classify"'))
    place = Place(tmp_path, preset)
    own = (*COMMON, *sets, f"intervals.validate = {END}", "data.validation_images = 16")
    own = (*own, f'evaluation.network = "{place.run("classifier")}"')
    validated = (*own, f'data.validation = "{digits}"')
    words = [
        Place(tmp_path, classifier).arguments("classifier", sets=COMMON),
        place.arguments("without", sets=(*COMMON, *sets)),
        place.arguments("up", sets=validated),
    ]
    trained, refused, status = place.train(*words, world=2)
    assert "data.validation = None: must be set if an upsampler" in str(refused)
    assert trained == status == 0
    assert list(place.values("up", f"evaluation/fid_{IMAGES}")) == [2 * STEP, END]
    scores = place.values("up", f"evaluation/is_{IMAGES}")
    assert list(scores) == [2 * STEP, END] and all(1 <= score <= 10 for score in scores.values())
