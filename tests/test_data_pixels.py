"""Pixels that are not 8 bits of RGB: scaled, laid on white or refused, not destroyed."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from data.config import DataConfig
from data.dataset import open_shards
from data.enlarge import enlarged_part
from data.pack import LEFT_OUT, main, pack
from data.packing.begun import Request
from data.packing.indexing import merge
from data.packing.plan import PackConfig
from data.packing.report import dry_run
from data.packing.tars import scan_tar
from data.samples import crop_remark
from data.transforms import decode, open_over
from tests.support import ranks
from tests.support.data_fixtures import content, image_file, packed, write_folder
from trainer.sampling.samplefile import ShardSamples

RAMP = np.linspace(0, 65535, 400).reshape(20, 20)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", "u2"), ("TIFF", "u2"), ("TIFF", ">u2"), ("TIFF", "i4")]
)
def test_grey_of_16_bits_keeps_its_shades(kind: str, dtype: str) -> None:
    image = Image.fromarray(RAMP.astype(dtype))
    pixels = np.asarray(open_over(file_of(image, kind)).image)
    assert (pixels == np.round(RAMP.astype("i4") / 257)[:, :, None]).all()


def test_grey_of_16_bits_in_pgm_keeps_its_shades() -> None:
    content_ = b"P5 20 20 65535\n" + RAMP.astype(">u2").tobytes()
    assert len(np.unique(np.asarray(open_over(content_).image))) == 256


def test_a_16_bit_png_is_packed_with_its_shades_and_kept_unchanged(tmp_path: Path) -> None:
    original = file_of(Image.fromarray(RAMP.astype("u2")), "PNG")
    (tmp_path / "P").mkdir()
    (tmp_path / "P" / "a.png").write_bytes(original)
    ((pixels, _),) = content(packed(tmp_path / "P", tmp_path))
    assert len({*pixels}) > 100
    config = PackConfig(size=32, keep_original=True)
    pack(Request(str(tmp_path / "P"), config), out=tmp_path / "kept")
    (shard,) = open_shards(tmp_path / "kept").shards
    (sample,) = scan_tar(tmp_path / "kept" / shard.tar)
    stored = (tmp_path / "kept" / shard.tar).read_bytes()[sample.offset :][: sample.size]
    assert stored == original and len(np.unique(decode(stored))) == 256


@pytest.mark.parametrize(
    ("dtype", "message"), [("f4", "floating-point"), ("i4", "from -5 to 70000: must be")]
)
def test_other_numbers_are_left_out_by_name(tmp_path: Path, dtype: str, message: str) -> None:
    values = RAMP.copy()
    values[0, 0], values[0, 1] = -5, 70000
    (tmp_path / "P").mkdir()
    image = Image.fromarray(values.astype(dtype))
    (tmp_path / "P" / "depth.tif").write_bytes(file_of(image, "TIFF"))
    (tmp_path / "P" / "a.jpg").write_bytes(image_file(0, width=20, height=20))
    shards = packed(tmp_path / "P", tmp_path)
    assert shards.count == 1
    report = (Path(shards.root) / LEFT_OUT).read_text()
    assert "depth.tif: " in report and message in report


def transparent(mode: str) -> bytes:
    """A picture of 20 x 20 pixels, grey 90, whose left half is transparent over black."""
    image = Image.new("RGBA", (20, 20), (90, 90, 90, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 20))
    if mode == "P":
        palette = Image.new("P", (20, 20), 1)
        palette.putpalette([0, 0, 0, 90, 90, 90])
        palette.paste(0, (0, 0, 10, 20))
        return file_of(palette, "PNG", transparency=0)
    if mode == "I;16":
        grey = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        return file_of(grey, "PNG", transparency=0)
    if mode == "RGB":
        return file_of(image.convert("RGB"), "PNG", transparency=(0, 0, 0))
    return file_of(image.convert(mode), "PNG")


@pytest.mark.parametrize("kept", [(), ("--keep-original",)])
def test_another_background_shows_through_also_where_originals_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: tuple[str, ...]
) -> None:
    (tmp_path / "P").mkdir()
    (tmp_path / "P" / "a.png").write_bytes(transparent("RGBA"))
    words = [str(tmp_path / "P"), str(tmp_path / "o"), "--size", "16", "--workers", "1", *kept]
    assert main([*words, "--format", "png", "--background", "#ff0000"]) == 0
    assert "1 with transparency (now on #ff0000)" in capsys.readouterr().err
    samples = ShardSamples(tmp_path / "o", size=16)
    pixels = samples.images(0, 1)[0]
    assert (pixels[:, :7] == (255, 0, 0)).all()
    assert (abs(pixels[:, 10:].astype(int) - 90) <= 3).all()  # bicubic
    assert main([*words, "--background", "reddish"]) == 78
    assert "--background = 'reddish': must be a colour" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [(), ("--keep-original",)])
def test_images_that_are_enlarged_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: tuple[str, ...]
) -> None:
    (tmp_path / "P").mkdir()
    for i, side in enumerate((15, 16, 17)):
        (tmp_path / "P" / f"{i}.png").write_bytes(image_file(i, width=side, height=40))
    words = [str(tmp_path / "P"), str(tmp_path / "o"), "--size", "16", "--workers", "1", *kept]
    assert main([*words, "--dry-run"]) == 0
    assert "; 1 of 3 that were tried are smaller than 16 pixels" in capsys.readouterr().out
    assert main(words) == 0
    assert ", 1 smaller than 16 pixels (enlarged)\n" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16"])
def test_white_shows_through_transparent_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    pixels = np.asarray(open_over(transparent(mode)).image)
    assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == 90).all()
    (tmp_path / "P").mkdir()
    (tmp_path / "P" / "a.png").write_bytes(transparent(mode))
    (tmp_path / "P" / "b.jpg").write_bytes(image_file(0, width=20, height=20))
    arguments = [str(tmp_path / "P"), str(tmp_path / "oP"), "--size", "16", "--workers", "1"]
    assert main(arguments) == 0
    assert "0 skipped, 1 with transparency (now on white)" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_an_image_of_very_many_pixels_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns of one above its limit, without a name, and refuses twice as many pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    for name, side in {"small": 20, "huge": 30, "too_huge": 40}.items():
        (tmp_path / f"{name}.jpg").write_bytes(image_file(0, width=side, height=side))
    request = Request(source=str(tmp_path), config=PackConfig(size=16))
    assert dry_run(request, out=tmp_path / "out", workers=1) == 0
    for _ in range(2):  # the shard is kept, and so is its record
        assert pack(request, out=tmp_path / "out") == 1
        assert capsys.readouterr().err.endswith(", 1 of more than 600 pixels (huge.jpg)\n")
        assert "too_huge.jpg: " in (tmp_path / "out" / "left-out.txt").read_text()
        (tmp_path / "out" / "manifest.json").unlink()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "RGB", "1", "CMYK"])
def test_opaque_images_are_decoded_as_before(mode: str) -> None:
    picture = Image.open(io.BytesIO(image_file(3, width=20, height=20))).convert(mode)
    content_ = file_of(picture, "TIFF" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(content_)) as image:
        assert (np.asarray(open_over(content_).image) == np.asarray(image.convert("RGB"))).all()


def test_a_part_of_an_enlarged_strip_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    for n in range(60):
        width, height = int(rng.integers(1, 12)), int(rng.integers(12, 300))
        side = int(rng.integers(12, 64))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels if n % 2 else np.ascontiguousarray(pixels.swapaxes(0, 1)))
        size = tuple(round(each * side / width) for each in image.size)
        left, top = (int(rng.integers(0, each - side + 1)) for each in size)
        whole = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        part = enlarged_part(image, size=size, box=(left, top, left + side, top + side))
        assert np.array_equal(part, whole[top : top + side, left : left + side])


def test_a_long_strip_takes_little_memory() -> None:
    script = (
        "import resource\n"
        "from PIL import Image\n"
        "from data.transforms import center_crop, random_crop\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"  # whole, it takes 12 GiB
        "for size in ((1, 20000), (20000, 1)):\n"
        "  image = Image.new('RGB', size, (9, 8, 7))\n"
        "  assert (center_crop(image, size=256) == (9, 8, 7)).all()\n"
        "  assert random_crop(image, size=256, seed=0, index=0).shape == (256, 256, 3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=ranks.LIMIT
    )
    assert done.returncode == 0, done.stderr


def test_crops_that_were_not_meant_are_remarked(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=12)
    pack(Request(str(source), PackConfig(size=16)), out=tmp_path / "cropped")
    pack(Request(str(source), PackConfig(size=16, keep_original=True)), out=tmp_path / "kept")

    def remark(name: str, image_size: int, crop: Literal["center", "random"]) -> str:
        shards = open_shards(tmp_path / name)
        config = DataConfig(
            shards=shards.root, image_size=image_size, crop=crop, streams=1, workers=0
        )
        return crop_remark(shards, config=config)

    assert "was cropped to 16 pixels when it was packed" in remark("cropped", 16, "random")
    assert "--size 16: its images are enlarged to 17 pixels" in remark("kept", 17, "random")
    assert "enlarged to 17 pixels" in remark("kept", 17, "center")
    pack(Request(str(source), PackConfig(size=18, keep_original=True)), out=tmp_path / "more")
    merge(tmp_path / "both", [str(tmp_path / "more"), str(tmp_path / "kept")])
    assert "--size 16: its images are enlarged to 17 pixels" in remark("both", 17, "random")
    assert remark("both", 16, "random") == remark("kept", 16, "random") == ""
    assert remark("cropped", 16, "center") == ""


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_packed_as_png(tmp_path: Path, kind: str) -> None:
    (tmp_path / "P" / "a").mkdir(parents=True)
    image = Image.open(io.BytesIO(image_file(1, width=20, height=20))).convert("CMYK")
    image.save(tmp_path / "P" / "a" / "x.img.tif", format=kind)
    (pixels, _), *others = content(packed(tmp_path / "P", tmp_path))
    assert not others and len(set(pixels)) > 20


@pytest.mark.parametrize("keep_original", [False, True])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_counted_and_applied_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: int, keep_original: bool
) -> None:
    pixels = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = value
    (tmp_path / "P" / "a").mkdir(parents=True)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "P" / "a" / "x.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "P" / "a" / "x.png"))
    for turn, wanted in ((False, image), (True, upright)):
        out, options = tmp_path / f"o{turn}", {"keep_original": keep_original, "format": "png"}
        pack(
            Request(str(tmp_path / "P"), PackConfig(size=16, exif_transpose=turn, **options)),
            out=out,
        )
        ((found, _),) = content(open_shards(out))
        assert found == np.asarray(wanted).transpose(2, 0, 1).tobytes()
        said = "1 with an EXIF orientation" in capsys.readouterr().err
        assert said == (value != 1)
    made_by = json.loads((tmp_path / "oFalse" / "manifest.json").read_text())["made_by"]
    assert "exif_transpose" not in made_by  # as the last release: the same fingerprint


def test_a_tiff_that_pillow_turns_as_it_loads_is_not_turned_again(tmp_path: Path) -> None:
    pixels = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "P" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "P" / "a" / "x.tif", exif=exif)
    config = PackConfig(size=16, exif_transpose=True, format="png")
    pack(Request(str(tmp_path / "P"), config), out=tmp_path / "out")
    ((found, _),) = content(open_shards(tmp_path / "out"))
    assert found == np.rot90(pixels, -1).transpose(2, 0, 1).tobytes()


def test_16_bits_of_which_12_are_used_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "P").mkdir()
    for most in (0, 255, 4095, 4096, 65535):
        image = Image.fromarray(np.full((16, 16), most, np.uint16))
        (tmp_path / "P" / f"{most}.png").write_bytes(file_of(image, "PNG"))
    pack(Request(str(tmp_path / "P"), PackConfig(size=16)), out=tmp_path / "o")
    assert ", 2 of 16 bits with values below 4,096 (nearly black" in capsys.readouterr().err


def test_files_of_several_pictures_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stack of slices or an animation has more than its first picture, which alone is packed."""
    (tmp_path / "P").mkdir()
    slices = [Image.fromarray(np.full((16, 16), grey, "u1")) for grey in (9, 99, 199)]
    for name in ("a.tif", "b.gif", "c.png", "d.webp", "one.tif", "one.gif", "one.png", "one.jpg"):
        more = {} if "one" in name else {"save_all": True, "append_images": slices[1:]}
        slices[0].save(tmp_path / "P" / name, **more)
    pack(Request(str(tmp_path / "P"), PackConfig(size=16)), out=tmp_path / "o")
    assert ", 4 of several pictures or pages (the first is packed)" in capsys.readouterr().err
    assert {found[0] for found, _ in content(open_shards(tmp_path / "o"))} <= {8, 9, 10}


def test_a_long_text_in_a_png_is_no_reason_to_leave_it_out() -> None:
    texts = PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    buffer = io.BytesIO()
    Image.fromarray(RAMP.astype("u1")).save(buffer, format="PNG", pnginfo=texts)
    assert (np.asarray(open_over(buffer.getvalue()).image)[..., 0] == RAMP.astype("u1")).all()
