"""Several hosts on this machine: network, PID, mount and host-name namespaces, an sshd in each.

Needs root, `ip`, `nsenter`, `unshare`, `sshd`, `ssh-keygen` and, for what is launched over ssh,
`pdsh`. Debian: apt-get install openssh-server pdsh iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from est_ds.run.metrics import read_metrics

NEEDED = ("ip", "nsenter", "unshare", "sshd", "ssh-keygen", "pdsh")
SUBNET = "10.77.0"
# Of the watchdog of a `Job`.
LIMIT_S = 15
BOOT = """
hostname {name}
mount --bind {folder}/{name}.hosts /etc/hosts
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
mkdir -p ~root/.ssh
mount -t tmpfs tmpfs ~root/.ssh
cp {folder}/ssh_config ~root/.ssh/config
chmod 700 ~root/.ssh && chmod 600 ~root/.ssh/config
exec {sshd} -D -e -f {folder}/{name}.sshd
"""
SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
SetEnv {environment}
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectTimeout 5
"""


def why_not() -> str | None:
    """Why there can be no hosts on this machine; None if there can."""
    if os.geteuid() != 0:
        return "needs root: hosts are namespaces"
    missing = [tool for tool in NEEDED if not shutil.which(tool, path=_path())]
    if missing:
        return f"needs {', '.join(missing)} (Debian: openssh-server pdsh iproute2 util-linux)"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One host; `init` is its process 1, whose death takes all others with it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.folder = number, folder
        self.name, self.address = f"node{number}", f"{SUBNET}.{10 + number}"
        self.namespace = f"est-{os.getpid()}-{number}"
        self.init: int | None = None

    def start(self, switch: str, environment: dict[str, str]) -> None:
        port = f"e{os.getpid() % 10**7}p{self.number}"
        _ip("netns", "add", self.namespace)
        pair = f"link add eth0 netns {self.namespace} type veth peer name {port} netns {switch}"
        _ip(*pair.split())
        _ip("-n", switch, "link", "set", port, "master", "br0", "up")
        self.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "lo", "up")
        self.ip("link", "set", "eth0", "up")
        shown = " ".join(f'{name}="{value}"' for name, value in environment.items())
        values = {"address": self.address, "folder": self.folder, "environment": shown}
        (self.folder / f"{self.name}.sshd").write_text(SSHD.format(**values))
        sshd = shutil.which("sshd", path=_path())
        boot = BOOT.format(name=self.name, folder=self.folder, sshd=sshd)
        log = (self.folder / f"{self.name}.log").open("w")
        inside = (
            f"nsenter --net=/run/netns/{self.namespace} unshare --mount --uts --ipc --pid --fork "
            "--kill-child --mount-proc sh -ec"
        )
        self._keeper = subprocess.Popen(
            [*inside.split(), boot],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children")
        wait_until(lambda: children.read_text().split(), 10)
        self.init = int(children.read_text().split()[0])

    def ip(self, *arguments: str) -> None:
        _ip("-n", self.namespace, *arguments)

    def tc(self, *arguments: str) -> None:
        """Shapes its link: `tc qdisc ARGUMENTS`."""
        subprocess.run(["tc", "-n", self.namespace, "qdisc", *arguments], check=True)

    def command(self, *arguments: str, cwd: Path) -> list[str]:
        """A command line that runs in the host."""
        enter = ("nsenter", "-t", str(self.init), "-n", "-m", "-u", "-i", "-p", f"--wd={cwd}")
        return [*enter, *map(str, arguments)]

    def ranks(self) -> list[int]:
        """Ids of its training processes, in the order of their ranks."""
        return self.find("-u -m est_ds.cli train")

    def find(self, pattern: str) -> list[int]:
        """Ids, as this machine counts them, of the host's processes with this command line."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        command = ["pgrep", "-f", "--", pattern]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
        return [pid for pid in map(int, found) if _pid_namespace(pid) == namespace]

    def stop(self) -> None:
        """As a crash: every process of the host is gone."""
        if self.init is not None:
            self._keeper.kill()  # and with it, by --kill-child, process 1
            self._keeper.wait()
            self.init = None


@dataclass(frozen=True)
class Started:
    """A command on a host; standard output and error are in `log`."""

    process: subprocess.Popen
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self, limit_s: float) -> int:
        """Its exit code.

        Raises:
            AssertionError: it still runs; with what it said.
        """
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit_s} s:\n{self.text}") from None

    def notify(self, number: signal.Signals) -> None:
        """Signals the command itself; the process is nsenter, which entered the host for it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        signal_all([int(pid) for pid in children.read_text().split()], number)


class Cluster:
    """Hosts on one switch, to be used in a `with`; each reaches the others by ssh."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folder, self.switch = folder, f"est-{os.getpid()}-sw"
        self.hosts = [Host(number, folder) for number in range(size)]
        self.environment = _environment()

    def __enter__(self) -> Cluster:
        folder = self.folder
        for name in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
            subprocess.run(command, check=True)
        (folder / "ssh_config").write_text(SSH.format(folder=folder))
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        for host in self.hosts:  # its own name on the loopback, as Debian and Ubuntu have it
            own = f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n"
            (folder / f"{host.name}.hosts").write_text(own + names)
        try:
            _ip("netns", "add", self.switch)
            _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "br0", "up")
            for host in self.hosts:
                host.start(self.switch, self.environment)
            for host in self.hosts:
                wait_until(lambda: self._answers(host), 15)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            host.stop()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True)

    def hostfile(self, slots: int = 2, *names: str) -> Path:
        file = self.folder / "hostfile"
        names = names or tuple(host.name for host in self.hosts)
        file.write_text("".join(f"{name} slots={slots}\n" for name in names))
        return file

    def start(self, *command: str, host: int = 0, **environment: str) -> Started:
        """Starts a command on a host."""
        log = self.folder / f"out-{time.monotonic_ns()}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                self.hosts[host].command(*command, cwd=self.folder),
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        return Started(process, log)

    def est_ds(self, *arguments: str, host: int = 0, **environment: str) -> Started:
        """Starts `est-ds ARGUMENTS` on a host."""
        return self.start(sys.executable, "-m", "est_ds.cli", *arguments, host=host, **environment)

    def _answers(self, host: Host) -> bool:
        command = self.hosts[0].command("ssh", host.name, "true", cwd=self.folder)
        return subprocess.run(command, capture_output=True).returncode == 0


class Job:
    """A run of the tiny model on a cluster, which goes on until it is ended."""

    def __init__(self, cluster: Cluster, tiny_run: Path, run_dir: Path) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        self.arguments = ["train", str(tiny_run), f"run_dir={run_dir}"]
        self.arguments.append(f"watchdog.limit_s={LIMIT_S}")
        self.endless = [*self.arguments, "steps=5000", "method.name=full", "checkpoint.every=1000"]

    def begin(self, *more: str, slots: int = 2):
        """Starts it over ssh, and waits until it trains."""
        hostfile = self.cluster.hostfile(slots)
        started = self.cluster.est_ds(*self.endless, "--hostfile", str(hostfile), *more)
        self.wait_for_steps(5, started)
        return started

    def wait_for_steps(self, steps: int, started) -> None:
        wait_until(lambda: started.process.poll() is not None or self.steps() >= steps, 180)
        assert started.process.poll() is None, started.text

    def steps(self) -> int:
        return len(read_metrics(self.run_dir)[0])

    def left(self) -> list[int]:
        """Processes of the run on all hosts."""
        return [pid for h in self.cluster.hosts if h.init for pid in h.find("est_ds.cli train")]


def wait_until(true, limit_s: float, every_s: float = 0.1) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"not so within {limit_s} s"
        time.sleep(every_s)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def kill_all(started: subprocess.Popen, run_dir: Path) -> None:
    """SIGKILL to est-ds, its launcher and every rank, within about a millisecond."""
    family = []
    if started.poll() is None:
        est_ds = psutil.Process(started.pid)
        family = [est_ds, *est_ds.children(recursive=True)]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    started.wait()
    # One that was just being started ends by itself.
    while subprocess.run(["pgrep", "-f", f"run_dir={run_dir} "], capture_output=True).stdout:
        time.sleep(0.1)


def ranks_of(starter: int) -> list[int]:
    """The training processes that an `est-ds` has started."""
    command = ["pgrep", "-f", "--", "-u -m est_ds.cli"]
    found = []
    for pid in subprocess.run(command, capture_output=True, text=True).stdout.split():
        with suppress(OSError):  # it has just ended
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if f"EST_DS_STARTER={starter}\0".encode() in environment:
                found.append(int(pid))
    return found


def _environment() -> dict[str, str]:
    """Of a login on a host: what ssh gives, and no more."""
    passed = {name: os.environ[name] for name in ("PYTHONPATH", "HOME") if name in os.environ}
    return {
        **passed,
        "PATH": f"{Path(sys.executable).parent}:{_path()}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def _path() -> str:
    return "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


def _pid_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
