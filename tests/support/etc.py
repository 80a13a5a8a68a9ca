"""The configuration files of the test cluster: Slurm's, sshd's and munge's, hosts and keys."""

import os
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

_SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Without cred_expire a requeued job waits two minutes for its old credential to expire.
AuthInfo=socket={home}/munge.sock,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd.%n.log
MailProg=/bin/true
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=10
BatchStartTimeout=20
KillWait=30
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 \
Gres=gpu:{gpus} State=UNKNOWN
{nodes}
NodeName=big[01-64] CPUs=96 Sockets=2 CoresPerSocket=48 ThreadsPerCore=1 RealMemory=1000000 \
Gres=gpu:8 Feature=h100 State=CLOUD
PartitionName=DEFAULT Nodes={names} MaxTime=INFINITE State=UP DefMemPerCPU=500
PartitionName=main Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=cancelled PriorityTier=1 PreemptMode=CANCEL
PartitionName=high PriorityTier=10 PreemptMode=OFF
# Machines of a cloud that are never started: what would run on 512 GPUs can be asked.
PartitionName=gpu Nodes=big[01-64]
PartitionName=batch Nodes=big[01-64]
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=600
SuspendExcNodes={names}
"""
_SSHD_CONFIG = """\
HostKey /etc/ssh/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
UseDNS no
StrictModes no
MaxStartups 100
AuthorizedKeysFile /etc/ssh/id.pub
SetEnv PATH={path} SLURM_CONF={home}/slurm.conf
"""
_SSH_CONFIG = """\
Host *
  IdentityFile /etc/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 60
"""


def write(home: Path, *, peers: Mapping[str, tuple[str, str]], gpus: int, path: str) -> None:
    """Write all of them below `home`.

    `peers` has every machine's address and hardware address; `path` is a user's PATH on them.
    """
    for directory in ("log", "state", "etc/ssh/sshd_config.d", "etc/ssh/ssh_config.d"):
        (home / directory).mkdir(parents=True, exist_ok=True)
    for file, text in _texts(home, peers=peers, gpus=gpus, path=path).items():
        (home / file).write_text(text)
    for key in ("id", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
        subprocess.run([*command, home / "etc/ssh" / key], check=True)
    key = home / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for number in range(gpus):  # a pretended GPU is a device file like /dev/null
        os.mknod(home / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def _texts(
    home: Path, *, peers: Mapping[str, tuple[str, str]], gpus: int, path: str
) -> dict[str, str]:
    hosts = [f"{address} {name}" for name, (address, _) in peers.items()]
    names = [name for name in peers if name != "ctl"]
    nodes = "\n".join(f"NodeName={name} NodeAddr={peers[name][0]}" for name in names)
    slurm = _SLURM_CONF.format(home=home, gpus=gpus, nodes=nodes, names=",".join(names))
    return {
        "etc/hosts": "127.0.0.1 localhost\n" + "\n".join(hosts) + "\n",
        # A name server that cannot be reached would cost seconds at every reverse look-up.
        "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
        "etc/ssh/sshd_config": _SSHD_CONFIG.format(home=home, path=path),
        "etc/ssh/ssh_config": _SSH_CONFIG,
        "slurm.conf": slurm,
        "gres.conf": f"AutoDetect=off\nName=gpu File={home}/gpu[0-{gpus - 1}]\n",
    }
