"""Kubernetes: a job as a manifest for `kubectl apply -f`.

It is a PyTorchJob of Kubeflow's training operator, or a TrainJob of Kubeflow Trainer with a runtime
of its own, which has the pod that a TrainJob itself can only patch.
"""

import json
import re
import textwrap

from data.exits import REFUSED
from launch.cluster import Kubernetes
from launch.job import Job, setup_lines
from launch.shell import fill, quoted
from trainer.adm.config import check

# Where the ranks of a pod find their number and their meeting place.
_VARIABLES = {
    "PyTorchJob": ("RANK", "MASTER_ADDR", "MASTER_PORT"),
    "TrainJob": ("PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
}


def manifest(job: Job) -> str:
    """The manifest, as YAML.

    Raises:
        ValueError: Kubernetes does not accept the run's name, or the run or the shards are not on
            the volume.
    """
    site = job.cluster.kubernetes
    assert site is not None
    _check_volume(job, site)
    facts: dict[str, object] = {
        "name": _pod_name(job),
        "nodes": job.nodes,
        "gpus": job.gpus_per_node,
        "namespace": _yaml(site.namespace),
        "restarts": site.restarts,
    }
    if site.kind == "TrainJob":
        pod = textwrap.indent(_pod(job, site, container="node"), " " * 18)
        return fill("kubernetes-trainjob.yaml", **facts, pod=pod) + "\n"
    pod = textwrap.indent(_pod(job, site, container="pytorch"), " " * 10)
    roles = {"Master": 1, "Worker": job.nodes - 1}
    replicas = [
        fill("kubernetes-role.yaml", role=role, count=count, pod=pod)
        for role, count in roles.items()
        if count
    ]
    return fill("kubernetes.yaml", **facts, replicas="\n".join(replicas)) + "\n"


def _pod_name(job: Job) -> str:
    name = job.name.lower().replace("_", "-").replace(".", "-").strip("-")
    accepted = re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", name) is not None
    expected = "a path whose last part, the job's name, has at most 50 letters, digits and -"
    check(accepted, "--run", str(job.run), f"{expected}, beginning with a letter")
    return name


def _check_volume(job: Job, site: Kubernetes) -> None:
    """Refuse directories that the pods do not have."""
    below = f"below kubernetes.mount = {site.mount!r}, the only directory that the pods share"
    check(job.run.is_relative_to(site.mount), "--run", str(job.run), below)
    seen = job.init is None or job.init.is_relative_to(site.mount)
    check(seen, "--init", str(job.init), below)
    is_relative = job.shards is not None and not job.shards.startswith("/")
    seen = not is_relative or job.directory.is_relative_to(site.mount)
    whole = f"an absolute path: the pods do not have {job.directory}"
    check(seen, "data.shards", job.shards, whole)


def _pod(job: Job, site: Kubernetes, *, container: str) -> str:
    """What a pod is made of, of either kind of job."""
    env = [
        f"      - name: {name}\n        value: {_yaml(value)}"
        for name, value in job.environment.items()
    ]
    gpus = {} if job.cluster.cpu else {"nvidia.com/gpu": str(job.gpus_per_node)}
    limits = {**gpus, **site.resources}
    # Memory that a network card reads itself must be locked.
    locks = {"capabilities": {"add": ["IPC_LOCK"]}} if any("rdma" in n for n in limits) else {}
    size = {"sizeLimit": site.shared_memory} if site.shared_memory else {}
    return fill(
        "kubernetes-pod.yaml",
        container=container,
        tolerations=_yaml([_toleration(text) for text in site.tolerations]),
        image=_yaml(site.image),
        directory=_yaml(str(job.directory)),
        security=_yaml(locks),
        env="\n".join(env),
        script=textwrap.indent("\n".join(_script(job, site)), " " * 8),
        limits=_yaml(limits),
        mount=_yaml(site.mount),
        memory=_yaml({"medium": "Memory", **size}),
        claim=_yaml(site.claim),
        grace=job.cluster.seconds_to_save,
    )


def _toleration(taint: str) -> dict[str, str]:
    """The toleration of a taint, in kubectl's notation: KEY, KEY:EFFECT or KEY=VALUE:EFFECT."""
    key, _, effect = taint.partition(":")
    key, _, value = key.partition("=")
    matches = {"operator": "Equal", "value": value} if value else {"operator": "Exists"}
    return {"key": key, **matches, **({"effect": effect} if effect else {})}


def _script(job: Job, site: Kubernetes) -> list[str]:
    """Kubeflow sets each pod's number, and where the pods meet."""
    rank, address, port = _VARIABLES[site.kind]
    return [
        *(fill("refuse.sh", refused=REFUSED).splitlines() if job.cluster.setup else ()),
        *setup_lines(job),
        # The same as the pod's grace period.
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={job.cluster.seconds_to_save}",
        quoted(["exec", job.cluster.python, "-m", "torch.distributed.run"]) + " \\",
        f"  --nnodes={job.nodes} --nproc-per-node={job.gpus_per_node} --node-rank=${rank} \\",
        f"  --master-addr=${address} --master-port=${port} \\",
        f"  -m -- {quoted(job.rank_words[1:])}",
    ]


def _yaml(value: object) -> str:
    """A value in JSON's notation, which YAML reads."""
    return json.dumps(value, ensure_ascii=False)
