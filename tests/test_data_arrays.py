"""Sample files and CIFAR's own files as sources, shards as a sample file, and `--dry-run`."""

import os
import pickle
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.dataset import open_shards
from data.exits import REFUSED
from data.pack import main
from data.shards import main as shards_main
from tests.support.data_fixtures import write_folder


def pack_at(source: Path | str, out: Path, size: int, *options: str) -> int:
    return main([str(source), str(out), "--size", str(size), "--workers", "1", *options])


def pictures(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("labelled", [True, False])
def test_sample_files_become_shards_and_back(tmp_path: Path, save: object, labelled: bool) -> None:
    assert callable(save)
    images, labels = pictures(40, 16), np.arange(40) % 7
    save(tmp_path / "samples.npz", images, *([labels] if labelled else []))
    assert pack_at(tmp_path / "samples.npz", tmp_path / "shards", 16) == 0
    shards = open_shards(tmp_path / "shards")
    assert shards.classes == (tuple("0123456") if labelled else ("",))
    out = tmp_path / "back.npz"
    assert shards_main(["export", shards.root, str(out)]) == 0
    with np.load(out, allow_pickle=False) as back:
        assert ("arr_1" in back) == labelled
        found = [image.tobytes() for image in back["arr_0"]]
        wanted = [image.tobytes() for image in images]
        assert back["arr_0"].dtype == np.uint8 and sorted(found) == sorted(wanted)
        if labelled:
            order = [wanted.index(image) for image in found]
            assert back["arr_1"].tolist() == labels[order].tolist()
    assert shards_main(["export", shards.root, str(out)]) == REFUSED  # it exists


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "arr_0 is float64 (2, 8, 8, 3): must be uint8"),
        ({"arr_0": np.zeros((2, 8, 8), np.uint8)}, "arr_0 is uint8 (2, 8, 8): must be uint8"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "is no readable sample file"),
        (
            {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)},
            "arr_1 is int64 (3,): must be integers (2,)",
        ),
    ],
)
def test_other_arrays_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arrays: dict, message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert pack_at(tmp_path / "a.npz", tmp_path / "out", 8) == REFUSED
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_shards_of_own_sizes_are_not_exported(tmp_path: Path) -> None:
    write_folder(tmp_path / "P", images=10)
    assert pack_at(tmp_path / "P", tmp_path / "shards", 16, "--keep-original") == 0
    arguments = ["export", str(tmp_path / "shards"), str(tmp_path / "a.npz")]
    assert shards_main(arguments) == REFUSED
    assert not list(tmp_path.glob("a.npz*"))


def cifar(root: Path, *, binary: bool) -> np.ndarray:
    """CIFAR-10's layout, with 8 images in each of its files."""
    root.mkdir()
    images, labels = pictures(48, 32), np.arange(48) % 3
    rows = images.transpose(0, 3, 1, 2).reshape(48, -1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        part = slice(8 * i, 8 * i + 8)
        if binary:
            both = np.concatenate([labels[part, None].astype(np.uint8), rows[part]], axis=1)
            (root / f"{name}.bin").write_bytes(both.tobytes())
        else:
            batch = {b"data": rows[part], b"labels": labels[part].tolist()}
            (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    classes = ["airplane", "automobile", "bird"]
    if binary:
        (root / "batches.meta.txt").write_text("\n".join(classes) + "\n\n")
    else:
        meta = {b"label_names": [name.encode() for name in classes]}
        (root / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return images


@pytest.mark.parametrize("binary", [True, False])
def test_the_files_of_cifar_are_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], binary: bool
) -> None:
    images = cifar(tmp_path / "cifar", binary=binary)
    assert pack_at(tmp_path / "cifar", tmp_path / "no", 32) == REFUSED
    assert "holds the splits train and test: give one" in capsys.readouterr().err
    assert pack_at(tmp_path / "cifar" / "data_batch_*", tmp_path / "train", 32) == 0
    train = open_shards(tmp_path / "train")
    assert train.classes == ("airplane", "automobile", "bird")
    assert shards_main(["export", train.root, str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as found:
        got = {(i.tobytes(), int(n)) for i, n in zip(found["arr_0"], found["arr_1"], strict=True)}
    assert got == {(images[i].tobytes(), i % 3) for i in range(40)}
    test = tmp_path / "cifar" / ("test_batch.bin" if binary else "test_batch")
    assert pack_at(test, tmp_path / "test", 32, "--classes-of", train.root) == 0
    assert open_shards(tmp_path / "test").count == 8


def test_a_pickle_that_could_run_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar(tmp_path / "cifar", binary=False)
    file = tmp_path / "cifar" / "data_batch_3"
    file.write_bytes(pickle.dumps({b"data": print, b"labels": [1]}))
    assert pack_at(tmp_path / "cifar" / "data_batch_*", tmp_path / "out", 32) == REFUSED
    assert "data_batch_3 is no file of CIFAR: it contains builtins.print" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("batches.meta", b"torn", "batches.meta is no file of CIFAR: "),
        ("batches.meta", pickle.dumps([b"a"]), "batches.meta is no file of CIFAR: it holds a list"),
        ("batches.meta", pickle.dumps({b"label_names": 3}), "batches.meta has no list of class"),
        (
            "batches.meta",
            pickle.dumps({b"label_names": [b"a"]}),
            "has the label 2: must be below 1",
        ),
        ("data_batch_2", pickle.dumps([1]), "data_batch_2 is no file of CIFAR: it holds a list"),
        ("data_batch_2", pickle.dumps({b"data": 1, b"labels": 1}), "it has no `data` and `labels`"),
        ("data_batch_2", b"", "data_batch_2 is no file of CIFAR: Ran out of input"),
    ],
)
def test_damaged_files_of_cifar_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    cifar(tmp_path / "cifar", binary=False)
    (tmp_path / "cifar" / name).write_bytes(content)
    assert pack_at(tmp_path / "cifar" / "data_batch_*", tmp_path / "out", 32) == REFUSED
    assert message in capsys.readouterr().err


def test_a_directory_of_cifar_100_asks_for_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar(tmp_path / "cifar", binary=False)
    for was, name in (("data_batch_1", "train"), ("test_batch", "test"), ("batches.meta", "meta")):
        (tmp_path / "cifar" / was).rename(tmp_path / "cifar" / name)
    for left in (tmp_path / "cifar").glob("data_batch_*"):
        left.unlink()
    assert pack_at(tmp_path / "cifar", tmp_path / "out", 32) == REFUSED
    train = tmp_path / "cifar" / "train"
    assert f"give one: {train} or {tmp_path}/cifar/test" in capsys.readouterr().err
    assert pack_at(train, tmp_path / "out", 32) == 0


def test_listing_many_files_shows_how_far_it_has_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system takes minutes for the names of a million files, and for their times."""
    source = write_folder(tmp_path / "source", images=9)
    monkeypatch.setattr("data.progress.time", SimpleNamespace(monotonic=count(step=2).__next__))
    assert pack_at(source, tmp_path / "out", 16, "--dry-run") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:12] == [f"listed {n} names in {source}" for n in range(1, 13)]
    assert lines[12] == "looked at 9 of 9 files, 4 files/s, 0 s left"


def test_a_dry_run_says_what_would_be_packed_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "P", images=30)
    (source / "n0001" / "notes.txt").write_text("x")
    (source / "n0002").rename(os.fsdecode(os.fsencode(source) + b"/caf\xe9"))
    assert pack_at(source, tmp_path / "out", 16, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "30 images in 3 classes" in text and "1 skipped (.txt 1)" in text
    assert "  n0001: 10\n" in text and "  caf\\udce9: 10\n" in text
    assert "in 30 files" in text and "8 shards, about 0." in text
    assert [path.name for path in tmp_path.iterdir()] == ["P"]
    (source / "n0009").mkdir()
    assert pack_at(source, tmp_path / "out", 16, "--dry-run") == REFUSED
