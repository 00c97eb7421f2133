"""Train one model on two hosts, and lose a process, a host or the link between them on the way.

    .venv/bin/python scripts/two_hosts.py [--times 5] [--seed 7]

The hosts are network namespaces of this machine, so it needs root on Linux. On each of them `frostline supervise` keeps
an `accelerate launch` of the same recipe going. Prints a table; the exit code is 1 if any run did not end in the very
weights that one process trains undisturbed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # noqa: E402, F401  no network and one thread a process, before anything reads it
import staged  # noqa: E402
from _hosts import ADDRESSES, Host, hosts, refusal  # noqa: E402
from _trials import Tally, sha  # noqa: E402

TIMEOUT = 30
"""Seconds that a process waits for another here, so that a cut link is found out before the test is over."""
PACE = 0.25
"""Seconds added to each step, so that what happens to a run happens within it."""
PROCESS = """
import sys, time

sys.path.insert(0, {root!r})
from engine import cli, learner
from engine.devices import processes

processes.TIMEOUT = processes.timedelta(seconds={timeout})
step = learner.Learner.step


def slowly(self, number):
    time.sleep({pace})
    return step(self, number)


learner.Learner.step = slowly
cli.main(sys.argv[1:])
"""
"""What each host runs in place of engine/run.py: the same command with a short time-out, and slower."""


class Pair:
    """A run of both hosts."""

    def __init__(self, pair: tuple[Host, Host], root: Path):
        self.hosts, self.root = pair, root
        self.running = [self.start(host) for host in pair]

    def start(self, host: Host) -> subprocess.Popen[bytes]:
        """What a user starts on each host, and once more on one that was down."""
        launch = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(host.number)]
        launch += ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29500"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        words = [sys.executable, "-m", "engine.cli", "supervise", sys.executable, "-m", "accelerate.commands.launch"]
        command = [*words, *launch, str(self.root / "process.py"), *staged.command(self.root)]
        return host.start(self.root.parent, command, self.log(host))

    def log(self, host: Host) -> Path:
        return self.root / f"host-{host.number}.log"

    def lines(self) -> int:
        """How much is on record."""
        records = staged.folder(self.root) / "metrics.jsonl"
        return len(records.read_bytes().splitlines()) if records.exists() else 0

    def reaches(self, lines: int, seconds: float = 150) -> bool:
        """Wait until so much is on record; False where the run ends or stands still before."""
        end = time.monotonic() + seconds
        while self.lines() < lines:
            if time.monotonic() > end or all(each.poll() is not None for each in self.running):
                return False
            time.sleep(0.02)
        return True

    def ends(self, seconds: float = 400) -> list[int | None]:
        """The exit codes of both hosts' supervisors; None for one that has not ended by then."""
        end = time.monotonic() + seconds
        while any(each.poll() is None for each in self.running) and time.monotonic() < end:
            time.sleep(0.1)
        return [each.poll() for each in self.running]


def nothing(run: Pair, hit: Host) -> None:
    pass


def kill_worker(run: Pair, hit: Host) -> None:
    assert hit.kill_worker() == 1


def kill_host(run: Pair, hit: Host) -> None:
    assert hit.kill() > 1
    run.running[hit.number].wait()
    time.sleep(5)
    run.running[hit.number] = run.start(hit)


def cut_link(run: Pair, hit: Host) -> None:
    hit.link("down")
    time.sleep(TIMEOUT + 15)
    hit.link("up")


Loss = Callable[[Pair, Host], None]
LOSSES: dict[str, Loss] = {
    "nothing is lost": nothing,
    "a worker is killed": kill_worker,
    "a host is killed": kill_host,
    "the link is cut": cut_link,
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--times", type=int, default=5, help="how often each loss is tried")
    options.add_argument("--seed", type=int, default=7)
    wanted = options.parse_args()
    if reason := refusal():
        print(reason, file=sys.stderr)
        return 3
    draw, tallies = random.Random(wanted.seed), {name: Tally() for name in LOSSES}
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder, hosts(Path(folder)) as pair:
        whole = undisturbed(Path(folder) / "one")
        for turn in range(wanted.times):
            for name, loss in LOSSES.items():
                root = Path(folder) / f"{turn}-{list(LOSSES).index(name)}"
                began = time.monotonic()
                told = tried(loss, pair, whole, root, draw)
                tallies[name].count(not told, told)
                print(f"{name}: {told or 'recovered'} after {time.monotonic() - began:.0f} s", flush=True)
                shutil.rmtree(root)
    for name, tally in tallies.items():
        print(f"{name:20} {tally.tries:3} runs, {tally.tries - len(tally.losses)} end in the undisturbed weights")
    return int(any(tally.losses for tally in tallies.values()))


def undisturbed(root: Path) -> Path:
    """The run of one process; one of two processes ends in the same weights, or there is nothing to compare with."""
    staged.place(root)
    two = root.with_name("two")
    shutil.copytree(root, two)
    assert staged.run(root) == [0], staged.said(root)
    assert staged.run(two, ranks=2) == [0, 0], staged.said(two)
    assert _sha(root) == _sha(two)
    return root


def tried(loss: Loss, pair: tuple[Host, Host], whole: Path, root: Path, draw: random.Random) -> str:
    """What is wrong with a run that lost something on the way; empty if nothing is."""
    staged.fresh(whole, root)
    (root / "process.py").write_text(PROCESS.format(root=str(ROOT), timeout=TIMEOUT, pace=PACE))
    run, whole_lines = Pair(pair, root), len((staged.folder(whole) / "metrics.jsonl").read_bytes().splitlines())
    if not run.reaches(at := draw.randrange(2, whole_lines - 4)):
        return f"it never gets to line {at}: {_said(run)}"
    loss(run, draw.choice(pair))
    codes = run.ends()
    for host in pair:
        host.kill()
    if codes != [0, 0]:
        return f"at line {at}: the hosts end with {codes}: {_said(run)}"
    return "" if _sha(root) == _sha(whole) else f"at line {at}: the weights are others"


def _sha(root: Path) -> str:
    return sha(staged.folder(root) / "model/model.safetensors")


def _said(run: Pair) -> str:
    return " | ".join(run.log(host).read_text(errors="replace")[-300:] for host in run.hosts)


if __name__ == "__main__":
    sys.exit(main())
