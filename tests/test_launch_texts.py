"""What is submitted, whole: a 64-node, 512-GPU job for every launcher; and what is refused.

`python -m tests.test_launch_texts` writes the recorded texts anew; read their diff.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kubeflow.training.models
import kubernetes.client.models
import pytest
import yaml

from launch import cluster as clusters
from launch import snapshot
from launch.__main__ import main
from launch.cluster import Cluster
from launch.job import Job
from launch.slurm import array_text, hosts

ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "recorded"
SITES = sorted(path.stem for path in (ROOT / "launch" / "clusters").glob("*.toml"))


def big_job(site: str) -> Job:
    """64 nodes of 8 GPUs, as the example settings of a site have it."""
    settings = clusters.load(ROOT / "launch" / "clusters" / f"{site}.toml")
    if settings.hosts:
        settings = dataclasses.replace(settings, hosts=tuple(f"n{i}" for i in range(1, 65)))
    return Job(
        run=Path("/runs/imagenet64"),
        nodes=64,
        gpus_per_node=8,
        cluster=settings,
        directory=Path("/home/me/adm"),
        changes=("training.lr = 1e-4", 'training.precision = "bf16"'),
        check=site == "slurm",
        shards="/scratch/shards/imagenet64",
    )


@pytest.mark.parametrize("site", SITES)
def test_the_text_of_512_gpus_is_the_recorded_one(site: str) -> None:
    job = big_job(site)
    recorded = RECORDED / f"{site}{snapshot.script(job).suffix}"
    assert snapshot.text(job) == recorded.read_text()
    if recorded.suffix == ".sh":
        subprocess.run(["bash", "-n", recorded], check=True)


def test_the_manifest_is_what_kubeflow_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = yaml.safe_load(snapshot.text(big_job("kubernetes")))
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    # Read by Kubeflow's own models and written again: whatever they do not know gets lost there.
    for name, model in vars(kubeflow.training.models).items():
        monkeypatch.setattr(kubernetes.client.models, name, model, raising=False)
    client, text = kubernetes.client.ApiClient(), SimpleNamespace(data=json.dumps(manifest))
    job = client.deserialize(text, "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(job) == manifest
    roles = manifest["spec"]["pytorchReplicaSpecs"]
    assert {name: role["replicas"] for name, role in roles.items()} == {"Master": 1, "Worker": 63}
    for role in roles.values():
        pod = role["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # Kubeflow looks for that name
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        script = container["command"][2]
        subprocess.run(["bash", "-n", "-c", script], check=True)


def test_a_sweep_is_one_array_with_a_limit() -> None:
    job = big_job("slurm")
    jobs = [dataclasses.replace(job, run=Path(f"/runs/{name}")) for name in ("a", "b", "c")]
    text = array_text(jobs, at_most=2)
    assert "#SBATCH --array=0-2%2\n" in text
    assert all(f"  /runs/{name}/launch/job.sh\n" in text for name in ("a", "b", "c"))


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("n1", ["n1"]),
        ("gpu[07-09,12],cpu1", ["gpu07", "gpu08", "gpu09", "gpu12", "cpu1"]),
        ("a[1-2]-ib,b3", ["a1-ib", "a2-ib", "b3"]),
    ],
)
def test_host_lists(nodelist: str, expected: list[str]) -> None:
    assert hosts(nodelist) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lancher = 'slurm'", "unknown setting lancher"),
        ("launcher = 'pbs'", "launcher = 'pbs': it must be one of slurm, mpirun"),
        ("[slurm]\ntime = 5", "slurm.time = 5: it must be of type string"),
        ("[slurm]\nseconds_to_save = 0", "slurm.seconds_to_save = 0: it must be from 1"),
        ("launcher = 'kubernetes'", "it needs a section"),
        ("[kubernetes]\nimage = 'x'", "setting kubernetes.claim is missing"),
        ("launcher = 'mpirun'\n[container]\nkind = 'pyxis'\nimage = 'x'", "goes with slurm alone"),
        ("[environment]\n'A B' = 'x'", "environment.A B"),
        ("launcher = ", "cannot read the cluster file"),
    ],
)
def test_a_wrong_cluster_file_is_said_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        clusters.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digitz", "--run", "r"], "no preset 'digitz' (nearest: digits)"),
        (["digits", "--run", "r", "--nodes", "2"], "--nodes 2: this is one machine"),
        (["digits", "--run", "r", "--nodes", "0"], "--nodes 0: it must be at least 1"),
        (["digits", "--run", "r", "--set", "lr"], "--set 'lr' is not TOML"),
        (["digits", "--run", "a b"], "its last part names the job"),
        (["status", "nowhere"], "nowhere is no run directory"),
        (["stop", "nowhere"], "is no run directory"),
    ],
)
def test_a_wrong_command_is_said_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("run", "shards", "message"),
    [
        ("/runs/512-lsun", "/runs/shards", "beginning with a letter"),
        ("/runs/" + 51 * "x", "/runs/shards", "at most 50 letters"),
        ("/elsewhere/lsun", "/runs/shards", "is not below kubernetes.mount = '/runs'"),
        ("/runs/lsun", "shards/lsun", "data.shards = 'shards/lsun' is relative to /home/me/adm"),
    ],
)
def test_what_pods_cannot_see_or_be_called_is_refused(run: str, shards: str, message: str) -> None:
    job = dataclasses.replace(big_job("kubernetes"), run=Path(run), shards=shards)
    with pytest.raises(ValueError, match=message):
        snapshot.text(job)


def test_hosts_must_be_as_many_as_nodes() -> None:
    with pytest.raises(ValueError, match="`hosts` lists, and it lists 1"):
        dataclasses.replace(
            big_job("slurm"), cluster=Cluster(launcher="mpirun", hosts=("a",)), check=False
        )


def test_a_login_node_needs_neither_torch_nor_anything_else() -> None:
    """Without site-packages there is the standard library alone."""
    words = ["digits", "--run", "/runs/x", "--cluster", "launch/clusters/slurm.toml", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "launch", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=x\n")


if __name__ == "__main__":
    for name in SITES:
        big = big_job(name)
        file = RECORDED / f"{name}{snapshot.script(big).suffix}"
        file.write_text(snapshot.text(big))
