"""Why Slurm does not start a job of its queue, or does not take a job, and the way out."""

import re

# Slurm starts such a job once somebody releases it.
_HELD = r"[Hh]eld|Hold|HOLD"
# What the job asks for is outside of a limit or a rule of the site's: no other job's end helps.
_OUTSIDE = (
    r"PartitionTimeLimit|PartitionConfig|MaxMemPerLimit|BadConstraints|Max\w+Per(Job|Node)|QOSMin"
    r"|InvalidAccount|InvalidQOS|NotAllowed|not permitted to use this partition"
)
# The budget of an account or a QOS, which jobs use up. With AccountingStorageEnforce=safe a job
# starts where the rest covers its whole time limit.
_SPENT = r"Grp\w*(?<!Run)(Minutes|Wall)"

# What helps where sbatch says this.
_CORRECT = "correct [slurm] in the cluster file:"
_REFUSALS = {
    "SubmitJob": "rerun this when others of your jobs have ended",
    "nvalid account|nvalid qos": f"{_CORRECT} `sacctmgr show associations user=$USER "
    "format=account,partition,qos%60` lists yours",
    "accounting/QOS policy": f"{_CORRECT} `sacctmgr show qos` and `scontrol show partition` show "
    "the limits",
    "reservation is invalid": f"{_CORRECT} `scontrol show reservation` lists them",
    "nvalid partition": f"{_CORRECT} `sinfo -s` lists the partitions",
    "time limit is invalid|node configuration|Memory|nvalid feature|node count": f"{_CORRECT} "
    "`sinfo -o '%P %l %D %c %m %G %f'` lists time limits, nodes, CPUs, memory, GPUs and features",
}


def with_reason(state: str, reason: str, *, partitions: str) -> str:
    """The state of a job in words; of several partitions, Slurm's reason is that of one."""
    one = f" in one of {partitions}" if "," in partitions and re.search(_OUTSIDE, reason) else ""
    return f"{state} ({reason}{one})"


def way_on(state: str, *, release: str, stop: str) -> str | None:
    """What to do with a job of this `state` that does not start by waiting; None where it does.

    `release` and `stop` are commands that do so with it.
    """
    if re.search(_HELD, state):
        return f"release it with `{release}`, or stop it with `{stop}`"
    if re.search(_OUTSIDE, state) and " in one of " not in state:
        change = "change [slurm] in the cluster file and rerun the same command"
        return f"waiting does not start it: stop it with `{stop}`, {change}"
    if "PartitionNodeLimit" in state:  # Slurm may say so of nodes that are down
        return f"wait for it, or, where its partition allows fewer nodes, stop it with `{stop}`"
    if re.search(_SPENT, state):
        other = f"stop it with `{stop}` and use a shorter time, another account or another qos"
        return f"this budget does not cover it: wait until the site raises or resets it, or {other}"
    return None


def with_way_out(said: str) -> str:
    """What sbatch `said` of a job that it refuses, and what helps."""
    found = next((way for words, way in _REFUSALS.items() if re.search(words, said)), None)
    return f"{said}; {found}" if found else said
