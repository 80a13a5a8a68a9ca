"""Packing: exact crops, the same bytes however it is done, nothing lost or overwritten."""

import io
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file
from sklearn.datasets import load_digits, load_sample_image

from data.config import DataConfig
from data.dataset import open_shards, verify
from data.exits import REFUSED
from data.pack import LEFT_OUT, main, pack
from data.packing.begun import Request
from data.packing.claim import WORK
from data.packing.jobs import encode, make_shard
from data.packing.plan import PackConfig, plan
from data.packing.sources import Folder
from data.stream import Stream
from data.transforms import center_crop, decode, decode_into, halve_and_scale, random_crop
from tests.support import ranks
from tests.support.data_fixtures import image_file, pack_folder, write_folder

GOLDENS = load_file(Path(__file__).parent / "goldens" / "center_crop.safetensors")


@pytest.mark.parametrize("name", sorted(GOLDENS))
def test_center_crop_equals_the_reference(name: str) -> None:
    photo = load_sample_image(f"{name.split('.')[0]}.jpg")
    if "odd" in name:
        photo = photo[:401, :333]
    wanted = GOLDENS[name]
    crop = center_crop(Image.fromarray(photo), size=len(wanted))
    assert (crop == wanted).all()


def test_random_crop_keeps_80_to_100_percent_and_is_keyed() -> None:
    image = Image.fromarray(load_sample_image("china.jpg"))
    crops = [random_crop(image, size=48, seed=1, index=n) for n in range(20)]
    assert all(crop.shape == (48, 48, 3) for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 20
    assert (crops[3] == random_crop(image, size=48, seed=1, index=3)).all()


def test_random_crops_are_all_windows_at_all_scales() -> None:
    """The smaller side is 5 to 7 pixels: 5 are 80 % of 6.25, which the reference rounds up."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    image, wanted = Image.fromarray(pixels), set()
    for side in (5, 6, 7):
        scaled = np.asarray(halve_and_scale(image, side=side))
        height, width, _ = scaled.shape
        corners = [(y, x) for y in range(height - 4) for x in range(width - 4)]
        wanted |= {scaled[y : y + 5, x : x + 5].tobytes() for y, x in corners}
    assert len(wanted) == 2 + 6 + 12
    assert {random_crop(image, size=5, seed=0, index=n).tobytes() for n in range(600)} == wanted
    # As large as twice the side is halved, as in the reference.
    halved = image.resize((6, 5), Image.Resampling.BOX)
    assert (center_crop(image, size=5) == np.asarray(halved)[:, :5]).all()
    # The other side is rounded: 11 x 0.6 is 7.
    assert halve_and_scale(image.crop((0, 0, 11, 10)), side=6).size == (7, 6)


def test_strict_decoding_equals_pillow() -> None:
    blob = image_file(3, width=61, height=47)
    assert (decode(blob) == np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(16, 16), (17, 9), (8, 5), (1, 1)])
def test_mirroring_is_exact(kind: str, width: int, height: int) -> None:
    blob = image_file(3, width=width, height=height, kind=kind)
    out, scratch = np.zeros((height, width, 3), np.uint8), np.zeros(5000, np.uint8)
    decode_into(blob, mirrored=False, out=out, scratch=scratch)
    assert np.array_equal(out, decode(blob))
    decode_into(blob, mirrored=True, out=out, scratch=scratch)
    assert np.array_equal(out, decode(blob)[:, ::-1])
    with pytest.raises(ValueError, match=f"image of {width} x {height} pixels, not"):
        decode_into(blob, mirrored=False, out=np.zeros((40, 40, 3), np.uint8), scratch=scratch)


def test_digits_are_stored_unchanged(digits: Path) -> None:
    shards = open_shards(digits)
    assert shards.count == 1797 and shards.classes == tuple("0123456789")
    config = DataConfig(shards=shards.root, image_size=8, workers=0)
    stored = load_digits()
    wanted = {}
    for image, label in zip(stored.images, stored.target, strict=True):
        wanted.setdefault(np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
    with Stream(shards, config=config, seed=0) as stream:
        for batch in stream.parts(images=1797, size=600, rank=0, ranks=1):
            assert (batch.images[:, 0] == batch.images[:, 2]).all()
            for image, label in zip(batch.images[:, 0].numpy(), batch.labels, strict=True):
                assert wanted[image.tobytes()] == label


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_bytes_do_not_depend_on_workers_or_interruptions(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=40)
    config = PackConfig(size=16, per_shard=7)
    pack(Request(str(source), config), out=tmp_path / "one")
    pack(Request(str(source), config), out=tmp_path / "two", executor=ThreadPoolExecutor(2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify(tmp_path / "one", full=True) == []
    shards = open_shards(tmp_path / "one")
    assert sum(shards.sizes) == shards.count == 40 and max(shards.sizes) <= 7

    halfway = tmp_path / "halfway"
    work = plan(Folder(source).listing(), source=str(source), out=halfway, config=config)
    (halfway / WORK).mkdir(parents=True)
    (halfway / WORK / "plan").write_text(work.digest)
    for job in work.jobs[:3]:
        make_shard(job)
    record = halfway / WORK / "00000.json"
    made = json.loads(record.read_text())
    del made["transparent"]  # as version 0.1 wrote it
    record.write_text(json.dumps(made))
    (halfway / "00001.tar").write_bytes(b"torn")
    untouched = (halfway / "00000.tar").stat().st_mtime_ns
    pack(Request(str(source), config), out=halfway)
    assert contents(halfway) == contents(tmp_path / "one")
    assert (halfway / "00000.tar").stat().st_mtime_ns == untouched


def test_what_cannot_be_decoded_is_left_out_and_listed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=20)
    (source / "n0001" / "img_0.JPEG").write_bytes(b"no image")
    whole = (source / "n0002" / "img_0.JPEG").read_bytes()
    (source / "n0002" / "img_0.JPEG").write_bytes(whole[: len(whole) // 2])
    (source / "n0002" / "img_1.JPEG").write_bytes(b"")
    out = tmp_path / "out"
    left = pack(Request(str(source), PackConfig(size=16)), out=out)
    assert left == 3 and open_shards(out).count == 17
    report = (out / LEFT_OUT).read_text()
    assert "n0001/img_0.JPEG: no image that Pillow knows\n" in report
    assert "n0002/img_0.JPEG: " in report and "n0002/img_1.JPEG: an empty file\n" in report


def test_nothing_else_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = pack_folder(tmp_path, images=20)
    before = contents(Path(shards.root))
    arguments = [str(tmp_path / "source"), shards.root, "--per-shard", "9", "--workers", "1"]
    assert main([*arguments, "--size", "16"]) == 0
    assert main([*arguments, "--size", "8"]) == REFUSED
    assert "holds another dataset (--size was 16, is 8): " in capsys.readouterr().err
    assert contents(Path(shards.root)) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert main([str(tmp_path / "source"), str(other), "--size", "16"]) == REFUSED
    assert contents(other) == {"thesis.tex": b"precious"}
    (linked := tmp_path / "linked").symlink_to(tmp_path / "unmounted")
    assert main([str(tmp_path / "source"), str(linked), "--size", "16"]) == REFUSED
    assert f"{linked} is a link to {tmp_path}/unmounted, which" in capsys.readouterr().err


def test_open_names_what_is_wrong(tmp_path: Path) -> None:
    root = Path(pack_folder(tmp_path, images=20).root)

    def fails(pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern):
            open_shards(root)
        assert verify(root)

    kept = shutil.copytree(root, tmp_path / "kept")
    (root / "00001.tar").write_bytes((root / "00001.tar").read_bytes()[:-512])
    fails(r"00001\.tar has \d+ bytes, the manifest says")
    (root / "00001.tar").unlink()
    fails(r"00001\.tar is missing")
    shutil.copy(kept / "00001.tar", root)
    (root / "00002.idx.npy").write_bytes((root / "00002.idx.npy").read_bytes()[:-5])
    fails(r"00002\.idx\.npy is damaged")
    (root / "00002.idx.npy").unlink()
    fails(r"00002\.idx\.npy is missing")
    shutil.copy(kept / "00002.idx.npy", root)
    assert open_shards(root).count == 20
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace("n0001", "n0009"))
    with pytest.raises(ValueError, match="was altered"):
        open_shards(root)
    with pytest.raises(ValueError, match="no dataset at"):
        open_shards(tmp_path)


def test_full_verification_finds_one_flipped_bit(tmp_path: Path) -> None:
    root = Path(pack_folder(tmp_path, images=20).root)
    content = bytearray((root / "00001.tar").read_bytes())
    content[700] ^= 1
    (root / "00001.tar").write_bytes(content)
    assert verify(root) == []
    (fault,) = verify(root, full=True)
    assert "00001.tar" in fault


def test_the_ranks_of_mpirun_pack_the_same_bytes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=40)
    pack(Request(str(source), PackConfig(size=16)), out=tmp_path / "one")
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", sys.executable]
    command = ["-m", "data.pack", str(source), str(tmp_path / "many"), "--size", "16", "--mpi"]
    job = partial(subprocess.run, env=ranks.environment(), timeout=ranks.LIMIT)
    # Each rank would pack by itself; most would hear that another process is packing there.
    refused = job([*mpirun, *command], capture_output=True, text=True)
    assert refused.returncode == REFUSED
    said = set(re.findall("^packing stopped: .*", refused.stderr, re.MULTILINE))
    assert len(said) == 1 and "-m mpi4py.futures" in said.pop()
    job([*mpirun, "-m", "mpi4py.futures", *command], check=True)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert main([str(source), str(tmp_path / "alone"), "--size", "16", "--mpi"]) == REFUSED


def test_a_file_in_the_place_of_the_shards_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "shards"):
        assert main(["digits", str(out), "--size", "8"]) == REFUSED
        assert f"{file} is a file where a directory is wanted" in capsys.readouterr().err
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "2 .*: mpi4py uses Open MPI .*: use the mpirun of"),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI4PY_LIBMPI": "/none.so"},
            "mpi4py: cannot load MPI library; /none.so: .*: load the site's MPI, as by",
        ),
    ],
)
def test_an_mpi_that_is_missing_or_is_not_that_of_mpirun_is_named(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    """The ranks of MPICH's mpirun, where mpi4py has Open MPI: packing asked for 2 ranks."""
    env = {**ranks.environment(), **variables}
    packing = ["-m", "data.pack", "digits", str(tmp_path / "a"), "--mpi"]
    for command in (packing, ["-m", "trainer.train", "digits", "--run", str(tmp_path / "b")]):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        assert done.returncode == REFUSED
        (line,) = done.stderr.strip().splitlines()
        assert re.search(said, line), line
    assert list(tmp_path.iterdir()) == []


def test_originals_that_are_scaled_are_stored_as_pixels_alone() -> None:
    """Without a transparent colour that scaling makes, a comment too long for JPEG, a profile."""

    def stored(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        return encode(buffer.getvalue(), config=config).content

    edge = Image.fromarray(np.repeat([0, 100], 20).astype("u1").repeat(40).reshape(40, 40))
    texts = PngInfo()
    texts.add_text("comment", "x" * 70_000)
    for form in ("png", "jpg"):
        config = PackConfig(size=16, keep_original=True, format=form)
        plain = stored(edge, "PNG")
        assert all(stored(edge, "PNG", transparency=key) == plain for key in range(1, 100))
        assert stored(edge, "PNG", pnginfo=texts) == plain
        lab = Image.open(io.BytesIO(stored(Image.new("LAB", (40, 40)), "TIFF")))
        assert "icc_profile" not in lab.info  # the one that Pillow makes has a date
