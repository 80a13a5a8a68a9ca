"""The stream serves one sequence, whatever the ranks, workers, micro-batches and restarts."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import Shards, open_shards
from data.manifest import MANIFEST
from data.order import Order
from data.stream import Batch, DataConfig, Stream, to_device
from data.transforms import flips
from tests.support.data_fixtures import image_file, pack_folder, write_shards

SIZE = 16
Seen = dict[int, tuple[bytes, int]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return pack_folder(tmp_path_factory.mktemp("stream"), images=60, size=SIZE)


def config_for(shards: Shards, **changes: object) -> DataConfig:
    config = DataConfig(
        shards=shards.root, image_size=SIZE, streams=8, block=5, workers=0, prefetch_mb=1
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def remember(seen: Seen, batch: Batch) -> None:
    for image, label, number in zip(batch.images, batch.labels, batch.indices, strict=True):
        assert int(number) not in seen
        seen[int(number)] = (image.numpy().tobytes(), int(label))


def serve(
    shards: Shards,
    config: DataConfig,
    *,
    ranks: int,
    micro: int,
    batch: int,
    images_seen: int,
    steps: int,
) -> Seen:
    """What all ranks together serve in some steps."""
    seen: Seen = {}
    for rank in range(ranks):
        with Stream(shards, config=config, seed=3) as stream:
            batches = stream.batches(
                images_seen=images_seen,
                batch_size=batch,
                micro_batch_size=micro,
                rank=rank,
                ranks=ranks,
            )
            for one in islice(batches, steps * batch // (ranks * micro)):
                assert one.images.shape[:2] == (micro, 3) and one.labels.shape == (micro,)
                assert one.images.dtype == torch.uint8 and one.labels.dtype == torch.int64
                remember(seen, one)
    return seen


@pytest.fixture(scope="module")
def whole(shards: Shards) -> Seen:
    """The uninterrupted run of one process through several epochs."""
    seen = serve(shards, config_for(shards), ranks=1, micro=24, batch=24, images_seen=0, steps=10)
    assert sorted(seen) == list(range(240))
    return seen


@settings(max_examples=25)
@given(data=st.data(), ranks=st.sampled_from([1, 2, 3, 4, 6]), start=st.integers(0, 5))
def test_the_sequence_does_not_depend_on_ranks_or_restarts(
    shards: Shards, whole: Seen, data: st.DataObject, ranks: int, start: int
) -> None:
    batch = data.draw(st.sampled_from([12, 24, 48]))
    micro = data.draw(st.sampled_from([m for m in range(1, 13) if batch % (ranks * m) == 0]))
    images_seen = start * 24
    seen = serve(
        shards,
        config_for(shards),
        ranks=ranks,
        micro=micro,
        batch=batch,
        images_seen=images_seen,
        steps=2,
    )
    assert sorted(seen) == list(range(images_seen, images_seen + 2 * batch))
    assert all(whole[number] == sample for number, sample in seen.items())


PNGS = [image_file(i, width=4, height=4, kind="PNG") for i in range(64)]


@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda s: sum(s) > 3),
    data=st.data(),
)
def test_any_shards_any_ranks_any_workers_any_restart(
    sizes: list[int], data: st.DataObject
) -> None:
    """Three epochs, cut anywhere: what is served is the order's, each image at most once each."""
    streams = data.draw(st.integers(1, min(sum(sizes), 8)))
    batch = 12
    ends = np.cumsum(sizes)
    with TemporaryDirectory() as directory:
        stored = [PNGS[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        shards = write_shards(Path(directory), stored=stored, image_size=4)
        config = replace(config_for(shards), image_size=4, streams=streams, block=3)
        epoch = sum(sizes) // streams * streams
        steps, images_seen, seen = -(-3 * epoch // batch), 0, {}
        while steps:
            ranks, workers = data.draw(st.sampled_from([(1, 0), (2, 1), (3, 0), (4, 0), (6, 0)]))
            some = data.draw(st.integers(1, steps))
            micro = data.draw(st.sampled_from([m for m in (1, 2, 3) if batch // ranks % m == 0]))
            one = replace(config, workers=workers)
            seen |= serve(
                shards,
                one,
                ranks=ranks,
                micro=micro,
                batch=batch,
                images_seen=images_seen,
                steps=some,
            )
            images_seen, steps = images_seen + some * batch, steps - some
    order = Order(sizes, seed=3, streams=streams, block=3)
    place = order.locate(np.arange(images_seen))
    labels = np.array([seen[number][1] for number in range(images_seen)])
    assert (labels == (ends - sizes)[place.shard] + place.row).all()
    for e in range(3):
        assert len(set(labels[e * epoch : (e + 1) * epoch])) == epoch


@pytest.mark.parametrize("workers", [1, 3])
def test_the_sequence_does_not_depend_on_workers(shards: Shards, whole: Seen, workers: int) -> None:
    config = config_for(shards, workers=workers)
    seen = serve(shards, config, ranks=2, micro=4, batch=24, images_seen=48, steps=8)
    assert len(seen) == 192 and all(whole[number] == sample for number, sample in seen.items())


def test_what_is_kept_stays_as_it_was(shards: Shards, whole: Seen) -> None:
    """Batches lie in the workers' memory; keeping many of them is allowed and changes nothing."""
    config = config_for(shards, workers=1)  # which has 8 slots
    with Stream(shards, config=config, seed=3) as stream:
        batches = stream.batches(images_seen=0, batch_size=24, micro_batch_size=24, rank=0, ranks=1)
        kept = list(islice(batches, 10))
        for _ in islice(batches, 40):
            pass
    seen: Seen = {}
    for batch in kept:
        remember(seen, batch)
    assert seen == whole


def test_each_epoch_serves_the_stored_images(shards: Shards, whole: Seen) -> None:
    stored: Seen = {}
    with Stream(shards, config=config_for(shards), seed=0) as stream:
        remember(stored, stream.load(range(60), once=True))
    plain = dict(stored.values())
    turned = {np.frombuffer(p, np.uint8).reshape(3, SIZE, SIZE)[..., ::-1].tobytes() for p in plain}
    flips = sum(pixels in turned for pixels, _ in whole.values())
    assert all(pixels in plain or pixels in turned for pixels, _ in whole.values())
    assert 80 < flips < 160  # of 240


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 3), (0, 7), (2, 2)])
def test_parts_neither_repeat_nor_drop(shards: Shards, workers: int, ranks: int) -> None:
    seen: Seen = {}
    for rank in range(ranks):
        with Stream(shards, config=config_for(shards, workers=workers), seed=0) as stream:
            for batch in stream.parts(images=60, size=7, rank=rank, ranks=ranks):
                remember(seen, batch)
    assert sorted(seen) == list(range(60))


def test_random_crops_do_not_depend_on_ranks(shards: Shards) -> None:
    config = config_for(shards, crop="random")
    one, two = (
        serve(shards, config, ranks=r, micro=4, batch=24, images_seen=24, steps=2) for r in (1, 2)
    )
    assert one == two


def test_images_that_are_cropped_as_they_are_read_are_mirrored_too(shards: Shards) -> None:
    plain, mirrored = (
        serve(shards, config, ranks=1, micro=24, batch=24, images_seen=0, steps=2)
        for config in (config_for(shards, crop="random", flip=f) for f in (False, True))
    )
    for number, flip in enumerate(flips(seed=3, indices=np.arange(48))):
        pixels = np.frombuffer(plain[number][0], np.uint8).reshape(3, SIZE, SIZE)
        assert mirrored[number][0] == (pixels[..., ::-1] if flip else pixels).tobytes()


def test_flips_are_fair_and_of_the_seed() -> None:
    one, two = (flips(seed=seed, indices=np.arange(2000)) for seed in (1, 2))
    assert all(0.45 < drawn.mean() < 0.55 for drawn in (one, two, one ^ two))


def test_a_single_pass_takes_the_centre_whatever_training_takes(shards: Shards) -> None:
    passes = []
    for crop in ("center", "random"):
        with Stream(shards, config=config_for(shards, crop=crop), seed=0) as stream:
            passes.append(stream.load(range(60), once=True).images)
    assert torch.equal(*passes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_are_so_many_images_evenly_spread(shards: Shards, ranks: int) -> None:
    with Stream(shards, config=config_for(shards), seed=0) as stream:
        parts = [
            batch.indices.tolist()
            for rank in range(ranks)
            for batch in stream.parts(images=21, size=8, rank=rank, ranks=ranks)
        ]
    assert sorted(parts) == [list(range(0, 16, 2)), list(range(16, 32, 2)), list(range(32, 42, 2))]


def test_a_batch_that_ranks_cannot_share_is_an_error(shards: Shards) -> None:
    with (
        Stream(shards, config=config_for(shards), seed=0) as stream,
        pytest.raises(ValueError, match=r"training.batch = 20: must be a multiple of .* = 3 x 2"),
    ):
        stream.batches(images_seen=0, batch_size=20, micro_batch_size=2, rank=0, ranks=3)


def test_settings_that_do_not_fit_are_errors(shards: Shards) -> None:
    with pytest.raises(ValueError, match=r"model.image_size = 32, but .* was packed at 16"):
        Stream(shards, config=config_for(shards, image_size=32), seed=0)
    with pytest.raises(ValueError, match=r"data.crop = 'left'"):
        config_for(shards, crop="left")
    with (
        Stream(shards, config=config_for(shards, workers=1), seed=0) as stream,
        pytest.raises(ValueError, match=r"data.prefetch_mb = 1 holds no micro-batch"),
    ):
        next(stream.batches(images_seen=0, batch_size=2048, micro_batch_size=2048, rank=0, ranks=1))


def test_resuming_with_other_data_is_an_error(shards: Shards, tmp_path: Path) -> None:
    with Stream(shards, config=config_for(shards), seed=3) as stream:
        saved = stream.identity
    other = pack_folder(tmp_path, images=50, size=SIZE)
    with Stream(other, config=config_for(other), seed=4) as stream:
        with pytest.raises(ValueError, match=r"seed was 3, is 4; fingerprint was"):
            stream.check_identity(saved)
        stream.check_identity(stream.identity)
    changed = config_for(shards, block=2 * int(saved["block"]))
    with (
        Stream(shards, config=changed, seed=3) as stream,
        pytest.raises(ValueError, match=r"other data \(block was"),
    ):
        stream.check_identity(saved)


def test_shards_that_were_packed_anew_since_are_told_from_those_that_are_gone(
    shards: Shards, tmp_path: Path
) -> None:
    """Open files stay readable where the directory was removed."""
    there = shutil.copytree(shards.root, tmp_path / "there")
    other = Path(pack_folder(tmp_path / "other", images=50, size=SIZE).root)
    with Stream(open_shards(there), config=config_for(shards), seed=3) as stream:
        stream.check_unchanged()
        shutil.copy(other / MANIFEST, there / MANIFEST)
        with pytest.raises(ValueError, match=r"there has other shards now than when this start"):
            stream.check_unchanged()
        shutil.rmtree(there)
        stream.check_unchanged()


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_moving_to_the_device_changes_nothing(shards: Shards, whole: Seen, device: str) -> None:
    seen: Seen = {}
    pin = device == "cuda"
    with Stream(shards, config=config_for(shards, workers=1), seed=3) as stream:
        batches = stream.batches(
            images_seen=0, batch_size=24, micro_batch_size=24, rank=0, ranks=1, pin=pin
        )
        checked = (b for b in batches if b.images.is_pinned() == b.indices.is_pinned() == pin)
        for batch in islice(to_device(checked, device=torch.device(device)), 10):
            assert batch.images.device.type == device
            fields = {
                n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in vars(batch).items()
            }
            remember(seen, Batch(**fields))
    assert seen == whole
