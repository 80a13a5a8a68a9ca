"""fp16 training: loss scaling, skipped steps, and exact resume with them."""

import os
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import faults, ranks
from tests.support.runs import EVERY, STEP, Place, build_start, equal
from trainer import weights
from trainer.run.runstate import committed


@pytest.fixture(scope="module")
def half(place: Place) -> tuple[str, ...]:
    """Runs of eight steps in fp16, in two stages; a window of the loss scale is two steps."""
    names, sets = ("half2", "half3"), (*EVERY, f"training.images = {8 * STEP}")
    runs = [
        place.arguments(name, stage=stage, fp16=True, sets=sets)
        for name, stage in zip(names, (2, 3), strict=True)
    ]
    assert place.train(*runs, world=2, fp16=True) == [0, 0]
    for run, name in zip(runs, names, strict=True):
        place.fork(name, f"{name}-again", images=6 * STEP)
        run[run.index("--run") + 1] = str(place.run(f"{name}-again"))
    assert place.train(*runs, world=2, fp16=True) == [0, 0]
    return names


def test_an_overflow_skips_the_step_and_halves_the_scale(
    place: Place, half: tuple[str, ...]
) -> None:
    for name in half:
        skipped = [bool(v) for v in place.losses(name, "skipped")]
        scales = place.losses(name, "loss_scale")
        assert skipped[0], "the first step at a scale of 2^20 must overflow"
        good = 0
        for n in range(1, 8):
            good = 0 if skipped[n - 1] else good + 1
            factor = 0.5 if skipped[n - 1] else 2 if good in (3, 5, 7) else 1
            assert scales[n] == factor * scales[n - 1]
        assert any(a < b for a, b in pairwise(scales)), "the scale must grow again"


def test_a_skipped_step_changes_nothing_and_writes_no_checkpoint(
    place: Place, half: tuple[str, ...]
) -> None:
    start = build_start(place)
    for name in half:
        taken = [not skipped for skipped in place.losses(name, "skipped")]
        written = sorted(int(p.name) for p in (place.run(name) / "checkpoints").iterdir())
        assert written == [n * STEP for n in range(1, 9) if taken[n - 1]]
        first = place.checkpoint(name, written[0])
        for key, value in start.items():
            stepped = first[f"model:{key}"]
            assert torch.allclose(first[f"ema-0.9:{key}"], 0.9 * value + 0.1 * stepped, atol=1e-7)
        assert "every step since the last checkpoint was skipped" in place.log(name)


def test_adam_sees_the_gradient_that_is_reported_also_where_the_scale_grows(
    place: Place, half: tuple[str, ...]
) -> None:
    for name in half:
        norms = place.values(name, "grad_norm")  # of the steps that were not skipped
        assert len(norms) > 3
        for images in norms:
            after = place.checkpoint(name, images)
            earlier = [int(p.name) for p in (place.run(name) / "checkpoints").iterdir()]
            last = max((n for n in earlier if n < images), default=None)
            before = place.checkpoint(name, last) if last else {}
            squares = [
                (after[key] - 0.9 * before.get(key, 0.0)).double().square().sum()
                for key in after
                if key.startswith("adam-m")
            ]
            seen = 10 * float(sum(squares)) ** 0.5
            assert seen == pytest.approx(min(1.0, norms[images]), rel=1e-3)


def test_a_run_in_fp16_resumes_bit_for_bit(place: Place, half: tuple[str, ...]) -> None:
    for name in half:
        assert equal(place.checkpoint(name, 8 * STEP), place.checkpoint(f"{name}-again", 8 * STEP))
        for key in ("loss", "loss_scale", "skipped"):
            assert place.losses(name, key) == place.losses(f"{name}-again", key)


def test_a_run_whose_last_step_is_skipped_is_finished(place: Place, half: tuple[str, ...]) -> None:
    """It has not diverged: only its loss scale was too large."""
    skipped = place.losses(half[0], "skipped")
    last = max(n for n, is_skipped in enumerate(skipped, start=1) if is_skipped and n > 1)
    before = (last - 1) * STEP  # its weights are saved already
    place.fork(half[0], "ends", images=before)
    sets = (*EVERY, f"training.images = {last * STEP}")
    assert place.train(place.arguments("ends", fp16=True, sets=sets), world=2, fp16=True) == [0]
    weights = [place.weights("ends", images) for images in (before, last * STEP)]
    assert equal(*weights) and place.losses("ends", "skipped")[-1] == 1


#: The runs below, and after how many steps they lose a checkpoint.
LOST = (("overflowed", 2), ("validated", 1), ("validated", 3))


def lose_a_checkpoint(directory: Path, runs: list) -> int:
    """Train; on rank 1 the files of `LOST`, once each, read back differently than written.

    From 24 on each step of an fp16 run overflows. A validation is stopped as it begins.
    """
    from trainer.engine.zero import Engine
    from trainer.validation import Validation

    write, step, measure = weights.save, Engine.step, Validation.measure
    left = {f"{run}/checkpoints/.{n * STEP:012d}.partial" for run, n in LOST}

    def fail_once(file: Path, tensors: object, **named: object) -> None:
        write(file, tensors, **named)
        name = str(file.parent.relative_to(file.parents[3]))
        if os.environ["RANK"] == "1" and name in left:
            left.remove(name)
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)

    def overflow(self: Engine, *, images_seen: int, **named: Any) -> object:
        report = step(self, images_seen=images_seen, **named)
        if self._scaling.is_dynamic:
            self._scaling._scaler.cur_scale = 2.0 ** (100 if images_seen >= 2 * STEP else 4)
        return report

    def stop(self: Validation, engine: Engine, *, stopped: object, **named: Any) -> object:
        return measure(self, engine, stopped=lambda: True, **named)

    weights.save, Engine.step = fail_once, overflow  # type: ignore[method-assign,assignment]
    Validation.measure = stop  # type: ignore[method-assign,assignment]
    faults.stop_at({"overflowed": 3 * STEP})
    return ranks.work(directory, runs, True)


def test_a_checkpoint_that_was_not_written_is_written_where_the_run_stops(
    place: Place, digits: Path
) -> None:
    """Though no step has changed the weights since, or none was taken at all.

    A failure ahead of one that was written does not count against `unsaved_minutes`.
    """
    often = (*EVERY, "intervals.unsaved_minutes = 0")
    validated = (*often, f'data.validation = "{digits}"', f"intervals.validate = {3 * STEP}")
    runs = [
        place.arguments("overflowed", fp16=True, sets=(f"intervals.checkpoint = {2 * STEP}",)),
        place.arguments("validated", sets=validated),
    ]
    task = partial(lose_a_checkpoint, place.root / "lost-job", runs)
    job = ranks.fork(place.root / "lost-job", task, ranks=2)
    job.wait()
    assert job.statuses == [75, 75], job.text
    for name, times, clocks in (("overflowed", 1, [4]), ("validated", 2, [3, 2])):
        said = re.findall("no checkpoint could be .* reads back differently", place.log(name))
        assert len(said) == times
        saved = committed(place.run(name) / "checkpoints")
        assert [int(path.name) for path in saved] == [n * STEP for n in clocks]
    assert place.losses("overflowed", "skipped")[2:] == [1, 1]
