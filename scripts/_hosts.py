"""Two hosts on one machine: two network namespaces, each with a name, an address and a mount of its own, and a link.

It needs root on Linux and `ip`. What is done to a host is what can happen to one: a process, all of them, or its link.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENTER = """
mount --make-rprivate / && mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/resolv.conf" /etc/resolv.conf &&
hostname "$2" && shift 2 && exec "$@"
"""
"""A host knows both by name, and asks nobody else: gloo looks up its own name, and a name server that is silent costs
20 s each time."""


class Host:
    """One of two hosts: 0 is the one that the other looks for."""

    def __init__(self, number: int):
        self.number = number
        self.name, self.card = f"frostline-{os.getpid()}-{number}", f"fl{os.getpid()}-{number}"[:15]

    def start(self, folder: Path, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        """A command on this host; what it says is added to `log`."""
        enter = ["ip", "netns", "exec", self.name, "unshare", "-m", "-u", "bash", "-c", ENTER, "-", str(folder)]
        with log.open("ab") as said:
            command = [*enter, self.name, *words]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": self.card}
            return subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def processes(self) -> dict[int, bytes]:
        """The processes on this host and the environment of each."""
        found = {}
        for pid in _ip("netns", "pids", self.name).split():
            with suppress(OSError):
                found[int(pid)] = Path(f"/proc/{pid}/environ").read_bytes()
        return found

    def kill_worker(self) -> int:
        """SIGKILL the process that trains, if there is one; how many there were."""
        return _kill(pid for pid, variables in self.processes().items() if b"\0RANK=" in variables)

    def kill(self) -> int:
        """SIGKILL everything on this host, until nothing is left."""
        killed = 0
        while left := self.processes():
            killed += _kill(iter(left))
        return killed

    def link(self, state: str) -> None:
        """Cut this host off (`down`), or connect it again (`up`)."""
        _ip("-n", self.name, "link", "set", self.card, state)


def refusal() -> str:
    """Why there can be no two hosts here, or nothing."""
    if shutil.which("ip") is None:
        return "two hosts are two network namespaces of Linux, and there is no `ip` here to make them"
    probe = subprocess.run(["unshare", "-n", "-m", "-u", "true"], capture_output=True, text=True)
    if probe.returncode or os.geteuid():
        return (
            f"two hosts are two network namespaces, which this user may not make ({probe.stderr.strip() or 'no root'})"
        )
    return ""


@contextmanager
def hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nobody else; gone afterwards, with all that runs on them."""
    pair = Host(0), Host(1)
    named = "".join(f"{address} {host.name}\n" for host, address in zip(pair, ADDRESSES, strict=True))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{named}")
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    try:
        for host in pair:
            _ip("netns", "add", host.name)
        _ip("link", "add", pair[0].card, "type", "veth", "peer", "name", pair[1].card)
        for host, address in zip(pair, ADDRESSES, strict=True):
            _ip("link", "set", host.card, "netns", host.name)
            _ip("-n", host.name, "addr", "add", f"{address}/24", "dev", host.card)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.link("up")
        yield pair
    finally:
        for host in pair:
            with suppress(subprocess.CalledProcessError):
                host.kill()
                _ip("netns", "del", host.name)


def _kill(pids: Iterator[int]) -> int:
    killed = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
