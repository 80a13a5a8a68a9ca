"""Kubernetes: a job as the manifest of a Kubeflow PyTorchJob, for `kubectl apply -f`."""

import json
import re
import textwrap

from data.exits import REFUSED
from launch.cluster import Kubernetes
from launch.job import Job, setup_lines
from launch.shell import fill, quoted
from trainer.adm.config import check

# The indentation of the script, a block of YAML.
_INDENT = " " * 18


def manifest(job: Job) -> str:
    """The manifest, as YAML.

    Raises:
        ValueError: Kubernetes does not accept the run's name, or the run or the shards are not on
            the volume.
    """
    site = job.cluster.kubernetes
    assert site is not None
    _check_volume(job, site)
    roles = {"Master": 1, "Worker": job.nodes - 1}
    return fill(
        "kubernetes.yaml",
        name=_pod_name(job),
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        namespace=_string(site.namespace),
        restarts=site.restarts,
        replicas="\n".join(_replicas(job, site, role, n) for role, n in roles.items() if n),
    )


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
    is_relative = job.shards is not None and not job.shards.startswith("/")
    seen = not is_relative or job.directory.is_relative_to(site.mount)
    whole = f"an absolute path: the pods do not have {job.directory}"
    check(seen, "data.shards", job.shards, whole)


def _replicas(job: Job, site: Kubernetes, role: str, count: int) -> str:
    env = (
        f"                - name: {name}\n                  value: {_string(value)}"
        for name, value in job.environment.items()
    )
    text = fill(
        "kubernetes-role.yaml",
        role=role,
        count=count,
        image=_string(site.image),
        directory=_string(str(job.directory)),
        env="\n".join(env),
        script=textwrap.indent("\n".join(_script(job)), _INDENT),
        gpus=job.gpus_per_node,
        mount=_string(site.mount),
        claim=_string(site.claim),
        grace=job.cluster.seconds_to_save,
    )
    return text.rstrip()


def _script(job: Job) -> list[str]:
    """Kubeflow sets each pod's RANK, and where the pods meet."""
    return [
        *(fill("kubernetes-setup.sh", refused=REFUSED).splitlines() if job.cluster.setup else ()),
        *setup_lines(job),
        # The same as the pod's grace period.
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={job.cluster.seconds_to_save}",
        quoted(["exec", job.cluster.python, "-m", "torch.distributed.run"]) + " \\",
        f"  --nnodes={job.nodes} --nproc-per-node={job.gpus_per_node} --node-rank=$RANK \\",
        "  --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT \\",
        f"  -m -- {quoted(job.rank_words[1:])}",
    ]


def _string(value: str) -> str:
    """A double-quoted YAML string, in JSON's notation."""
    return json.dumps(value, ensure_ascii=False)
