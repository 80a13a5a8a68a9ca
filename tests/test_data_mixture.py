"""Several datasets in one stream: exact shares, each in its own order, elastic and resumable."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.dataset import Shards, open_shards
from data.mixture import MixedOrder, Mixture, open_dataset, order_of
from data.order import Order
from data.pack import pack
from data.packing.begun import Request
from data.packing.plan import PackConfig
from data.stream import Stream, open_stream
from tests.support.data_fixtures import image_file, pack_folder, write_folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, Shards]:
    """Two datasets of the same classes, without an image in common."""
    root = tmp_path_factory.mktemp("sets")
    first = pack_folder(root / "a", images=60)
    source = write_folder(root / "b" / "source", images=21)
    for i, path in enumerate(sorted(source.rglob("*.JPEG"))):
        path.write_bytes(image_file(1000 + i, width=20, height=20))
    pack(Request(str(source), PackConfig(size=16, per_shard=5)), out=root / "b" / "shards")
    return first, open_shards(root / "b" / "shards")


def config(sets: tuple[Shards, Shards], **others: object) -> DataConfig:
    given = {"image_size": 16, "workers": 0, "streams": 8, "block": 16, "flip": False}
    names = {"shards": sets[0].root, "mix": (sets[1].root,), "mix_shares": (0.3,)}
    return DataConfig(**{**given, **names, **others})  # type: ignore[arg-type]


def take(stream: Stream, first: int, last: int, *, ranks: int, batch: int) -> dict[int, tuple]:
    """What all ranks get of the images from `first` to `last`: pixels and label by index."""
    got = {}
    for rank in range(ranks):
        batches = stream.batches(
            images_seen=first,
            batch_size=batch,
            micro_batch_size=batch // ranks,
            rank=rank,
            ranks=ranks,
        )
        for _ in range((last - first) // batch):
            each = next(batches)
            pixels = [image.numpy().tobytes() for image in each.images]
            got |= dict(
                zip(
                    each.indices.tolist(),
                    zip(pixels, each.labels.tolist(), strict=True),
                    strict=True,
                )
            )
    return got


def test_the_sequence_is_the_same_on_any_ranks_and_after_any_restart(
    sets: tuple[Shards, Shards],
) -> None:
    with open_stream(config(sets), seed=5) as stream:
        whole = take(stream, 0, 1200, ranks=1, batch=60)
        assert sorted(whole) == list(range(1200))
        again = take(stream, 0, 480, ranks=4, batch=48) | take(stream, 480, 1200, ranks=3, batch=36)
        assert again == whole
    with open_stream(config(sets, workers=2), seed=5) as stream:
        assert take(stream, 960, 1200, ranks=2, batch=60).items() <= whole.items()
    with open_stream(config(sets), seed=6) as stream:
        assert take(stream, 0, 120, ranks=1, batch=60) != {i: whole[i] for i in range(120)}


@pytest.mark.parametrize("streams", [8, 30])
def test_shares_are_exact_and_each_dataset_keeps_its_own_order(
    sets: tuple[Shards, Shards], streams: int
) -> None:
    """Also one of fewer images than streams, which has a stream for each."""
    mixed = open_dataset(sets[0].root, mix=(sets[1].root,), shares=(0.3,))
    assert isinstance(mixed, Mixture)
    order = order_of(mixed, seed=5, streams=streams, block=16)
    assert isinstance(order, MixedOrder)
    period = sum(mixed.counts)
    assert mixed.counts == (721, 309)  # of 0.3; runs on disk depend on these numbers
    place = order.locate(np.arange(3 * period))
    is_second = place.shard >= len(sets[0].shards)
    for n in range(3):
        assert is_second[n * period : (n + 1) * period].sum() == mixed.counts[1]
    # Not in runs: any 100 successive images have about their share.
    assert all(10 < is_second[at : at + 100].sum() < 55 for at in range(0, 3 * period - 100, 50))
    counts = [min(streams, part.count) for part in sets]
    alone = [Order(p.sizes, seed=5, streams=n, block=16) for p, n in zip(sets, counts, strict=True)]
    for j, here in enumerate((~is_second, is_second)):
        wanted = alone[j].locate(np.arange(int(here.sum())))
        first = j * len(sets[0].shards)
        assert (place.shard[here] - first == wanted.shard).all()
        assert (place.row[here] == wanted.row).all() and (place.epoch[here] == wanted.epoch).all()


def test_the_shards_of_three_datasets_are_counted_through() -> None:
    sizes = ([9, 9], [5, 5, 5, 5], [30])
    alone = [Order(each, seed=5, streams=2, block=4) for each in sizes]
    shards = MixedOrder(alone, counts=(4, 3, 3), seed=5).locate(np.arange(1000)).shard
    assert np.bincount(shards >= 2).tolist() == [400, 600]
    assert np.bincount(shards >= 6).tolist() == [700, 300]
    assert set(shards.tolist()) == set(range(7))


def test_alternatives_are_of_the_same_block_and_dataset(sets: tuple[Shards, Shards]) -> None:
    mixed = open_dataset(sets[0].root, mix=(sets[1].root,), shares=(0.3,))
    order = order_of(mixed, seed=5, streams=8, block=4)
    places = order.locate(np.arange(3000))
    for index in (0, 17, 1500):
        others = order.alternatives(index)
        assert len({index, *others.tolist()}) == len(others) + 1 > 1
        found = order.locate(others)
        second = places.shard[index] >= len(sets[0].shards)
        assert ((found.shard >= len(sets[0].shards)) == second).all()
        # The block is closed: an alternative's alternatives are the same images.
        back = {int(others[0]), *order.alternatives(int(others[0])).tolist()}
        assert back == {index, *others.tolist()}


def test_a_damaged_image_is_replaced_by_one_of_its_dataset(
    sets: tuple[Shards, Shards], tmp_path: Path
) -> None:
    copy = pack_folder(tmp_path, images=60)
    tar = Path(copy.root) / copy.shards[0].tar
    raw = bytearray(tar.read_bytes())
    at = int(copy.index(0)["offset"][0])
    raw[at + 20 : at + 60] = bytes(40)
    tar.write_bytes(raw)
    lines: list[str] = []
    with open_stream(config((copy, sets[1])), seed=5) as stream:
        stream.log = lines.append
        assert len(take(stream, 0, 240, ranks=1, batch=60)) == 240 and stream.bad >= 1
    assert all(f"{copy.root}/{copy.shards[0].tar}" in line for line in lines)


def test_one_pass_has_each_image_of_both_once(sets: tuple[Shards, Shards]) -> None:
    with open_stream(config(sets), seed=5) as stream:
        seen = Counter(
            image.numpy().tobytes()
            for batch in stream.parts(images=81, size=30, rank=0, ranks=1)
            for image in batch.images
        )
    assert len(seen) == 81 and set(seen.values()) == {1}


def test_originals_may_be_mixed_with_what_was_cropped_when_it_was_packed(
    sets: tuple[Shards, Shards], tmp_path: Path
) -> None:
    source, passes = write_folder(tmp_path / "source", images=9), []
    for packing in (PackConfig(size=16), PackConfig(size=99, keep_original=True)):
        out = tmp_path / str(packing.size)
        pack(Request(str(source), replace(packing, format="png")), out=out)
        with open_stream(config((sets[0], open_shards(out))), seed=5) as stream:
            passes.append(stream.load(range(69), once=True).images)
    assert torch.equal(*passes)


def test_another_mixture_is_another_order(sets: tuple[Shards, Shards]) -> None:
    with open_stream(config(sets), seed=5) as stream:
        saved = stream.identity
    for changed in (config(sets, mix_shares=(0.25,)), config(sets, mix=(), mix_shares=())):
        with (
            open_stream(changed, seed=5) as stream,
            pytest.raises(ValueError, match="the run began with other data"),
        ):
            stream.check_identity(saved)


def test_a_single_dataset_is_in_the_order_that_it_always_was(sets: tuple[Shards, Shards]) -> None:
    with open_stream(config(sets, mix=(), mix_shares=()), seed=5) as stream:
        assert stream.identity["fingerprint"] == sets[0].fingerprint
    order = order_of(sets[0], seed=5, streams=8, block=16)
    assert isinstance(order, Order)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mix_shares": ()}, r"data\.mix_shares = \[\]: must be one share for each of the 1"),
        ({"mix_shares": (1.0,)}, r"data\.mix_shares = \[1\.0\]: must be above 0, and below 1"),
        ({"mix_shares": (0.0,)}, r"data\.mix_shares = \[0\.0\]: must be above 0"),
        (
            {"mix": ("x",) * 3, "mix_shares": (0.7, 0.2, 0.1)},
            r"0\.1\]: must be above 0, and below 1",
        ),
        ({"mix_shares": (0.123456,)}, r"must be decimals of at most 4 digits"),
    ],
)
def test_wrong_shares_are_refused(
    sets: tuple[Shards, Shards], changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_stream(config(sets, **changed), seed=0)


def test_the_same_dataset_twice_is_refused(sets: tuple[Shards, Shards]) -> None:
    with pytest.raises(ValueError, match="the same dataset is there twice"):
        open_dataset(sets[0].root, mix=(sets[0].root,), shares=(0.5,))


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_without_a_meaning_in_common_are_none(
    sets: tuple[Shards, Shards], tmp_path: Path, classes: int
) -> None:
    """Other classes, or as many of other names."""
    source = write_folder(tmp_path / "source", images=9, classes=classes)
    (source / "n0001").rename(source / "n0009")
    pack(Request(str(source), PackConfig(size=16)), out=tmp_path / "shards")
    mixed = open_dataset(sets[0].root, mix=(str(tmp_path / "shards"),), shares=(0.5,))
    assert not mixed.labelled
    assert open_dataset(sets[0].root, mix=(sets[1].root,), shares=(0.5,)).labelled
