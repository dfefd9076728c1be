"""examples/worker.py, run as processes against the official Firestore emulator.

Its `work` is replaced, as a reader would: here a job is to write its number into a file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from google.cloud.firestore import Client

from tests.support.emulator import Emulator
from tests.support.world import BUSY, PROJECT, REPOSITORY, World

pytestmark = pytest.mark.slow

# All workers want the first waiting job, and take their time between looking at it and taking it:
# the worst that chance could do.
WORKER = """
import os, random, time, worker
from google.cloud.firestore import DocumentReference

def work(job):
    with open(os.environ["LOG"], "a") as log:
        print(job["number"], worker.POD, file=log)
    time.sleep(job["seconds"])
    assert not job.get("broken")

def get(*arguments, **options):
    found = quick_get(*arguments, **options)
    time.sleep(0.1)
    return found

quick_get, DocumentReference.get = DocumentReference.get, get
random.choice = lambda found: found[0]
worker.work = work
worker.main()
"""


class Workers(ExitStack):
    """Worker processes, each the container of a pod, and what they have worked on."""

    def __init__(self, host: str, log: Path) -> None:
        super().__init__()
        self.host, self.log = host, log

    def start(self, pod: str, **environment: str) -> subprocess.Popen[bytes]:
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY / "examples"),
            "HOSTNAME": pod,
            "FIRESTORE_EMULATOR_HOST": self.host,
            "FIRESTORE_PROJECT": PROJECT,
            "LOG": str(self.log),
            **environment,
        }
        process = subprocess.Popen([sys.executable, "-c", WORKER], env=environ)
        self.callback(stop, process)
        return process

    @property
    def worked(self) -> list[str]:
        """The number of each job and the pod that began it, in the order of beginning."""
        return self.log.read_text().splitlines() if self.log.exists() else []


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a worker, if possible not inside a transaction: the emulator would hold its locks."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture
def workers(emulator: Emulator, tmp_path: Path) -> Iterator[Workers]:
    with Workers(emulator.host, tmp_path / "log") as workers:
        yield workers


def fill(jobs: Client, numbers: Iterable[int], *, seconds: float = 0, **fields: object) -> None:
    for index in numbers:
        job = {"status": "waiting", "number": index, "seconds": seconds, **fields}
        jobs.document(f"jobs/{index:03}").set(job)


def values(jobs: Client, field: str = "status") -> Counter[str | None]:
    """How many jobs have each value of a field."""
    return Counter((job.to_dict() or {}).get(field) for job in jobs.collection("jobs").stream())


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "not so after a minute"
        time.sleep(0.05)


def test_a_worker_does_the_waiting_jobs_and_ends_when_told(workers: Workers, jobs: Client) -> None:
    fill(jobs, range(1), broken=True)
    fill(jobs, range(1, 4))
    jobs.document("jobs/draft").set({"status": "draft"})
    process = workers.start("pod-a")
    wait_until(lambda: values(jobs) == {"failed": 1, "done": 3, "draft": 1})
    assert workers.worked == ["0 pod-a", "1 pod-a", "2 pod-a", "3 pod-a"]
    assert values(jobs, "assignedPodId") == {"pod-a": 4, None: 1}
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0


def test_two_workers_never_both_take_a_job(workers: Workers, jobs: Client) -> None:
    workers.start("pod-a")
    workers.start("pod-b")
    fill(jobs, range(2), seconds=2)
    wait_until(lambda: values(jobs) == {"processing": 2})  # both are there
    fill(jobs, range(2, 8))
    wait_until(lambda: values(jobs) == {"done": 8})
    numbers, pods = zip(*map(str.split, workers.worked), strict=True)
    assert sorted(numbers) == [*"01234567"], "each job was begun once"
    assert {*pods} == {"pod-a", "pod-b"}, "and both had some"


def test_the_scaler_leaves_a_pod_at_work(workers: Workers, jobs: Client, emulated: World) -> None:
    emulated.cluster.scale("worker", 3)
    busy = emulated.cluster.pods("worker")[1]["metadata"]["name"]
    fill(jobs, range(1), seconds=2)
    workers.start("node-a", POD_NAME=busy)
    wait_until(lambda: values(jobs) == {"processing": 1})
    run = emulated.run(BUSY_FILTER=BUSY, SCALE_DOWN_STABILIZATION_SECONDS="0")
    assert (run.record["busy"], run.reason) == (1, "ScaledDown"), run
    assert [pod["metadata"]["name"] for pod in emulated.cluster.pods("worker")] == [busy], run


def test_on_sigterm_a_worker_finishes_what_it_holds(workers: Workers, jobs: Client) -> None:
    fill(jobs, range(3), seconds=2)
    process = workers.start("pod-a")
    wait_until(lambda: workers.worked)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert workers.worked == ["0 pod-a"]
    assert values(jobs) == {"done": 1, "waiting": 2}


def test_a_container_that_was_killed_gives_back_its_job(workers: Workers, jobs: Client) -> None:
    fill(jobs, range(1), seconds=2)
    jobs.document("jobs/of-another").set({"status": "processing", "assignedPodId": "pod-b"})
    first = workers.start("pod-a")
    wait_until(lambda: workers.worked)
    first.kill()
    workers.start("pod-a")
    wait_until(lambda: values(jobs) == {"done": 1, "processing": 1})
    assert workers.worked == ["0 pod-a", "0 pod-a"]
