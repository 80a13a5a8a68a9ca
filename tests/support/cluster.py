"""A real Slurm and ssh cluster of a few "machines" on one Linux box, for the tests.

Each machine is a process tree in network, UTS, mount, IPC and PID namespaces of its own: it has
its own host name, address, /tmp, /run, /dev/shm and sshd. `ctl` is the login node and runs munged
and slurmctld; n1, n2 ... run slurmd with two pretended GPUs. They share the cluster's directory,
the checkout and its Python, and one key opens all of them; `disk` they share as over NFS: for half
a minute a machine holds what it knew of a name, so that what another has made or removed does not
show. A machine can be cut off from the network, powered off and booted. Needs root, the Debian
packages in `PACKAGES`, and leave to make namespaces; without FUSE the disk has no such ways.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import etc

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "slurmctld slurmd slurm-client munge openssh-server pdsh iputils-ping iproute2 tmux bindfs"
)
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "sshd", "pdsh", "ip", "tmux", "bindfs")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BRIDGE = "brtest"
GPUS = 2
# Options of the disk's mount: what a machine knows of a name, also that there is none, it holds for
# half a minute. What a file holds it asks afresh, as NFS does when a file is opened.
_AS_NFS = ("--enable-lock-forwarding", "--multithreaded", "-o")
_AS_NFS += ("entry_timeout=30,negative_timeout=30,attr_timeout=0",)
# Seconds after which what is waited for counts as hung, on the slowest machine.
LIMIT = 900.0


def missing() -> str | None:
    """What keeps the cluster from running here, and what to install; None when nothing does."""
    programs = [name for name in _PROGRAMS if shutil.which(name, path=PATH) is None]
    if programs:
        return f"no {', '.join(programs)}: apt-get install -y {PACKAGES}"
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "set", "lo", "up"]
    if os.geteuid() or subprocess.run(probe, capture_output=True).returncode:
        return "the test cluster needs root, and leave to make namespaces"
    return None


def wait_until(holds: Callable[[], object], what: str, *, limit: float = LIMIT) -> None:
    """Wait until `holds()` is true; an error names `what` was waited for."""
    end = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < end, f"waited {limit:g} s in vain: {what}"
        time.sleep(0.1)


def below_tmp(places: Iterable[str | Path]) -> list[str]:
    """The directories among `places` that a /tmp of its own would hide, none inside of another."""
    absolute = [Path(os.path.abspath(place)) for place in places]
    found: list[Path] = []
    for place in sorted({*absolute, *(place.resolve() for place in absolute)}):
        below = Path("/tmp") in place.parents and place.is_dir()
        if below and not any(outer in place.parents for outer in found):
            found.append(place)
    return [str(place) for place in found]


@dataclass
class Cluster:
    """The machines; use as a context manager."""

    home: Path
    nodes: int = 2
    _machines: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    @property
    def disk(self) -> Path:
        """The shared disk of the runs."""
        return self.home / "disk"

    def __enter__(self) -> "Cluster":
        # Its network has fixed names: another cluster on this box has to end first.
        self._alone = (Path(tempfile.gettempdir()) / "test-cluster.lock").open("w")
        fcntl.flock(self._alone, fcntl.LOCK_EX)
        self.disk.mkdir(parents=True)
        self.disk_mount = ["bindfs", *_AS_NFS, str(self.disk), str(self.disk)]
        tried = ["unshare", "--mount", "sh", "-c", '"$@" && umount "$0"', self.disk]
        if subprocess.run([*tried, *self.disk_mount], capture_output=True).returncode:
            warnings.warn("no FUSE: the machines share their disk without NFS's ways", stacklevel=1)
            self.disk_mount = ["true"]
        etc.write(self.home, peers=self._peers(), gpus=GPUS, path=PATH)
        for left in (_BRIDGE, *map(_cable, ("ctl", *self.names))):  # by tests that were killed
            subprocess.run(["ip", "link", "del", left], capture_output=True)
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", "10.78.0.254/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        try:
            for name in ("ctl", *self.names):
                self.boot(name)
            wait_until(self.idle, f"idle nodes; see {self.home}/log")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._machines):
            self.power_off(name)
        _ip("link", "del", _BRIDGE)
        self._alone.close()

    def idle(self) -> bool:
        """Whether every node is up and has nothing to do; an error says what ended a machine."""
        for name, machine in self._machines.items():
            log = self.home / "log" / f"init.{name}"
            assert machine.poll() is None, f"machine {name} has ended:\n{log.read_text()}"
        states = self.run("ctl", "sinfo", "-h", "-p", "main", "-N", "-o", "%t", check=False)
        return states.split() == ["idle"] * self.nodes

    def boot(self, name: str) -> None:
        """Power a machine on, and plug its network in."""
        # When the tests are killed, so are the machines.
        bound = ["setpriv", "--pdeathsig", "KILL"]
        spaces = ["--net", "--uts", "--mount", "--ipc", "--pid"]
        apart = ["unshare", *spaces, "--fork", "--kill-child", "--mount-proc"]
        program = [sys.executable, "-S", "-m", "tests.support.machine", self._settings(name)]
        machine = subprocess.Popen(
            [*bound, *apart, *program],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            text=True,
            stdout=(self.home / "log" / f"init.{name}").open("ab"),
            stderr=subprocess.STDOUT,
        )
        self._machines[name] = machine
        wait_until(lambda: _is_apart(self._pid(name)), f"{name} in its namespaces")
        inside = ["name", "eth0", "address", self._peers()[name][1], "netns", str(self._pid(name))]
        _ip("link", "add", _cable(name), "type", "veth", "peer", *inside)
        _ip("link", "set", _cable(name), "master", _BRIDGE, "up")
        assert machine.stdin is not None
        machine.stdin.write("go\n")
        machine.stdin.close()

    def power_off(self, name: str) -> None:
        """Pull the plug: everything on the machine is gone, and says no goodbye."""
        machine = self._machines.pop(name)
        if machine.poll() is None:  # else it has ended by itself, and its cable with it
            self.cut(name)
        if (pid := self._pid_of(machine)) is not None:
            os.kill(pid, signal.SIGKILL)
        machine.kill()
        machine.wait()
        subprocess.run(["ip", "link", "del", _cable(name)], capture_output=True)

    def cut(self, name: str) -> None:
        """Drop all packets of a machine, silently."""
        subprocess.run(["bridge", "link", "set", "dev", _cable(name), "state", "0"], check=True)

    def heal(self, name: str) -> None:
        subprocess.run(["bridge", "link", "set", "dev", _cable(name), "state", "3"], check=True)

    def on(self, name: str, *command: object) -> list[str]:
        """The command line, from here, of a command on a machine."""
        spaces = ["-n", "-u", "-m", "-i", "-p", f"--wdns={ROOT}"]
        return ["nsenter", "-t", str(self._pid(name)), *spaces, "--", *map(str, command)]

    def run(self, name: str, *command: object, check: bool = True) -> str:
        """Run a command on a machine, in the checkout; what it printed to stdout and stderr."""
        done = subprocess.run(
            self.on(name, *command),
            env=self.environment,
            text=True,
            timeout=LIMIT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, name: str, *command: object) -> "subprocess.Popen[str]":
        """Start a command on a machine, in the checkout."""
        return subprocess.Popen(
            self.on(name, *command),
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell on a machine has."""
        return {
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
            "PATH": f"{Path(sys.executable).parent}:{PATH}",
            "SLURM_CONF": f"{self.home}/slurm.conf",
            "OMP_NUM_THREADS": "1",
            # DeepSpeed compiles a small op for the CPU: once, for all machines.
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")
            or str(Path.home() / ".cache/torch_extensions"),
        }

    def pids(self, name: str, words: Sequence[str]) -> list[int]:
        """The processes on a machine, as seen from here, whose command lines hold all `words`."""
        space = os.readlink(f"/proc/{self._pid(name)}/ns/pid")
        return [pid for pid in _processes(space) if all(w in _command_line(pid) for w in words)]

    def _settings(self, name: str) -> str:
        environment = {**self.environment, "PATH": PATH}
        places = [self.home, ROOT, sys.prefix, sys.base_prefix, *sys.path]
        shared = below_tmp([*places, environment["TORCH_EXTENSIONS_DIR"]])
        machine = {"name": name, "home": str(self.home), "shared": shared}
        machine |= {"peers": self._peers(), "environment": environment}
        return json.dumps({**machine, "disk": self.disk_mount})

    def _peers(self) -> dict[str, tuple[str, str]]:
        """Address and hardware address of every machine."""
        numbers = {"ctl": 10, **{name: 10 + int(name[1:]) for name in self.names}}
        return {k: (f"10.78.0.{n}", f"02:00:00:00:00:{n:02x}") for k, n in numbers.items()}

    def _pid(self, name: str) -> int:
        pid = self._pid_of(self._machines[name])
        return -1 if pid is None else pid

    @staticmethod
    def _pid_of(machine: subprocess.Popen) -> int | None:
        """The machine's process 1, as seen from here."""
        try:
            children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None


def _is_apart(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    except OSError:
        return False


def _processes(space: str) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/pid") == space:
                found.append(int(entry))
        except OSError:
            continue  # it ended meanwhile
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _cable(name: str) -> str:
    return f"vtest{name}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
