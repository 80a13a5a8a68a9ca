"""A part of a sample file is whole, or its fault is found."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data import files, progress
from trainer.sampling import npz_output
from trainer.sampling.npz_output import NpzOutput, part_fault
from trainer.sampling.output import Output
from trainer.sampling.samplefile import open_samples
from trainer.sampling.shard_output import ShardOutput


def test_a_part_that_is_cut_or_has_another_bit_is_found(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    labels = np.array([3, 1])
    request = {"images": 2, "batch": 2}
    output = NpzOutput(tmp_path / "a.npz", size=4, request=request)
    output.work.mkdir()
    file = output.work / "000000.npz"
    output.write(0, images.transpose(0, 2, 3, 1), labels)
    assert not file.with_name(f"{file.name}.partial").exists()
    whole = file.read_bytes()

    def fault() -> str | None:
        return part_fault(file, shape=(2, 4, 4, 3), labels=labels)

    assert fault() is None
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert fault() is not None, size
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        if fault() is None:  # a bit that says nothing of the content, such as the time of writing
            with np.load(file) as part:
                assert np.array_equal(part["images"], images.transpose(0, 2, 3, 1)), place


@pytest.mark.parametrize(("begun", "other"), [("npz", "shards"), ("shards", "npz")])
def test_a_file_and_a_directory_of_one_name_leave_each_other_s_parts(
    tmp_path: Path, begun: str, other: str
) -> None:
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])

    given = {"images": 4, "batch": 2, "noise": 1, "classes": [0, 1], "labels": "balanced"}
    given |= {"pixels": "round", "cfg": None, "guide_at": "x_t"}

    def output(kind: str, **changed: int) -> Output:
        request = {**given, **changed}
        if kind == "npz":
            return NpzOutput(tmp_path / "a.npz", size=4, request=request)
        return ShardOutput(tmp_path / "a", size=4, request=request, classes="xy")

    done = output(other)
    done.open()
    for part in range(2):
        done.write(part, images, labels)
    done.publish(done.assemble(np.tile(labels, 2)))
    assert done.is_drawn() and not done.work.exists()
    for seed in (dict[str, int](), {"seed": 1}):
        half = output(begun, **seed)
        half.open()
        half.write(0, images, labels)
        assert done.is_drawn() and half.listed() == [0]
        with pytest.raises(ValueError, match="holds parts of a"):
            output(other, **seed).is_begun()
        assert half.is_begun()
        shutil.rmtree(half.work)
    # What a job leaves that is killed as it removes its parts goes with the next start.
    done.work.mkdir()
    (done.work / "000001.json.partial").touch()
    assert done.is_drawn() and not done.work.exists()


def test_parts_are_moved_a_few_at_a_time_and_what_that_needs_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), np.uint8)
    part_bytes, batch = images[:4].nbytes, 4
    monkeypatch.setattr(npz_output, "_MOVED", 2 * part_bytes)
    output = NpzOutput(tmp_path / "a.npz", size=128, request={"images": 64, "batch": batch})
    output.open()
    assert output.needed() == images.nbytes + 2 * part_bytes
    for part in range(output.parts):
        output.write(part, images[part * batch : (part + 1) * batch], np.zeros(batch, int))
    largest, write = 0, files.write

    def weigh(path: Path, content: str) -> None:
        nonlocal largest
        largest = max(largest, sum(file.stat().st_blocks * 512 for file in output.work.iterdir()))
        write(path, content)

    monkeypatch.setattr(files, "write", weigh)
    whole = output.assemble(None)
    monkeypatch.undo()
    assert images.nbytes < largest < 1.3 * images.nbytes
    assert np.array_equal(open_samples(whole).images(0, 64), images)
    with zipfile.ZipFile(whole) as archive:
        assert archive.testzip() is None


def parts_of(path: Path, *, images: int, batch: int = 2) -> NpzOutput:
    """A sample file all of whose parts are drawn, of black images of 4 pixels."""
    output = NpzOutput(path, size=4, request={"images": images, "batch": batch})
    output.open()
    for part in range(output.parts):
        output.write(part, np.zeros((batch, 4, 4, 3), np.uint8), np.zeros(batch, int))
    return output


def test_the_journal_of_an_interrupted_joining_is_read_once_for_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, reads = parts_of(tmp_path / "a.npz", images=40), 0

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output, "_checksum", interrupted)
        output.assemble(None)
    read = Path.read_text

    def counted(path: Path) -> str:
        nonlocal reads
        reads += path.name == "whole.json"
        return read(path)

    monkeypatch.setattr(Path, "read_text", counted)
    labels = np.zeros(2, int)
    assert [output.fault(part, labels) for part in output.listed()] == [None] * 20
    assert reads <= 2  # to list the parts, and to check them
    with (output.work / "whole.npz").open("r+b") as file:
        file.seek(output._offset(7))
        file.write(b"\1")
    assert "another checksum" in str(output.fault(7, labels))


def test_joining_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_EVERY", -1.0)
    parts_of(tmp_path / "a.npz", images=6).assemble(None)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in said] == [
        *(f"{n} of 3 batches joined" for n in (1, 2, 3)),
        *(f"{n} of 3 joined batches checked" for n in (1, 2, 3)),
    ]


@pytest.mark.parametrize("change", ["fewer", "other"])
def test_a_message_of_other_classes_shows_where_they_differ(tmp_path: Path, change: str) -> None:
    classes = tuple(range(21841))
    request = {"images": 2, "batch": 2, "labels": "random", "classes": classes, "noise": 1}
    NpzOutput(tmp_path / "a.npz", size=4, request=request).open()
    other = classes[:1000] if change == "fewer" else (*classes[:1000], 999, *classes[1001:])
    wanted = NpzOutput(tmp_path / "a.npz", size=4, request={**request, "classes": other})
    with pytest.raises(ValueError, match="holds parts of another request") as refused:
        wanted.is_begun()
    said = str(refused.value)
    assert len(said) < 600 + len(str(tmp_path))
    assert "998, 999, 1000, 1001" in said
    assert ("998, 999]" if change == "fewer" else "998, 999, 999, 1001") in said


def test_parts_that_a_request_has_not_or_are_behind_a_link_to_nothing_are_named(
    tmp_path: Path,
) -> None:
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])
    request = {"images": 4, "batch": 2, "noise": 1, "pixels": "round", "guide_at": "x_t"}
    request |= {"cfg": None, "labels": None}
    output = NpzOutput(tmp_path / "a.npz", size=4, request=request)
    output.open()
    output.write(0, images, labels)
    assert output.is_begun()
    shutil.copy(output.work / "000000.npz", output.work / "000099.npz")
    with pytest.raises(ValueError, match=r"a\.parts holds a part 99, and this request has 2, from"):
        output.is_begun()
    shutil.rmtree(output.work)
    output.work.symlink_to("/unmounted/a.parts")
    with pytest.raises(ValueError, match=r"is a link to /unmounted/a\.parts, which does not"):
        output.open()
