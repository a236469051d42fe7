"""The parent's side of `step_time.py`: processes that do a step when asked, and what the machine did meanwhile."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).with_name("step_time_workers.py")
_TICKS = os.sysconf("SC_CLK_TCK")
_LOOK_S = 0.02


class Process:
    """A worker.

    Attributes:
      missing: the package that it needs and does not have, or None.
      failed: why it could not do its first step, or None.
      ready: its first reply.
      seconds, replies: of each counted round.
      anonymous: the highest anonymous resident memory seen, in bytes.
      idle_s, waited_s: CPU seconds it used while others had their turns, and how long those took.
    """

    def __init__(
        self, python: str, job: Mapping[str, Any], environment: Mapping[str, str], workers: Path = WORKERS
    ) -> None:
        self.seconds: list[float] = []
        self.replies: list[dict[str, Any]] = []
        self.anonymous, self.idle_s, self.waited_s = 0, 0.0, 0.0
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [python, str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.ready = self.ask(json.dumps(job))
        self.missing, self.failed = self.ready.get("missing"), self.ready.get("failed")
        self.ready["to_first_step_s"] = time.perf_counter() - start

    def ask(self, word: str) -> dict[str, Any]:
        """Sends a line and waits for the reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._reply()

    def start_again(self) -> None:
        """Forgets the rounds so far: they were a warm-up."""
        self.seconds, self.replies, self.idle_s, self.waited_s = [], [], 0.0, 0.0

    def cpu_s(self) -> float:
        """CPU seconds used so far, by all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def close(self) -> None:
        """Lets it end, and ends it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], _LOOK_S)[0]:
            self._look()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self._process.wait()}; its own words stand above")
        return json.loads(line)

    def _look(self) -> None:
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                self.anonymous = max(self.anonymous, 1024 * int(line.split()[1]))


def take_turns(processes: Mapping[str, Process], rounds: int, until: float) -> dict[str, float]:
    """One step each a round, in turning order, so that drift meets all alike; 3 rounds at least, even past `until`.

    Returns how many CPU seconds all else on this machine used meanwhile, and how long it took.
    """
    names = list(processes)
    start, busy = time.perf_counter(), busy_seconds() - sum(p.cpu_s() for p in processes.values())
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > until:
            print(f"stopped after {number} rounds: the time is up", file=sys.stderr)
            break
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            _turn(processes, name)
    elapsed = time.perf_counter() - start
    others = busy_seconds() - sum(p.cpu_s() for p in processes.values()) - busy
    return {"others_cpu_s": round(others, 2), "elapsed_s": round(elapsed, 2)}


def _turn(processes: Mapping[str, Process], name: str) -> None:
    waiting = {other: p.cpu_s() for other, p in processes.items() if other != name}
    start = time.perf_counter()
    reply = processes[name].ask("step")
    processes[name].seconds.append(reply.pop("seconds"))
    processes[name].replies.append(reply)
    for other, before in waiting.items():
        processes[other].idle_s += processes[other].cpu_s() - before
        processes[other].waited_s += time.perf_counter() - start


def busy_seconds() -> float:
    """CPU seconds that the whole machine has worked since it started."""
    first = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _, _, irq, softirq, *_ = map(int, first.split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS
