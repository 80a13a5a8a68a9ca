"""The whole text of a job of 64 nodes and 512 GPUs, for every launcher.

`python -m tests.test_launch_texts` writes the recorded texts again; read their diff.
"""

import dataclasses
import difflib
import json
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubeflow.training.models
import kubernetes.client.models
import pytest
import yaml

from launch import cluster as clusters
from launch import records
from launch.job import Job, preamble
from launch.slurm import array_text
from trainer.ranks.world import hosts

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
        overrides=("training.lr = 1e-4", 'training.precision = "bf16"'),
        check=site == "slurm",
        shards="/scratch/shards/imagenet64",
    )


def record(site: str) -> tuple[Path, str]:
    """The file of a site's text; of Slurm with containers, what differs from Slurm without."""
    job = big_job(site)
    file, text = RECORDED / f"{site}{job.script.suffix}", records.text(job)
    if site != "slurm-pyxis":
        return file, text
    texts = (records.text(big_job("slurm")), text)
    lines = [*difflib.unified_diff(*(text.splitlines(keepends=True) for text in texts), n=1)][2:]
    changes = "".join(line for line in lines if not line.startswith("@@"))
    return file.with_suffix(".diff"), changes


def pod(manifest: str) -> dict[str, Any]:
    """The specification of a manifest's pods."""
    spec = next(yaml.safe_load_all(manifest))["spec"]
    if "pytorchReplicaSpecs" in spec:
        return spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (node,) = spec["template"]["spec"]["replicatedJobs"]
    return node["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("site", SITES)
def test_the_text_of_512_gpus_is_the_recorded_one(site: str) -> None:
    recorded, text = record(site)
    assert text == recorded.read_text()
    if not site.startswith("kubernetes"):
        subprocess.run(["bash", "-n", "-c", records.text(big_job(site))], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("site", SITES)
def test_shellcheck_has_no_warnings_about_the_text(site: str, tmp_path: Path) -> None:
    job = big_job(site)
    file, text = tmp_path / "job.sh", records.text(job)
    if site.startswith("kubernetes"):
        (container,) = pod(text)["containers"]
        text = f"#!/bin/bash\n{container['command'][2]}"
    file.write_text(text)
    check = ["shellcheck", "--severity", "warning", file]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("site", ["slurm", "mpirun", "torchrun"])
def test_a_machine_without_the_directory_is_named_with_it(site: str) -> None:
    job = dataclasses.replace(big_job(site), directory=Path("/nowhere/it's"))
    script = 'refuse() { echo "$1"; exit 78; }\n' + preamble(job)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    said = f"cannot enter /nowhere/it's on {socket.gethostname()}: rerun the command in"
    assert done.returncode == 78 and done.stdout.startswith(said)


def test_seconds_to_save_is_one_setting_for_all_launchers() -> None:
    for site in SITES:
        job = big_job(site)
        hurry = dataclasses.replace(job.cluster, seconds_to_save=77)
        said = records.text(dataclasses.replace(job, cluster=hurry))
        for line in {
            "slurm": ["--signal=B:USR1@77"],
            "slurm-pyxis": ["--signal=B:USR1@77"],
            "torchrun": ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT=77"],
            "kubernetes": ["PeriodSeconds: 77", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=77"],
        }.get(site, []):
            assert line in said


def test_what_a_site_requests_of_slurm_is_an_option_of_sbatch() -> None:
    job = big_job("slurm")
    same = ("partition", "account", "qos", "constraint", "reservation")
    asked = {**dict(zip(same, "abcde", strict=True)), "time": "2:00:00", "memory": "9G"}
    slurm = dataclasses.replace(job.cluster.slurm, cpus_per_task=7, **asked)
    cluster = dataclasses.replace(job.cluster, slurm=slurm)
    lines = records.text(dataclasses.replace(job, cluster=cluster)).splitlines()
    wanted = {**asked, "mem": asked.pop("memory"), "cpus-per-task": "7"}
    del wanted["memory"]
    assert {f"#SBATCH --{name}={value}" for name, value in wanted.items()} <= {*lines}
    # Slurm takes no option after the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


def test_the_manifest_is_what_kubeflow_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = yaml.safe_load(records.text(big_job("kubernetes")))
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
        spec = role["template"]["spec"]
        (container,) = spec["containers"]
        assert container["name"] == "pytorch"  # Kubeflow looks for that name
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        script = container["command"][2]
        subprocess.run(["bash", "-n", "-c", script], check=True)


@pytest.mark.parametrize("site", ["kubernetes", "kubernetes-trainer"])
def test_a_name_that_is_a_word_of_yaml_stays_a_name(site: str) -> None:
    job = dataclasses.replace(big_job(site), run=Path("/runs/on"))
    assert {each["metadata"]["name"] for each in yaml.safe_load_all(records.text(job))} == {"on"}


def test_a_train_job_has_a_runtime_with_the_pods_of_a_pytorch_job() -> None:
    """The TrainJob of Kubeflow Trainer can only patch the pods of a runtime."""
    text = records.text(big_job("kubernetes-trainer"))
    runtime, job = yaml.safe_load_all(text)
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == "imagenet64"
    assert job["spec"]["trainer"] == {"numNodes": 64, "numProcPerNode": 8}
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 64, "torch": {}}
    spec, other = pod(text), pod(records.text(big_job("kubernetes")))
    assert spec["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert spec["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    (ours,), (theirs,) = spec["containers"], other["containers"]
    limits = ours["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": "8", "rdma/hca": "8", "memory": "800Gi"}
    assert ours["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    script = ours["command"][2]
    assert script.replace("$PET_NODE_RANK", "$RANK").replace("$PET_", "$") == theirs["command"][2]


def test_lines_and_quotes_reach_pods_as_they_are() -> None:
    job = big_job("kubernetes")
    lines = ('for x in 1 2; do\n  echo "$x"\ndone', "export A='two\n  lines'")
    odd = {"MESSAGE": 'a "b"\n  c: \\ \u00e9\t{d}'}
    site = dataclasses.replace(job.cluster, setup=lines, environment=odd)
    directory = Path('/runs/it\'s 100% "new"')
    job = dataclasses.replace(job, cluster=site, directory=directory)
    (container,) = pod(records.text(job))["containers"]
    assert {"name": "MESSAGE", "value": odd["MESSAGE"]} in container["env"]
    assert container["workingDir"] == str(directory)
    setup = container["command"][2].partition("export TORCH_ELASTIC")[0]
    show = f"{setup}\nprintf '%s' \"$A\""
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n2\ntwo\n  lines"


@pytest.mark.parametrize(
    ("site", "port"), [("deepspeed", "--master_port {}"), ("torchrun", "--rdzv-endpoint=n1:{}")]
)
def test_two_runs_on_the_same_hosts_meet_at_ports_of_their_own(site: str, port: str) -> None:
    job = big_job(site)
    other = dataclasses.replace(job, run=Path("/runs/other"))
    fixed = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, port=29511))
    assert job.port != other.port and fixed.port == 29511
    for each in (job, other, fixed):
        assert f"{port.format(each.port)} " in records.text(each)


def test_a_run_on_cpus_requests_no_gpus_and_says_so_to_its_ranks() -> None:
    job = big_job("slurm")
    text = records.text(
        dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, cpu=True))
    )
    assert "#SBATCH --gres" not in text
    assert text.count("--gpus 0 ") == 2 and "export CUDA_VISIBLE_DEVICES=''" in text
    assert records.text(job).count("--gpus 8 ") == 2


def test_a_sweep_is_one_array_with_a_limit() -> None:
    job = big_job("slurm")
    jobs = [dataclasses.replace(job, run=Path(f"/runs/{name}")) for name in ("a", "b", "c")]
    text = array_text(jobs, at_most=2)
    assert "#SBATCH --array=0-2%2\n" in text
    assert all(f"  /runs/{name}/launch/job.sh\n" in text for name in ("a", "b", "c"))


@pytest.mark.parametrize(
    ("gres", "flag", "expected"),
    [
        ("gpu", "gres", "--gres=gpu:8"),
        ("gpu:h100", "gres", "--gres=gpu:h100:8"),
        ("gpu", "gpus-per-node", "--gpus-per-node=8"),
        ("gpu:h100", "gpus-per-node", "--gpus-per-node=h100:8"),
        ("gpu:h100", "gpus-per-task", "--gpus-per-task=h100:1"),
        ("none", "gres", None),
    ],
)
def test_a_site_names_the_option_that_requests_gpus(
    gres: str, flag: Any, expected: str | None
) -> None:
    job = big_job("slurm")
    options = dataclasses.replace(job.cluster.slurm, gres=gres, gpus_flag=flag)
    site = dataclasses.replace(job.cluster, slurm=options)
    text = records.text(dataclasses.replace(job, cluster=site))
    said = [line for line in text.splitlines() if "gpu" in line and "partition" not in line]
    assert [f"#SBATCH {expected}"] * bool(expected) == [s for s in said if s.startswith("#SBATCH")]


def test_variables_of_an_image_do_not_replace_those_of_the_job() -> None:
    """pyxis#124: what an image sets, such as PYTHONPATH, counts inside, not what srun passes."""
    job = big_job("slurm-pyxis")
    (start,) = (s for s in records.text(job).split("attend ") if "trainer.train" in s)
    words = shlex.split(start.partition("\nstatus=")[0])
    inside = words[words.index("env") :]
    assert f"PYTHONPATH={job.code}" in inside[: inside.index("sh")]
    assert job.cluster.container is not None
    container = dataclasses.replace(job.cluster.container, kind="apptainer")
    site = dataclasses.replace(job.cluster, container=container)
    text = records.text(dataclasses.replace(job, cluster=site))
    assert f"{container.image} env NCCL_SOCKET_IFNAME=ib0 " in text


def test_mpich_starts_the_same_ranks() -> None:
    job = big_job("mpirun")
    text = records.text(
        dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, mpi="mpich"))
    )
    assert "mpiexec -n 512 -ppn 8 -hosts n1,n2," in text and " -genv I_MPI_PIN off bash " in text
    assert (
        "bash /runs/imagenet64/launch/job.sh rank && finish" in text
        and "export PYTHONSAFEPATH=1" in text
    )


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


def test_a_login_node_needs_neither_torch_nor_anything_else() -> None:
    """Without site-packages there is the standard library alone."""
    words = ["digits", "--run", "/runs/x", "--cluster", "launch/clusters/slurm.toml", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "launch", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=x\n")


if __name__ == "__main__":
    for file, text in map(record, SITES):
        file.write_text(text)
