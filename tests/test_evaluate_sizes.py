"""Evaluation at the paper's sizes: bounded memory; lines about what takes long or is left out."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import progress
from data.exits import REFUSED
from tests.support import ranks
from trainer.evaluate import main
from trainer.evaluation import evaluator, extraction, figures, reference
from trainer.evaluation.extraction import Extracted, Share
from trainer.evaluation.features import open_network
from trainer.ranks.faults import Refused
from trainer.ranks.group import alone
from trainer.sampling.samplefile import open_samples


def test_features_of_a_reference_are_kept_where_they_are_used_alone(
    network: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "MANIFOLD", 100)
    shares: list[Share] = []

    def noted(share: Share, **given: Any) -> Extracted | None:
        shares.append(share)
        return extraction.joined(share, **given)

    monkeypatch.setattr(evaluator, "joined", noted)
    out = tmp_path / "R.npz"
    assert main(["reference", str(digits), "--out", str(out), "--network", str(network)]) == 0
    (share,) = shares
    assert sum(rows.untyped_storage().nbytes() for rows in share.pool) == 100 * 48 * 4
    samples = open_samples(digits)
    every = samples.images(0, samples.count)
    with np.load(out) as stored, torch.no_grad(), alone():
        images = every[reference.chosen(samples.count)]
        assert np.array_equal(stored["arr_0"], images)
        net = open_network(str(network), device=torch.device("cpu"))
        pools = [net.compute(torch.from_numpy(x).permute(0, 3, 1, 2)).pool for x in (images, every)]
        np.testing.assert_allclose(stored["features"], pools[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stored["mu"], pools[1].double().mean(dim=0), rtol=1e-6)


def test_a_reference_file_is_written_without_its_images_in_memory(
    network: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    samples = open_samples(tmp_path / "images.npz")
    features = torch.rand(64, 4)
    content = reference.Reference(
        name="R",
        checksum="0",
        count=64,
        pool=figures.statistics(features),
        spatial=None,
        features=features,
    )
    with alone():
        opened = open_network(str(network), device=torch.device("cpu"))
    tracemalloc.start()
    reference.save(tmp_path / "R.npz", content, samples=samples, network=opened)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 4
    with np.load(tmp_path / "R.npz") as stored:
        assert np.array_equal(stored["arr_0"], images)
        assert json.loads(str(stored["reference"]))["count"] == 64


def test_figures_and_how_far_the_next_ones_are_are_printed(
    network: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "_EVERY", -1.0)
    samples, out = tmp_path / "samples.npz", tmp_path / "samples.evaluation.json"
    np.savez(samples, arr_0=open_samples(digits).images(0, 240))
    words = [str(samples), "--reference", str(digits), "--network", str(network)]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    said = said[said.index(f"figures of {samples}") + 1 : said.index(f"written: {out}")]
    found = [line.split()[0] for line in said if line[0].isalpha()]
    assert found == [f"{name}_240" for name in ("fid", "precision", "recall", "kid")]
    count = 1797**2 + 240**2 + 1797 * 240
    assert any(line.startswith(f"{count:,} of {count:,} distances of features") for line in said)
    assert any(line.startswith("100 of 500 kernel distances of subsets") for line in said)


@pytest.mark.parametrize("count", [101, 3000])
def test_precision_and_recall_of_parts_are_those_of_each_alone(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    there = torch.randn(2100, 6, generator=generator)
    here = torch.randn(count, 6, generator=generator) + 0.3
    done: list[int] = []
    found = figures.precision_recall(there, here, parts=4, on_distances=done.append)
    sets = [here, *(here[part::4] for part in range(4))]
    alone_each = [figures.precision_recall(there, rows)[0] for rows in sets]
    assert found == alone_each
    assert sum(done) == figures.distances_needed(2100, count)
    squared, *own = (
        torch.cdist(a.double(), b.double())
        for a, b in ((there, here), (there, there), (here, here))
    )
    near = [distances.sort(dim=1).values[:, 3] for distances in own]
    inside = (squared <= near[0][:, None]).any(dim=0), (squared <= near[1]).any(dim=1)
    assert found[0] == pytest.approx([float(rows.double().mean()) for rows in inside])


def test_tars_that_are_not_of_the_dataset_are_named_where_it_is_evaluated(
    weights: dict[str, list[str]], digits: Path, tmp_path: Path
) -> None:
    beside = shutil.copytree(digits, tmp_path / "data") / "zz.tar"
    beside.touch()
    few = ["--images", "2", "--steps", "2"]
    argv = ["nll", *weights["unet"], *few, "--data", str(beside.parent)]
    job = ranks.fork(tmp_path / "job", partial(main, argv), ranks=1)
    assert "1 tar is not in manifest.json and not read, such as zz.tar; to use" in job.wait()
    assert [process.exitcode for process in job.ranks] == [0], job.text


def test_a_damaged_file_is_refused_before_its_features_are_computed(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)
    whole, hole = tmp_path / "whole.npz", tmp_path / "hole.npz"
    np.savez(whole, arr_0=images)
    content = whole.read_bytes()
    hole.write_bytes(content[:1000] + bytes(1000) + content[2000:])
    for samples, other in ((whole, hole), (hole, whole)):
        words = [str(samples), "--reference", str(other), "--network", str(network)]
        with pytest.raises(Refused, match=r"hole\.npz is damaged: Bad CRC-32"):
            main(words)
        assert f"images of {hole}" not in capsys.readouterr().out


def test_a_reference_that_may_not_be_read_names_who_can_give_the_right(
    network: Path, tmp_path: Path
) -> None:
    if os.geteuid():
        pytest.skip("root alone can be another user")
    samples, other = tmp_path / "samples.npz", tmp_path / "other.npz"
    np.savez(samples, arr_0=np.zeros((32, 8, 8, 3), np.uint8))
    np.savez(other, mu=np.zeros(3))
    other.chmod(0)
    argv = [str(samples), "--reference", str(other), "--network", str(network)]
    without_rights = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
    command = [*without_rights, sys.executable, "-m", "trainer.evaluate", *argv]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == REFUSED
    assert "may not read" in ran.stderr and ": let root chmod it" in ran.stderr, ran.stderr
