"""What the rows of a set come to: picture, HParams; and their submission as one array."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from launch.__main__ import main as launch
from tests.support.ranks import ROOT
from trainer.ablate import main
from trainer.ablations import results as ablation_results
from trainer.ablations.sets import load
from trainer.run.runstate import RunState

SET = """
base = "{tiny}"
set = ["training.images = 16"]
[samples]
images = 16
steps = "4"
reference = "{tiny}"
network = "n.pt2"
[[rows]]
name = "Base"
[[rows]]
name = "added"
set = ['model.conditioning = "add"']
[[rows]]
name = "wide, slow"
against = "added"
set = ['model.conditioning = "add"', "model.channels = 64", "training.lr = 5e-4"]
[[rows]]
name = "later"
"""


@pytest.fixture
def written(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "set.toml"
    path.write_text(SET.format(tiny=tiny))
    return path


def session_groups(directory: Path) -> Any:
    """What TensorBoard's tab HParams asks its backend for."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(directory))
    context = backend_context.Context(
        base_plugin.TBContext(data_provider=provider, multiplexer=multiplexer)
    )
    experiment = context.experiment_from_metadata(
        RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), None
    )
    columns = [
        *(api_pb2.ColParams(hparam=each.name) for each in experiment.hparam_infos),
        *(api_pb2.ColParams(metric=each.name) for each in experiment.metric_infos),
    ]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING, api_pb2.STATUS_SUCCESS],
        slice_size=10,
        col_params=columns,
    )
    handler = list_session_groups.Handler(RequestContext(), context, "", request)
    return handler.run().session_groups


def test_rows_are_shown_as_differences_with_their_curves_and_as_hparams(
    written: Path, tmp_path: Path
) -> None:
    runs, values = tmp_path / "runs", {"base": 13.1, "added": 15.0, "wide-slow": 14.2}
    for name, value in values.items():
        (runs / name / "run").mkdir(parents=True)
        figures = {"fid_16": {"value": value, "error": 0.2}, "is_16": {"value": 50.0, "error": 1.0}}
        (runs / name / "figures.json").write_text(json.dumps({"figures": figures}))
        rows = [{"images": n, "evaluation/fid_16": value + 9 - n} for n in (4, 8)]
        (runs / name / "run" / "metrics.jsonl").write_text(
            "".join(f"{json.dumps(r)}\n" for r in rows)
        )
    found = load(str(written), (), unset=())
    for _ in range(2):  # the second time in place of the first
        ablation_results.write(found, runs=runs, say=print)
    with Image.open(runs / "plot.png") as picture:
        assert picture.size[0] == 1500 and len(picture.convert("RGB").getcolors(10**6)) > 50
    table = (runs / "table.md").read_text()
    assert "| later | Base | not done yet |" in table
    # Errors of both rows: the root of the sum of their squares, 0.28 and 1.4.
    assert "| wide, slow | added | -0.8 ± 0.3 | +0 ± 1 |" in table
    groups = session_groups(runs)
    assert len(groups) == len(values)
    shown = {}
    for group in groups:
        params = {k: v.string_value or v.number_value for k, v in group.hparams.items()}
        metrics = {each.name.tag: each.value for each in group.metric_values}
        shown[params.pop("row")] = (params, pytest.approx(metrics["fid_16"]))
    base = {"model.conditioning": "adagn", "model.channels": 32.0, "training.lr": 1e-3}
    assert shown == {
        "Base": (base, 13.1),
        "added": ({**base, "model.conditioning": "add"}, 15.0),
        "wide, slow": (
            {"model.conditioning": "add", "model.channels": 64.0, "training.lr": 5e-4},
            14.2,
        ),
    }


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster file, and stand-ins for sbatch and squeue."""
    for name, line in (("sbatch", "echo 7"), ("squeue", "cat queue")):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{line}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue").touch()
    (tmp_path / "site.toml").touch()
    return tmp_path / "site.toml"


def finish(run: Path) -> None:
    RunState(state="finished").write(run)


def test_rows_are_submitted_as_one_array_and_only_those_that_are_left(
    written: Path, site: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    runs = tmp_path / "runs"
    words = [str(written), "--runs", str(runs), "--cluster", str(site), "--at-most", "2"]
    assert main([*words, "--dry-run"]) == 0 and not runs.exists()
    assert "#SBATCH --array=0-3%2" in capfd.readouterr().out
    assert main(words) == 0
    said = capfd.readouterr().out
    assert f"submitted {runs}/sweep.sh as job array 7: 4 jobs, 2 at once" in said
    text = (runs / "sweep.sh").read_text()
    assert "--job-name=runs-sweep" in text and f"--output={runs}/sweep-%A-%a.out" in text
    job = (runs / "wide-slow" / "run" / "launch" / "job.sh").read_text()
    assert "--set 'training.images = 16'" in job and "--set 'model.channels = 64'" in job
    assert f"--run {runs}/wide-slow/run" in job
    finish(runs / "base" / "run")
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "/base/run is left out: finished" in said and "3 jobs, 2 at once" in said
    for row in ("added", "wide-slow", "later"):
        finish(runs / row / "run")
    assert main(words) == 0
    assert "no run is left to be submitted" in capfd.readouterr().out
    assert main([*words[:-2], "--set", "samples.images = 20"]) == 78
    assert "row 'Base' was another when" in capfd.readouterr().err


def test_a_row_that_a_job_trains_is_left_to_it(
    written: Path, site: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    runs = tmp_path / "runs"
    assert main([str(written), "--runs", str(runs), "--cluster", str(site)]) == 0
    assert main([str(written), "--runs", str(runs)]) == 75
    said = capfd.readouterr().out
    assert said.count("its job is not started") == 4
    assert said.count("if its job has ended before, rerun this with --cluster") == 4
    assert "| Base |  |" in (runs / "table.md").read_text()
    with pytest.raises(SystemExit):  # an option of the launcher
        main([str(written), "--runs", str(runs), "--at-most", "2"])
    assert main([str(written), "--runs", "new", "--cluster", str(site), "--ranks", "2"]) == 78
    assert "error: --ranks = 2: must be absent with --cluster" in capfd.readouterr().err
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "digits", "digits"], "PRESETS = ['digits']: must be absent with --rows"),
        (["--rows", "digits", "--over", "training.lr = [1]"], "--over"),
        ([], "PRESETS = []: must be one or more, or give --rows SET"),
        (["--rows", "nothing"], "nothing"),
    ],
)
def test_a_sweep_of_rows_refuses_what_does_not_fit(
    words: list[str], said: str, site: Path, capsys: pytest.CaptureFixture
) -> None:
    assert launch(["sweep", *words, "--runs", "r", "--cluster", str(site)]) == 78
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and not Path("r").exists()
