"""`python -m trainer.evaluate` on real digits: what figures say, on any number of ranks."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import ranks
from tests.support.exported import refused
from trainer.evaluate import main
from trainer.evaluation import features
from trainer.networks import TrainedNetwork
from trainer.sampling.samplefile import open_samples

DRAWN = 240
NAMES = ("fid", "precision", "recall", "kid")


@pytest.fixture(scope="module")
def real(digits: Path) -> tuple[np.ndarray, np.ndarray]:
    """All digits and their labels, in the shards' order, which is mixed."""
    samples = open_samples(digits)
    assert samples.labels is not None
    return samples.images(0, samples.count), samples.labels


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, network: Path, digits: Path) -> Path:
    """The features of all digits."""
    out = tmp_path_factory.mktemp("reference") / "R.npz"
    assert main(["reference", str(digits), "--out", str(out), "--network", str(network)]) == 0
    return out


def write(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> Path:
    arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels})
    np.savez(path, **arrays)
    return path


def figures(samples: Path, *words: Any) -> dict[str, float]:
    """The figures by their names without the number of samples."""
    assert main([str(samples), *map(str, words)]) == 0
    out = samples.with_suffix(".evaluation.json")
    found = json.loads(out.read_text())["figures"]
    out.rename(out.with_suffix(".last.json"))
    return {name.rpartition("_")[0]: figure["value"] for name, figure in found.items()}


def test_figures_say_what_is_wrong_with_samples(
    network: Path, reference: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    images, labels = real
    fourth = images[::4]
    noise = np.random.default_rng(0).normal(size=fourth.shape)
    sets = {
        "real": fourth,
        "little": (fourth + 20 * noise).clip(0, 255).astype(np.uint8),
        "much": (fourth + 60 * noise).clip(0, 255).astype(np.uint8),
        "three": images[labels < 3],
    }
    found = {
        name: figures(
            write(tmp_path / f"{name}.npz", pixels), "--reference", reference, "--network", network
        )
        for name, pixels in sets.items()
    }
    for figure in ("fid", "kid"):
        values = [found[name][figure] for name in ("real", "little", "much")]
        assert values == sorted(values)
        assert values[1] > 3 * abs(values[0])
    assert found["real"]["precision"] == 1.0
    assert found["much"]["precision"] < found["little"]["precision"] < 1.0
    assert found["three"]["precision"] == 1.0
    assert found["three"]["recall"] < 0.6 < found["real"]["recall"]


def test_an_exported_network_computes_on_another_device(network: Path) -> None:
    meta = torch.device("meta")
    found = features._exported(network, dino=False, device=meta)
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8, device=meta)
    assert found.compute(images).pool.shape == (3, 48)


def test_copies_among_samples_are_counted(
    network: Path,
    reference: Path,
    real: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    against = ("--reference", reference, "--network", network)
    images = np.concatenate([real[0][:40], real[0][20:40], real[0][30:40]])
    figures(write(tmp_path / "twice.npz", images), *against)
    assert "warning: 30 of 70 samples equal an earlier one" in capsys.readouterr().err


def test_a_reference_of_few_images_is_refused(
    network: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    few = write(tmp_path / "few.npz", real[0][:15])
    words = ["reference", str(few), "--out", str(tmp_path / "r.npz"), "--network", str(network)]
    with pytest.raises(ValueError, match="has 15 images: must be at least 16"):
        main(words)
    assert not (tmp_path / "r.npz").exists()


def test_a_size_that_images_are_not_cropped_to_is_refused(
    network: Path, digits: Path, tmp_path: Path
) -> None:
    words = ["reference", str(digits), "--out", str(tmp_path / "r.npz"), "--network", str(network)]
    refused([*words, "--size", "16"], "--size = 16: must be 8, as the images are, or absent")
    refused([*words, "--size", "0"], "--size = 0: must be at least 1")
    assert not (tmp_path / "r.npz").exists()


def test_any_number_of_ranks_and_a_reference_file_give_the_same_figures(
    network: Path, digits: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    samples = write(tmp_path / "samples.npz", real[0][:DRAWN], real[1][:DRAWN])
    reference, common = tmp_path / "R.npz", ("--network", str(network), "--batch", "50")
    assert main(["reference", str(digits), "--out", str(reference), *common]) == 0
    whole = figures(samples, "--reference", digits, *common)
    assert figures(samples, "--reference", reference, *common) == pytest.approx(whole, rel=1e-6)
    # Of five batches, some rank has one less.
    for count in (2, 3):
        out = tmp_path / f"{count}.json"
        words = [str(samples), "--reference", str(reference), "--out", str(out), *common]
        job = ranks.fork(tmp_path / f"job-{count}", partial(main, words), ranks=count)
        job.wait()
        assert out.exists(), job.text
        found = json.loads(out.read_text())["figures"]
        assert {n.rpartition("_")[0]: f["value"] for n, f in found.items()} == pytest.approx(
            whole, rel=1e-6
        )


def test_results_say_what_was_compared(
    network: Path, digits: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path, capfd: Any
) -> None:
    order = real[1][:DRAWN].argsort(kind="stable")
    images = real[0][:DRAWN][order]
    samples = write(tmp_path / "sorted.npz", images, real[1][:DRAWN][order])
    against = ("--reference", digits, "--network", network)
    figures(samples, *against)
    said = capfd.readouterr()
    found = json.loads(samples.with_suffix(".evaluation.last.json").read_text())
    assert set(found["figures"]) == {f"{name}_{DRAWN}" for name in NAMES}
    parts = [write(tmp_path / f"{i}.npz", images[i::4]) for i in range(4)]
    assert main([*map(str, (*parts, *against))]) == 0
    table = capfd.readouterr().out.splitlines()[-6:]  # one, with a row for each file
    assert [row.split(" | ")[0] for row in table[2:]] == [f"| {part}" for part in parts]
    of_parts = [json.loads(p.with_suffix(".evaluation.json").read_text())["figures"] for p in parts]
    fourths = [[part[f"{n}_{DRAWN // 4}"]["value"] for n in NAMES] for part in of_parts]
    errors = [found["figures"][f"{n}_{DRAWN}"]["error"] for n in NAMES]
    assert errors == pytest.approx(np.std(fourths, axis=0, ddof=1) / 2, rel=1e-6)
    assert errors[0] > 0
    assert found["about"]["samples"]["checksum"] == open_samples(samples).checksum()
    assert found["about"]["reference"]["count"] == 1797
    assert f"| fid_{DRAWN} |" in said.out
    assert "sorted by class" in said.err
    assert f"{DRAWN} samples: FID depends on their number" in said.err


def test_an_output_replaces_nothing_but_the_same_result(
    network: Path, digits: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    samples = write(tmp_path / "samples.npz", real[0][:50])
    half, other = write(tmp_path / "half.npz", real[0][::2]), tmp_path / "other.pt2"
    torch.export.save(torch.export.load(network), other)
    own, mine, made = (tmp_path / name for name in ("own.json", "mine.json", "R.npz"))
    mine.write_text('{"rows": [1, 2]}')
    with_network = ["--network", str(network)]
    make = ["reference", str(half), "--out", str(made), *with_network]
    draw = [str(samples), "--reference", str(made), "--out", str(own), *with_network]
    for again in (make, make, draw, draw):
        assert main(again) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def but(words: list[str], option: str, value: Path) -> list[str]:
        place = words.index(option) + 1
        return [*words[:place], str(value), *words[place + 1 :]]

    measure = ["nll", "run", "--data", "shards", "--out"]
    for words, said in (
        (but(make, "--out", samples), r"samples\.npz exists and is no reference file"),
        (["reference", str(samples), *make[2:]], r"R\.npz exists with other results \(images"),
        (but(make, "--network", other), r"R\.npz exists with other results \(network"),
        (but(draw, "--out", mine), r"mine\.json exists and is no evaluation: name another"),
        (but(draw, "--reference", half), r"own\.json exists with other results \(reference"),
        (but(draw, "--network", other), "holds features of"),
        ([str(half), *draw[1:]], r"own\.json exists with other results \(samples"),
        ([str(samples), *draw[:3], *with_network], "SAMPLES = .*: must be of different names"),
        ([*measure, str(samples)], "must be a file that ends in .json"),
        ([*measure, str(own)], r"own\.json exists and is no result of `nll`"),
        ([*measure, str(tmp_path)], "must be a file that ends in .json"),
        (but(draw, "--out", Path("/proc/f.json")), "/proc is not writable .*: name another --out"),
    ):
        refused(words, said)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_compared_is_refused_in_one_line(
    network: Path,
    digits: Path,
    reference: Path,
    real: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
) -> None:
    samples = write(tmp_path / "samples.npz", real[0][:DRAWN])
    large = write(tmp_path / "large.npz", real[0][:50].repeat(2, axis=1).repeat(2, axis=2))
    few = write(tmp_path / "few.npz", real[0][:15])
    plain = tmp_path / "evaluator.npz"
    np.savez(plain, mu=np.zeros(48), sigma=np.eye(48))
    other = tmp_path / "other.npz"
    with np.load(reference) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays["reference"]))
    np.savez(other, **{**arrays, "reference": json.dumps(about | {"network_sha256": "0" * 64})})
    resized = json.dumps(about | {"network": "dinov2 net.pt2"})

    def damaged(name: str, **changed: Any) -> Path:
        np.savez(tmp_path / name, **{**arrays, **changed})
        return tmp_path / name

    features = arrays["features"]
    bit = damaged("bit.npz")
    content = bytearray(bit.read_bytes())
    content[content.index(arrays["mu"].tobytes())] ^= 1
    bit.write_bytes(content)
    unknown = {n: v for n, v in arrays.items() if n != "sigma"}
    np.savez(tmp_path / "half.npz", **unknown)
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    cases = [
        (samples, large, network, "samples are 8 x 8, the images of .* 16 x 16"),
        # Before the network and the reference are read.
        (
            few,
            tmp_path / "none",
            tmp_path / "none",
            r"few\.npz has 15 samples: must be at least 16",
        ),
        (samples, plain, network, "give the Inception weights as the network"),
        (samples, other, network, "make it again with this network"),
        (samples, damaged("dino.npz", reference=resized), network, "of dinov2 net.pt2, not of"),
        (samples, text, network, "not a readable .npz"),
        (samples, bit, network, "mu is damaged: Bad CRC-32"),
        (samples, tmp_path / "half.npz", network, "mu is there without sigma"),
        (samples, damaged("mu.npz", mu=arrays["mu"][:, None]), network, r"\(48, 1\) and \(48, 48"),
        (samples, damaged("nan.npz", features=features * np.nan), network, "must be finite"),
        (samples, damaged("columns.npz", features=features[:, 1:]), network, r"\(1797, 47\): must"),
        (samples, damaged("flat.npz", features=features[0]), network, r"must be finite numbers"),
        (samples, damaged("json.npz", reference="no JSON"), network, "'reference' is damaged"),
        (samples, damaged("keys.npz", reference="{}"), network, "KeyError: 'network'"),
        (samples, digits, tmp_path / "none.pth", "download weights-inception-2015-12-05"),
        (samples, digits, plain, "is no plain weights file|is no weights file"),
        (samples, tmp_path / "none", network, "no such file or directory of shards"),
    ]
    for drawn, against, net, said in cases:
        refused([str(drawn), "--reference", str(against), "--network", str(net)], said)


def test_steps_that_a_network_cannot_visit_are_refused_once_for_all_ranks(
    weights: dict[str, list[str]], digits: Path, tmp_path: Path
) -> None:
    argv = ["nll", *weights["unet"], "--data", str(digits), "--steps", "2000"]
    job = ranks.fork(tmp_path / "job", partial(main, argv), ranks=2)
    assert job.wait().count("error: --steps: respacing = '2000': must be at most 1000") == 1


def test_a_classifier_run_gives_features_and_an_inception_score(
    digits: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path, tiny: Path
) -> None:
    preset = tmp_path / "classifier.toml"
    preset.write_text(tiny.read_text().replace('objective = "denoise"', 'objective = "classify"'))
    run = tmp_path / "run"
    job = ranks.start(tmp_path / "job", ranks=1, runs=[["train", str(preset), "--run", str(run)]])
    job.wait()
    assert job.statuses == [0]
    samples = write(tmp_path / "samples.npz", real[0][:DRAWN])
    found = figures(samples, "--reference", digits, "--network", run)
    assert 1 <= found["is"] <= 10
    assert found["precision"] == 1.0
    large = write(tmp_path / "large.npz", real[0][:DRAWN].repeat(2, 1).repeat(2, 2))
    with pytest.raises(ValueError, match="of 8 x 8 images, and these are 16 x 16: give"):
        figures(large, "--reference", large, "--network", run)
    with pytest.raises(ValueError, match=r" has no ema-0\.7; it has: ema-0\.5, ema-0\.9$"):
        TrainedNetwork.find(run, preset=None, decay=0.7)
    out = tmp_path / "held-out.json"
    measure = ["classifier", str(run), "--data", str(digits), "--out", str(out), "--images"]
    assert main([*measure, "16"]) == main([*measure, "16"]) == 0
    before = out.read_text()
    with pytest.raises(ValueError, match=r"exists with other results \(images was 16, is 17\)"):
        main([*measure, "17"])
    assert out.read_text() == before
