"""The order of samples is a pure function with the properties that training relies on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.mixture import MixedOrder
from data.order import Order, keyed, permutation, share, splitmix64, uniform
from data.transforms import flips, random_crop

datasets = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)


def draw_order(data: st.DataObject, sizes: list[int]) -> Order:
    return Order(
        sizes,
        seed=data.draw(st.integers(0, 2**63)),
        streams=data.draw(st.integers(1, min(sum(sizes), 24))),
        block=data.draw(st.integers(1, 50)),
    )


def served(order: Order, numbers: range) -> np.ndarray:
    """Images counted in packing order."""
    place = order.locate(np.array(numbers))
    assert (place.row >= 0).all() and (place.row < order.sizes[place.shard]).all()
    return np.concatenate([[0], np.cumsum(order.sizes)])[place.shard] + place.row


@given(sizes=datasets, data=st.data())
def test_an_epoch_serves_each_image_at_most_once_and_few_are_left_out(
    sizes: list[int], data: st.DataObject
) -> None:
    order = draw_order(data, sizes)
    length = order.streams * order.length
    turns = sum(sizes) // max(order.left_out, 1)
    left_out = []
    for epoch in (0, 1, 2, turns, data.draw(st.integers(3, 100))):
        images = served(order, range(epoch * length, (epoch + 1) * length))
        assert len(set(images.tolist())) == length
        left_out.append(set(range(sum(sizes))) - set(images.tolist()))
        assert len(left_out[-1]) == order.left_out < order.streams
        if left_out[-1]:  # neighbours, in packing order
            assert max(left_out[-1]) - min(left_out[-1]) < order.left_out
    assert left_out[3] == left_out[0]  # it starts again
    if left_out[0] and turns > 2:
        assert not left_out[0] & left_out[1] and not left_out[1] & left_out[2]


@given(sizes=datasets, data=st.data())
def test_an_image_is_the_same_however_it_is_asked_for(
    sizes: list[int], data: st.DataObject
) -> None:
    order = draw_order(data, sizes)
    numbers = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=20)))
    together = order.locate(numbers)
    for i, number in enumerate(numbers):
        fresh = Order(sizes, seed=order.seed, streams=order.streams, block=order.block)
        assert [a[i] for a in together] == [a[0] for a in fresh.locate([number])]


@given(sizes=datasets, data=st.data())
def test_stand_ins_are_the_rest_of_the_block(sizes: list[int], data: st.DataObject) -> None:
    order = draw_order(data, sizes)
    number = data.draw(st.integers(0, 10**5))
    others = order.alternatives(number)
    assert number not in others and len(others) < order.block
    assert len(set(others.tolist())) == len(others)
    if len(others):
        assert (others % order.streams == number % order.streams).all()
        assert (order.locate(others).epoch == order.locate([number]).epoch).all()
        assert number in order.alternatives(int(others[0]))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_epochs_are_mixed_anew(seed: int) -> None:
    order = Order([60] * 10, seed=seed, streams=8, block=16)
    first, second = served(order, range(600)), served(order, range(600, 1200))
    assert (first == second).mean() < 0.1


def test_the_order_is_pinned() -> None:
    """Runs on disk depend on these numbers: they must never change."""
    assert splitmix64([0, 1]).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    assert keyed(1, 2, 3).tolist() == [15020427595393229491]
    assert permutation(10, 7, 1).tolist() == GOLDEN_PERMUTATION
    order = Order([5, 0, 9, 17, 1], seed=11, streams=4, block=3)
    place = order.locate(np.arange(28, 40))
    assert list(zip(*(a.tolist() for a in place), strict=True)) == GOLDEN_PLACES


def test_what_training_draws_for_an_image_is_pinned() -> None:
    """So are these: a run that is resumed would mirror, crop and mix in another way."""
    sizes = {4: [5, 0, 9, 17, 1], 2: [7, 4]}
    orders = [Order(each, seed=11, streams=n, block=3) for n, each in sizes.items()]
    place = MixedOrder(orders, counts=(3, 2), seed=11).locate(np.arange(100, 106))
    assert list(zip(*(a.tolist() for a in place), strict=True)) == GOLDEN_MIXTURE
    drawn = flips(seed=7, indices=np.array([0, 1, 2, 3, 2**40, 2**40 + 1]))
    assert drawn.tolist() == [True, True, True, False, True, False]
    ramp = np.zeros((60, 80, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(80), np.arange(60)[:, None]
    for index, corners in GOLDEN_CROPS.items():
        crop = random_crop(Image.fromarray(ramp), size=48, seed=7, index=index)
        assert crop[[0, -1], [0, -1], :2].tolist() == corners


def test_a_rank_takes_the_images_of_its_own_remainder_wherever_a_step_begins() -> None:
    for rank in range(3):
        mine = [image for image in range(10, 16) if image % 3 == rank]
        assert list(share(10, batch_size=6, rank=rank, ranks=3)) == mine


def test_draws_are_uniform() -> None:
    draws = uniform(3, 5, np.arange(20000))
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.01


def test_too_few_images_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"too few images: the shards hold 7, data.streams = 8"):
        Order([3, 4], seed=0, streams=8, block=4)


GOLDEN_PERMUTATION = [7, 2, 6, 8, 0, 4, 9, 1, 3, 5]
GOLDEN_PLACES = [
    (0, 3, 6),
    (0, 3, 14),
    (0, 2, 6),
    (0, 4, 0),
    (1, 0, 1),
    (1, 2, 4),
    (1, 3, 1),
    (1, 3, 9),
    (1, 0, 2),
    (1, 2, 2),
    (1, 3, 2),
    (1, 3, 10),
]
GOLDEN_MIXTURE = [(4, 5, 2), (1, 2, 0), (1, 2, 8), (1, 3, 6), (4, 5, 6), (1, 3, 16)]
#: Image index -> x and y of the first and the last pixel of the crop.
GOLDEN_CROPS = {0: [[9, 2], [60, 54]], 1: [[17, 0], [72, 55]], 2**40: [[26, 2], [76, 53]]}
