"""Ablations: the paper's rows are its networks; a set trains, draws, evaluates, tabulates."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import ranks
from trainer.ablate import load, main, parser
from trainer.adm.unet import build

# Parameters of rows of Table 1, measured on the reference.
MEASURED = {
    "T1 base: 160 channels, 1 head, attention 16": 140_830_246,
    "T1 128 channels, 4 blocks": 146_187_142,
    "T1 4 heads, attention 32, 16, 8, BigGAN": 164_967_686,
    "T2 64 channels per head, T3 AdaGN": 105_710_598,
}


def test_the_papers_rows_have_its_parameters_and_iterations() -> None:
    found = load("paper", (), unset=())
    with torch.device("meta"):
        nets = {row.name: build(found.config(row).model) for row in found.rows}
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert {name: sizes[name] for name in MEASURED} == MEASURED
    assert {found.config(row).training.images for row in found.rows} == {700_000 * 256}


def test_a_plan_has_the_days_of_every_row(capsys: pytest.CaptureFixture) -> None:
    name = "Table 3, with a name that is longer than most"
    rows = f'rows = [{{name = "{name}"}}]'
    assert main(["paper", "--set", rows, "--dry-run", "--mfu", "1", "--tflops", "100"]) == 0
    header, line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith(name) and len(line) == len(header)
    # 8.4e19 operations, the paper's own figure, at 1e14 per second.
    assert float(line.split()[-1]) == pytest.approx(8.4e19 / 1e14 / 86400, rel=0.01)
    # With the changes that --help has as examples.
    helped = {action.dest: str(action.metavar).strip("'") for action in parser()._actions}
    changes = ["--set", helped["set"], "--unset", helped["unset"]]
    assert main(["digits", *changes, "--dry-run"]) == 0


def test_a_row_may_set_what_the_set_sets_for_every_row() -> None:
    rows = 'rows = [{name = "a"}, {name = "b", set = ["training.lr = 2"]}]'
    found = load("digits", ('set = ["training.lr = 1", "training.seed = 5"]', rows), unset=())
    assert [found.config(row).training.lr for row in found.rows] == [1, 2]
    assert [found.config(row).training.seed for row in found.rows] == [5, 5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('base = "digit"', "unknown preset"),
        ("rows = []", "one or more"),
        ('rows = [{name = "a"}, {name = "A"}]', "different names"),
        ('rows = [{name = "a", set = ["model.chanels = 3"]}]', "row 'a'.*unknown setting"),
        ('rows = [{name = "a", against = "b"}]', "the name of an earlier row"),
        ('rows = [{nam = "a"}]', "unknown setting"),
        ("samples.images = 15", "samples.images = 15: must be at least 16"),
        ('samples.steps = "2000"', "row 'base': samples.steps: respacing = '2000'"),
        ('rows = [{name = "a", set = ["model.small_size = 4"]}]', "row 'a': model.small_size = 4"),
        ('rows = [{name = "a", set = ["objective = \\"classify\\""]}]', "row 'a': "),
    ],
)
def test_a_wrong_set_is_refused_in_one_line(change: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load("digits", (change,), unset=())


def test_a_set_without_settings_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").touch()
    with pytest.raises(ValueError, match=r"mine\.toml: setting 'base' is missing$"):
        load(f"{tmp_path}/mine.toml", (), unset=())


def test_an_unknown_set_is_called_a_set() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown set 'paperr' \(nearest: 'paper'\); there are: "
    ):
        load("paperr", (), unset=())


def test_what_no_row_could_do_without_is_said_once_before_the_first(
    tmp_path: Path,
    digits: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The set is that of the quickstart, which has not run here."""
    monkeypatch.chdir(tmp_path)
    shards = ["--set", f"set = ['data.shards = \"{digits}\"']"]
    reference = ["--set", f'samples.reference = "{digits}"']
    for given, said in {
        (): "no dataset at runs/quickstart/shards: ",
        (*shards,): "samples.reference = 'runs/quickstart/shards': must be ",
        (*shards, *reference): "samples.network = 'runs/quickstart/classifier': must be ",
    }.items():
        assert main(["digits", "--runs", "ablation", *given]) == 78
        out, err = capfd.readouterr()
        assert not out and err.startswith(f"error: {said}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_samples_are_compared_with_is_opened_before_the_first_row(
    tmp_path: Path, digits: Path, network: Path, tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, large = tmp_path / "run", tmp_path / "large.npz"
    np.savez(large, arr_0=np.zeros((20, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((20, 8, 8, 3), np.float32))
    train = ["train", str(tiny), "--run", str(run), "--set", "training.images = 8"]
    ranks.start(tmp_path / "job", ranks=1, runs=[train]).wait()
    environment = dict(os.environ)
    for reference, net, said in (
        (digits, run, "it is no classifier"),
        (large, network, "samples are 8 x 8, the images of .* 16 x 16"),
        (tmp_path / "float.npz", network, "images are float32"),
        (digits, large, "weights"),
    ):
        given = [f"set = ['data.shards = \"{digits}\"']", f'samples.reference = "{reference}"']
        given += [f'samples.network = "{net}"']
        words = [word for change in given for word in ("--set", change)]
        assert main(["digits", "--runs", str(tmp_path / "runs"), *words]) == 78
        # Torch with CUDA but no GPU may say so in a line of its own, before.
        assert re.search(rf"^error: samples: .*{said}.*\n\Z", capfd.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "runs").exists() and dict(os.environ) == environment


@pytest.mark.slow
def test_a_set_is_trained_drawn_evaluated_and_tabulated_and_resumes(
    tiny: Path, digits: Path, network: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / "set.toml"
    path.write_text(f"""
base = "{tiny}"
set = ["training.images = 16"]
[samples]
images = 16
steps = "4"
reference = "{digits}"
network = "{network}"
[[rows]]
name = "Base"
[[rows]]
name = "added"
set = ['model.conditioning = "add"']
""")
    runs = tmp_path / "runs"
    assert main([str(path), "--runs", str(runs)]) == 0
    capfd.readouterr()
    table = (runs / "table.md").read_text().splitlines()
    assert table[0].startswith("| row | against | fid_16 |")
    figures = [
        json.loads((runs / row / "figures.json").read_text())["figures"]["fid_16"]["value"]
        for row in ("base", "added")
    ]
    assert f"| {figures[0]:.4g}" in table[2]
    assert f"| {figures[1] - figures[0]:+.3g}" in table[3]
    rows = list(csv.DictReader((runs / "table.csv").open()))
    assert {row["row"] for row in rows} == {"Base", "added"}
    # What is done is not done again.
    (runs / "added" / "figures.json").unlink()
    before = (runs / "base" / "samples.npz").stat().st_mtime_ns
    assert main([str(path), "--runs", str(runs)]) == 0
    assert (runs / "base" / "samples.npz").stat().st_mtime_ns == before
    assert (runs / "table.md").read_text().splitlines() == table
    capfd.readouterr()
    assert main([str(path), "--set", "samples.images = 20", "--runs", str(runs)]) == 78
    assert "row 'Base' was another when" in capfd.readouterr().err


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_the_processes_of_a_launcher_are_refused_in_one_line(
    names: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """They would train the rows beside each other."""
    for name in ("RANK", "WORLD_SIZE"):  # of a test that was a rank in this process
        monkeypatch.delenv(name, raising=False)
    said = "error: trainer.ablate: 2 processes were started: start it alone; --ranks 2 starts the "
    for rank, line in ((0, f"{said}ranks\n"), (1, "")):
        for name, value in zip(names, (rank, 2), strict=True):
            monkeypatch.setenv(name, str(value))
        assert main(["digits", "--runs", str(tmp_path / "runs")]) == 78
        assert capfd.readouterr() == ("", line)
    monkeypatch.setenv(names[0], "0")
    monkeypatch.setenv(names[1], "1")  # such as `srun --pty bash`
    assert main(["digits", "--dry-run"]) == 0
