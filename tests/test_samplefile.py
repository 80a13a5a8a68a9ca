"""Sample files and directories of shards are read alike, by the places of their images."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from data import npz
from data.pack import pack
from data.packing.begun import Request
from data.packing.plan import PackConfig
from data.stream import DataConfig, open_stream
from tests.support.data_fixtures import write_folder
from trainer.sampling.samplefile import open_samples


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_span_of_a_sample_file_is_read(tmp_path: Path, save: object) -> None:
    images = np.arange(5 * 4 * 6 * 3, dtype=np.int64).reshape(5, 4, 6, 3).astype(np.uint8)
    save(tmp_path / "a.npz", arr_1=np.array([3, 1, 0, 1, 2], np.int32), arr_0=images)  # type: ignore[operator]
    samples = open_samples(tmp_path / "a.npz")
    assert samples.count == 5 and samples.size == (4, 6)
    assert np.array_equal(samples.images(2, 4), images[2:4])
    assert np.array_equal(samples.images(4, 9), images[4:])
    assert samples.labels is not None and samples.labels.tolist() == [3, 1, 0, 1, 2]


def test_shards_are_read_in_their_order_with_their_labels(digits: Path, tmp_path: Path) -> None:
    samples = open_samples(digits)
    assert samples.count == 1797 and samples.size == (8, 8) and samples.labels is not None
    assert np.bincount(samples.labels).min() > 100
    some = samples.images(1000, 1003)
    assert some.shape == (3, 8, 8, 3) and np.array_equal(some[1:], samples.images(1001, 1003))
    across = range(220, 230)  # the first shard holds 225
    config = DataConfig(shards=str(digits), image_size=8, streams=4, workers=0)
    with open_stream(config, seed=0) as stream:
        batch = stream.load(across, once=True)
    assert np.array_equal(samples.images(220, 230), batch.images.permute(0, 2, 3, 1))
    assert np.array_equal(samples.labels[across], batch.labels)
    assert samples.checksum() == samples.shards.fingerprint  # type: ignore[attr-defined]
    write_folder(tmp_path / "P", images=3)
    config = PackConfig(size=8, keep_original=True)
    pack(Request(str(tmp_path / "P"), config), out=tmp_path / "own")
    assert open_samples(tmp_path / "own", size=16).images(0, 2).shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match=r"pack them without --keep-original; .* with --size"):
        open_samples(tmp_path / "own")


def test_zeros_of_a_file_that_does_not_say_how_it_was_drawn_are_no_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(2, int))
    assert open_samples(tmp_path / "a.npz").labels is None


def test_what_is_no_sample_file_is_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3), np.float32))
    np.savez(tmp_path / "short.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.ones(1, int))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    labels = np.array([0, 2**63 + 3], np.uint64)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=labels)
    (tmp_path / "torn.npz").touch()
    for name in ("float", "large", "short", "other", "torn", "absent"):
        with pytest.raises(ValueError, match=f"{name}.npz"):
            open_samples(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        open_samples(tmp_path)


def test_images_that_are_not_those_that_were_written_have_no_checksum(tmp_path: Path) -> None:
    """As where a download left a hole: the images are mapped, which checks nothing."""
    path = tmp_path / "hole.npz"
    np.savez(path, arr_0=np.full((8, 16, 16, 3), 7, np.uint8))
    content = bytearray(path.read_bytes())
    content[2000:4000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"hole\.npz is damaged: Bad CRC-32 .*: copy or make it"):
        open_samples(path).checksum()


def test_a_header_of_more_images_than_there_are_is_refused(tmp_path: Path) -> None:
    path, images = tmp_path / "more.npz", np.ones((2, 4, 4, 3), np.uint8)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", npz.image_header((3, 4, 4, 3)) + images.tobytes())
        archive.writestr("other", bytes(1000))
    with pytest.raises(ValueError, match=r"\(3, 4, 4, 3\) and has 96 bytes instead of 144"):
        open_samples(path)
    np.savez(path, images=images)
    with pytest.raises(ValueError, match=r"more\.npz has no array arr_0: must be the images"):
        open_samples(path)
