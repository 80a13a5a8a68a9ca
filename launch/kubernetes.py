"""Kubernetes: a job as the manifest of a Kubeflow PyTorchJob, for `kubectl apply -f`."""

import re

from launch.cluster import Kubernetes, quoted
from launch.job import Job

_MANIFEST = """\
# {name}: {nodes} pods x {gpus} ranks. A pod that fails is started again and the run goes on.
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {name}
  namespace: {namespace}
spec:
  nprocPerNode: "{gpus}"
  runPolicy:
    backoffLimit: {restarts}
    cleanPodPolicy: Running
  pytorchReplicaSpecs:
{replicas}"""

_REPLICAS = """\
    {role}:
      replicas: {count}
      restartPolicy: OnFailure
      template:
        spec:
          # From TERM to KILL: the ranks save in it.
          terminationGracePeriodSeconds: {grace}
          containers:
            - name: pytorch
              image: {image}
              workingDir: {directory}
              env:
{env}
              command:
                - bash
                - -c
                - |
{script}
              resources:
                limits:
                  nvidia.com/gpu: "{gpus}"
              volumeMounts:
                - name: runs
                  mountPath: {mount}
                - name: shared-memory
                  mountPath: /dev/shm
          volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: {claim}
            - name: shared-memory
              emptyDir:
                medium: Memory
"""


def manifest(job: Job) -> str:
    """The manifest, as YAML.

    Raises:
        ValueError: the run's name is none that Kubernetes takes, or the run or the shards are not
            on the volume.
    """
    site = job.cluster.kubernetes
    assert site is not None
    name = job.name.lower().replace("_", "-").replace(".", "-").strip("-")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", name):
        raise ValueError(
            f"--run {job.run}: its last part names the job; Kubernetes takes at most 50 letters, "
            "digits and -, beginning with a letter"
        )
    if not job.run.is_relative_to(site.mount):
        raise ValueError(
            f"--run {job.run} is not below kubernetes.mount = {site.mount!r}: the pods see no "
            "other directory; put the run there"
        )
    if (
        job.shards
        and not job.shards.startswith("/")
        and not job.directory.is_relative_to(site.mount)
    ):
        raise ValueError(
            f"data.shards = {job.shards!r} is relative to {job.directory}, which the pods do not "
            f"see: put the shards below {site.mount} and --set their whole path"
        )
    roles = {"Master": 1, "Worker": job.nodes - 1}
    replicas = (_replicas(job, site, role, count) for role, count in roles.items() if count)
    return _MANIFEST.format(
        name=name, nodes=job.nodes, gpus=job.gpus_per_node, namespace=_text(site.namespace),
        restarts=site.restarts, replicas="".join(replicas),
    )  # fmt: skip


def _replicas(job: Job, site: Kubernetes, role: str, count: int) -> str:
    env = (
        f"                - name: {name}\n                  value: {_text(value)}"
        for name, value in job.environment.items()
    )
    return _REPLICAS.format(
        role=role, count=count, image=_text(site.image), directory=_text(str(job.directory)),
        env="\n".join(env), script="\n".join(f"{' ' * 18}{line}" for line in _script(job)),
        gpus=job.gpus_per_node, mount=_text(site.mount), claim=_text(site.claim),
        grace=job.cluster.slurm.seconds_to_save,
    )  # fmt: skip


def _script(job: Job) -> list[str]:
    """Kubeflow tells every pod its number and where they meet."""
    return [
        *job.cluster.setup,
        # From TERM to KILL, as for the pod.
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={job.cluster.slurm.seconds_to_save}",
        quoted(["exec", job.cluster.python, "-m", "torch.distributed.run"]) + " \\",
        f"  --nnodes={job.nodes} --nproc-per-node={job.gpus_per_node} --node-rank=$RANK \\",
        "  --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT \\",
        f"  -m -- {quoted(job.training[1:])}",
    ]


def _text(value: str) -> str:
    """A double-quoted YAML string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
