"""Process 1 of a test machine: mounts, network and daemons, then reaping until the power is cut.

Started as `python -S -m tests.support.machine SETTINGS` in new namespaces; see `cluster`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def main(settings: dict) -> None:
    """Become the machine."""
    sys.stdin.readline()  # the other end of the network cable is plugged in now
    socket.sethostname(settings["name"])
    home = Path(settings["home"])
    _mount(settings, home=home)
    _connect(settings, home=home)
    _start_daemons(settings, home=home)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


def _mount(settings: dict, *, home: Path) -> None:
    """The machine's own /tmp, /run and /dev/shm; the shared directories stay visible below /tmp."""
    for file in ("/etc/hosts", "/etc/nsswitch.conf", "/etc/ssh"):
        _run("mount", "--bind", home / "etc" / Path(file).name, file)
    for place in ("/run", "/dev/shm"):
        _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", place)
    own = home / f"tmp.{settings['name']}"
    own.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", own)
    for shared in settings["shared"]:
        inside = own / Path(shared).relative_to("/tmp")
        inside.mkdir(parents=True)
        _run("mount", "--bind", shared, inside)
    _run("mount", "--rbind", own, "/tmp")
    os.chdir("/")
    _run(*settings["disk"])
    Path("/run/sshd").mkdir(mode=0o755)


def _connect(settings: dict, *, home: Path) -> None:
    """The network: neighbours are fixed, so that a lost one is silence and not an error."""
    name, peers = settings["name"], settings["peers"]
    _run("ip", "addr", "add", f"{peers[name][0]}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run("ip", "link", "set", device, "up")
    for peer, (address, mac) in peers.items():
        if peer != name:
            fixed = ["lladdr", mac, "dev", "eth0", "nud", "permanent"]
            _run("ip", "neigh", "replace", address, *fixed)


def _start_daemons(settings: dict, *, home: Path) -> None:
    name, env = settings["name"], settings["environment"]

    def start(*command: object) -> None:
        log = (home / "log" / f"{Path(str(command[0])).name}.{name}").open("ab")
        subprocess.Popen(
            [str(word) for word in command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    socket_file = home / "munge.sock"
    start("/usr/sbin/sshd", "-D", "-e")
    if name == "ctl":
        keys = [f"--key-file={home}/munge.key", f"--seed-file={home}/munged.seed"]
        places = [f"--socket={socket_file}", f"--pid-file={home}/munged.pid"]
        log = f"--log-file={home}/log/munged.log"
        start("/usr/sbin/munged", "-F", "--force", *keys, *places, log)
    while not socket_file.exists():
        time.sleep(0.02)
    start("/usr/sbin/slurmctld" if name == "ctl" else "/usr/sbin/slurmd", "-D")


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
