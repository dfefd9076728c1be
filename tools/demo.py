"""`make demo`: the real scaler.py, a process a "minute", between an embedded Firestore and an
embedded Kubernetes API. Time is made to pass, not waited for.

    python -m tools.demo    a short queue, idle pods first, jobs that become due, a burst
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.support.firestore import FakeFirestore
from tests.support.kubernetes import FakeKubernetes, Match
from tests.support.world import BUSY, PROJECT, START, Run, World

NAME = "eventstorming-generator"
NO_WAITS = {"SCALE_DOWN_STABILIZATION_SECONDS": "0", "SCALE_DOWN_COOLDOWN_SECONDS": "0"}

# What each run's line shows: minute, waiting, busy, pods, reason; then the script's own sentence.
LINE = "{:>6}  {:>7}  {:>4}  {:<10}  {:<19}  "
MARGIN = len(LINE.format(*[""] * 5))


# --- The world: a queue, its workers, the cluster, the script ----------------------------------


@dataclass
class WorkingWorld(World):
    """A World whose pods work, a minute at a time.

    A pod works on one job at a time, for as many minutes as its document says; on those that
    name none it never begins. `killed` are the pods that were removed while they worked.
    """

    killed: list[str] = field(default_factory=list)
    jobs: int = 0

    def add_jobs(self, number: int, minutes: int = 0) -> None:
        """Jobs that wait; with `minutes`, pods take and finish them."""
        for _ in range(number):
            self.jobs += 1
            self.queue.put(f"jobs/job-{self.jobs:03}", {"status": "waiting", "minutes": minutes})

    def finish_all(self) -> None:
        for name, job in self.queue.documents("jobs").items():
            self.queue.put(f"jobs/{name}", {**job, "status": "done"})

    def with_status(self, status: str) -> dict[str, dict[str, Any]]:
        found = self.queue.documents("jobs")
        return {name: job for name, job in sorted(found.items()) if job["status"] == status}

    def pods(self) -> list[str]:
        """Names of the live pods, the oldest first."""
        pods = [pod["metadata"] for pod in self.cluster.pods(NAME)]
        return [pod["name"] for pod in sorted(pods, key=lambda pod: pod["creationTimestamp"])]

    def busy_pods(self) -> set[str]:
        return {str(job["assignedPodId"]) for job in self.with_status("processing").values()}

    def work(self) -> None:
        """A minute passes, in which the pods go on with their jobs, end them, take the next."""
        for name, job in self.with_status("processing").items():
            left = int(job["minutes"]) - 1
            status = "processing" if left > 0 else "done"
            self.queue.put(f"jobs/{name}", {**job, "minutes": left, "status": status})
        busy = self.busy_pods()
        idle = [pod for pod in self.pods() if pod not in busy]
        takeable = [(n, job) for n, job in self.with_status("waiting").items() if job["minutes"]]
        for pod, (name, job) in zip(idle, takeable, strict=False):
            taken = {**job, "status": "processing", "assignedPodId": pod}
            self.queue.put(f"jobs/{name}", taken)
        self.pass_time()

    def scale(self) -> tuple[Run, list[str]]:
        """One run of the script, and the pods that went because of it."""
        before, busy = self.pods(), self.busy_pods()
        run = self.run()
        removed = [pod for pod in before if pod not in self.pods()]
        self.killed += [pod for pod in removed if pod in busy]
        return run, removed


@contextmanager
def working_world(**settings: str) -> Iterator[WorkingWorld]:
    """A Deployment of one pod and an empty queue, on free ports of loopback; nothing is left."""
    with (
        tempfile.TemporaryDirectory() as directory,
        FakeKubernetes(seed=1, clock=lambda: world.now or START) as cluster,
        FakeFirestore(project=PROJECT) as queue,
    ):
        place = Path(directory)
        world = WorkingWorld(cluster, queue, NAME, START, settings, place, process=True)
        cluster.add_deployment(NAME, replicas=1)
        yield world


# --- What the user sees -------------------------------------------------------------------------


@dataclass
class Screen:
    """The table. Colour only on a terminal."""

    colour: bool
    width: int
    runs: int = 0
    failures: list[str] = field(default_factory=list)

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    def headline(self, title: str, expected: str) -> None:
        print()
        print(self.paint(title, "1"))
        for line in textwrap.wrap(f"Expected: {expected}", self.width):
            print(self.paint(line, "2"))
        print()
        header = LINE.format("minute", "waiting", "busy", "pods", "reason") + "what the script says"
        print(self.paint(header, "4"))

    def row(self, minute: int, run: Run, bar: str) -> None:
        self.runs += 1
        record = run.record
        waiting, busy = record.get("waiting"), record.get("busy")
        change = (record.get("replicas") or 0) - (record.get("current") or 0)
        start = LINE.format(
            minute,
            "?" if waiting is None else waiting,
            "" if busy is None else busy,
            f"{bar} {change:+}" if change else bar,
            run.reason,
        )
        code = "32" if change > 0 else "33" if change < 0 else "0"
        self.sentence(start, record.get("message") or str(run), code)

    def sentence(self, start: str, text: str, code: str) -> None:
        first, *more = textwrap.wrap(text, self.width - MARGIN)
        print(self.paint(start + first, code))
        for line in more:
            print(self.paint(" " * MARGIN + line, code))
        sys.stdout.flush()

    def note(self, text: str) -> None:
        print(self.paint(" " * MARGIN + text, "2"))

    def check(self, holds: bool, claim: str) -> None:
        mark = self.paint("    ok", "1;32") if holds else self.paint("NOT SO", "1;31")
        print(f"{mark}  {claim}")
        if not holds:
            self.failures.append(claim)


def bar(world: WorkingWorld, works: bool) -> str:
    """A block per pod; if pods work, an idle one is hollow."""
    busy = world.busy_pods()
    return "".join("■" if pod in busy or not works else "□" for pod in world.pods())


@dataclass
class Show:
    """A world on the screen: each call of `minutes` runs the script that many times.

    `works` says whether the pods of this show take the jobs, or leave them to wait.
    """

    world: WorkingWorld
    screen: Screen
    works: bool
    minute: int = 0
    last: Run | None = None

    def minutes(self, number: int) -> None:
        for _ in range(number):
            run, removed = self.world.scale()
            self.screen.row(self.minute, run, bar(self.world, self.works))
            for pod in removed if self.works else []:
                what = "busy" if pod in self.world.killed else "idle"
                self.screen.note(f"removed …{pod.removeprefix(NAME)} ({what})")
            if run.exit_code:
                self.screen.check(False, f"every run ends well: {run}")
            self.world.work()
            self.minute += 1
            self.last = run

    def check_pods(self, number: int, when: str) -> None:
        pods = "1 pod" if number == 1 else f"{number} pods"
        self.screen.check(self.world.replicas == len(self.world.pods()) == number, f"{pods} {when}")


# --- The scenarios -----------------------------------------------------------------------------


def short_queue(screen: Screen) -> None:
    """No job, two, five, none again, with the default settings."""
    with working_world() as world:
        show = Show(world, screen, works=False)
        screen.headline("1. No job waits", "1 pod, and nothing is written to the cluster.")
        before = world.resource_version
        show.minutes(3)
        untouched = world.resource_version == before
        screen.check(untouched, "the Deployment was not written to")
        show.check_pods(1, "as long as no job waits")

        screen.headline("2. Two jobs wait", "2 pods at the next run.")
        world.add_jobs(2)
        show.minutes(1)
        show.check_pods(2, "one run later")

        screen.headline(
            "3. Five jobs wait",
            "3 pods, the maximum (MAX_REPLICAS=3), two minutes after the last scale-up.",
        )
        world.add_jobs(3)
        show.minutes(3)
        show.check_pods(3, "two minutes after the last scale-up")

        screen.headline(
            "4. All jobs are done",
            "1 pod about 5 minutes later; a queue that is empty for a moment costs nothing.",
        )
        world.finish_all()
        done = show.minute
        show.minutes(6)
        waited = show.minute - 1 - done
        show.check_pods(1, f"{waited} minutes after the first run that saw the queue empty")
        screen.check(bool(show.last and show.last.reason == "ScaledDown"), "not a minute earlier")


def idle_pods_first(screen: Screen) -> None:
    """Three pods with jobs of different length: a pod goes when it is idle, whichever it is."""
    with working_world(BUSY_FILTER=BUSY, **NO_WAITS) as world:
        show = Show(world, screen, works=True)
        screen.headline(
            "5. Three pods work on jobs of 2, 5 and 8 minutes (BUSY_FILTER is set)",
            "each pod disappears once it is idle (□), never while it works (■). All delays before "
            "a scale-down are disabled here, so that every minute is a chance to get it wrong; "
            "left to itself, Kubernetes removes the youngest pod first, which has the longest job.",
        )
        for minutes in (2, 5, 8):
            world.add_jobs(1, minutes)
        show.minutes(10)
        killed = len(world.killed)
        screen.check(killed == 0, f"{killed} busy pods removed")
        show.check_pods(1, "when all jobs are done")

    with working_world(**NO_WAITS) as world:
        show = Show(world, screen, works=True)
        screen.headline(
            "   The same without BUSY_FILTER",
            "0 waiting jobs, so 1 pod: the others go, and their jobs with them.",
        )
        for minutes in (2, 5, 8):
            world.add_jobs(1, minutes)
        show.minutes(2)
        killed = len(world.killed)
        screen.check(killed == 2, f"{killed} busy pods removed, which is what BUSY_FILTER is for")


DUE = '[["status", "==", "waiting"], ["performAt", "<=", {"timestampValue": "now"}]]'


def job_becomes_due(screen: Screen) -> None:
    """Two jobs for later: they count from their time on, without anybody touching them."""
    with working_world(WAITING_FILTER=DUE) as world:
        show = Show(world, screen, works=False)
        screen.headline(
            "6. Two jobs are to start at minute 2 (WAITING_FILTER compares performAt with now)",
            "1 pod until then, 2 pods at that minute.",
        )
        for number in (1, 2):
            due = START + timedelta(minutes=2)
            later = {"status": "waiting", "minutes": 0, "performAt": due}
            world.queue.put(f"jobs/later-{number}", later)
        show.minutes(2)
        show.check_pods(1, "before they are due")
        show.minutes(1)
        show.check_pods(2, "once they are due")


BURST_INTERVAL_SECONDS = 1


def burst(screen: Screen) -> None:
    """One run that looks again every second, on the real clock."""
    with (
        tempfile.TemporaryDirectory() as directory,
        FakeKubernetes(seed=1) as cluster,
        FakeFirestore(project=PROJECT) as queue,
    ):
        cluster.add_deployment(NAME, replicas=1)
        interval = str(BURST_INTERVAL_SECONDS)
        settings = {"POLLING_INTERVAL_SECONDS": interval, "TIMEOUT_SECONDS": "5"}
        world = World(cluster, queue, NAME, None, settings, Path(directory))
        screen.headline(
            f"7. Five jobs at once, with POLLING_INTERVAL_SECONDS={interval} and the real clock",
            "3 pods within seconds, not at the next minute: one run looks again and again.",
        )
        run = world.start(log=Path(directory) / "log")
        wait_until(lambda: bool(cluster.requests), 10)
        time.sleep(1.5 * BURST_INTERVAL_SECONDS)
        queue.fill(5)
        seconds = wait_until(lambda: bool(cluster.scales), 10)
        for line in run.communicate(timeout=30)[0].splitlines():
            found = re.search(r" AutoScaler [^ :]+(?: (\w+))?: (.*)", line)
            reason, text = found.groups("") if found else ("", line)
            start = LINE.format("", "", "", "", reason)
            screen.sentence(start, text, "32" if reason == "ScaledUp" else "0")
        screen.runs += 1
        pods, looks = len(cluster.pods(NAME)), len(cluster.calls(Match("get", "deployments")))
        screen.check(
            pods == 3 and seconds <= BURST_INTERVAL_SECONDS + 1,
            f"{pods} pods {seconds:.1f} s after the jobs came, in a run of {looks} looks",
        )


def wait_until(holds: Callable[[], bool], most_seconds: float) -> float:
    """The seconds until it holds, or the most."""
    begun = time.monotonic()
    while not holds() and time.monotonic() - begun < most_seconds:
        time.sleep(0.01)
    return time.monotonic() - begun


def demo(screen: Screen) -> int:
    started = time.monotonic()
    print(
        textwrap.fill(
            "queue-scaler between an embedded Firestore (gRPC) and an embedded Kubernetes API "
            "(HTTP), both on free ports of this machine. Each line is one run of scaler.py, as a "
            "process, a minute after the one before; only its clock is moved, so nobody waits. The "
            "last scenario is on the real clock.",
            screen.width,
        )
    )
    short_queue(screen)
    idle_pods_first(screen)
    job_becomes_due(screen)
    burst(screen)
    seconds = time.monotonic() - started
    print()
    print(f"{screen.runs} runs of scaler.py in {seconds:.0f} s; nothing is left running.")
    if screen.failures:
        print(screen.paint("Not as expected:", "1;31"))
        for claim in screen.failures:
            print(f"  - {claim}")
        return 1
    print(screen.paint("Every scenario ended as expected.", "1;32"))
    return 0


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__).parse_args(argv)
    on_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    columns = shutil.get_terminal_size((120, 24)).columns
    return demo(Screen(on_terminal, min(120, max(100, columns))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
