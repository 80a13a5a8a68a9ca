"""Ranks that have not the same code, settings, data or run directory do not work together."""

import os
import shutil
from functools import partial
from pathlib import Path

from data.exits import REFUSED
from data.version import digest
from tests.support import ranks
from tests.support.data_fixtures import pack_folder
from tests.support.runs import Place
from trainer import common


def work(directory: Path, code: Path, runs: list[list[list[str]]]) -> int:
    """As `ranks.work`, with other runs, other code and another directory on rank 1."""
    from trainer import common

    rank = int(os.environ["RANK"])
    if rank:
        common.digest = partial(digest, code)
    (directory / str(rank)).mkdir()
    os.chdir(directory / str(rank))
    return ranks.work(directory, runs[rank], fp16=False)


def refusals(place: Place, code: Path, own: list[list[str]], other: list[list[str]]) -> list:
    directory = place.root / f"job-{len(list(place.root.glob('job-*')))}"
    job = ranks.fork(directory, partial(work, directory, code, [own, own, other]), ranks=3)
    job.wait()
    return job.statuses


def test_the_ranks_that_differ_are_named_with_what_they_have(
    tmp_path: Path, tiny: Path, weights: dict[str, list[str]]
) -> None:
    """Rank 2 has other settings or shards; of the last run all have the same, but not the place."""
    place = Place(tmp_path, tiny)
    shards = pack_folder(tmp_path / "other", images=20, size=8).root
    last = place.arguments("elsewhere")
    last[last.index("--run") + 1] = "here"

    def drawn(labels: str, *more: str) -> list[str]:
        out = ["--out", f"{tmp_path}/drawn.npz", "--images", "4", "--steps", "2"]
        return ["sample", *weights["unet"], *out, "--labels", labels, *more]

    own = [*(place.arguments(name) for name in ("lr", "stage", "shards")), last, drawn("balanced")]
    other = [
        place.arguments("lr", sets=("training.lr = 0.5",)),
        place.arguments("stage", stage=1),
        place.arguments("shards", sets=(f'data.shards = "{shards}"',)),
        last,
        drawn("random", "--seed", "1"),
    ]
    said = refusals(place, ranks.ROOT, own, other)
    assert "rank 2 on " in said[0] and ": training.lr = 0.5 (rank 0: 0.001); start" in said[0]
    assert ": ds_config.zero_optimization.stage = 1 (rank 0: 2); start" in said[1]
    assert ": images of data.shards = " in said[2] and "training" not in said[2]
    assert "rank 1: " in said[3] and "1/here is not the run directory of the main rank" in said[3]
    assert "a port of its own" in said[3]  # one of two jobs that start at the same time
    differences = "seed = 1 (rank 0: 0), labels = random (rank 0: balanced); start"
    assert "rank 2 on " in said[4] and differences in said[4]
    assert [place.run(name).exists() for name in ("lr", "stage", "shards")] == [False] * 3
    assert not list(tmp_path.glob("drawn*"))


def evaluate(words: list[str]) -> int:
    """Two ranks, of which the second has another batch."""
    from trainer import evaluate

    return evaluate.main([*words, "--batch", str(64 + int(os.environ["RANK"]))])


def test_ranks_that_evaluate_with_other_settings_are_named(tmp_path: Path) -> None:
    figures = ["samples.npz", "--reference", "reference.npz", "--network", "network"]
    likelihood = ["nll", "run", "--data", "shards"]
    for name, words in {"figures": figures, "likelihood": likelihood}.items():
        job = ranks.fork(tmp_path / name, partial(evaluate, words), ranks=2)
        job.wait()
        assert [rank.exitcode for rank in job.ranks] == [REFUSED] * 2
        assert ": batch = 65 (rank 0: 64); start" in job.text


def test_an_older_checkout_is_named_and_shards_may_be_at_another_place(
    tmp_path: Path, tiny: Path, digits: Path, weights: dict[str, list[str]]
) -> None:
    place = Place(tmp_path, tiny)
    for part in ("data", "trainer"):
        shutil.copytree(ranks.ROOT / part, tmp_path / "code" / part)
    assert digest(tmp_path / "code") == digest()
    with (tmp_path / "code" / "data" / "order.py").open("a") as file:
        file.write("\n")
    shards = shutil.copytree(digits, tmp_path / "other")
    other = place.arguments("old", sets=(f'data.shards = "{shards}"',))
    draw = ["sample", *weights["unet"], "--out", f"{tmp_path}/drawn.npz"]
    said, drawn = refusals(place, tmp_path / "code", [place.arguments("old"), draw], [other, draw])
    assert drawn == said
    assert "ranks 1, 2 on " in said and ": code (sha256) = " in said and "data.shards" not in said


def test_long_values_of_ranks_are_shown_where_they_differ() -> None:
    classes, place = [*range(21841)], "/shards/" + 80 * "a"
    mine = {"classes": str(classes), "source": f"{place}/one", "sha": "1" * 64}
    other = {"classes": str(classes[:1000]), "source": f"{place}/two", "sha": "2" * 64}
    said = common._differences([("a", mine), ("b", other)])
    assert len(said) < 800
    assert "996, 997, 998, 999] (rank 0: ..." in said and "998, 999, 1000, 1001" in said
    assert f"source = {place}/two (rank 0: {place}/one)" in said
    longer = common._differences([("a", {"out": 4 * place}), ("b", {"out": f"{4 * place}/more"})])
    assert "aaa/more (rank 0: ..." in longer and longer.endswith("aaa)")
    assert f"sha = {'2' * 12} (rank 0: {'1' * 12})" in said
