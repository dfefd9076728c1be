"""examples/worker.py, run as processes against the official Firestore emulator.

Its `work` is replaced, as a reader would: here a job writes its number into a file.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from google.cloud.firestore import Client

from tests.support.emulator import Emulator
from tests.support.proxy import ChaosProxy
from tests.support.world import BUSY, PROJECT, REPOSITORY, World

pytestmark = pytest.mark.slow

Process = subprocess.Popen[str]

EXAMPLE = REPOSITORY / "examples/worker.py"
MANIFEST = REPOSITORY / "examples/worker.yaml"
PAGE = REPOSITORY / "docs/busy-workers.md"

WORKER = """
import os, time, worker

def work(job):
    with open(os.environ["LOG"], "a") as log:
        print(job["number"], worker.POD, file=log)
    time.sleep(job["seconds"])
    assert not job.get("broken"), "broken"

worker.work = work
worker.main()
"""

# SIGTERM while the first of Google's packages is imported.
IMPORTING = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "google":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
"""

# SIGTERM while a job is read to be claimed.
CLAIMING = """
import os, signal
from google.cloud.firestore import DocumentReference

def get(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return quick_get(*arguments, **options)

quick_get, DocumentReference.get = DocumentReference.get, get
"""

# All want the first of the waiting jobs, and take their time between reading and writing it.
RIVALS = """
import random, time
from google.cloud.firestore import DocumentReference

def get(*arguments, **options):
    found = quick_get(*arguments, **options)
    time.sleep(0.05)
    return found

quick_get, DocumentReference.get = DocumentReference.get, get
random.shuffle = lambda found: found.sort(key=lambda job: job.id)
"""

# Firestore does not accept the first end of a job.
NO_END = """
from google.api_core.exceptions import ServiceUnavailable
from google.cloud.firestore import DocumentReference

def update(job, fields, *arguments):
    if fields.get("status") == "done" and not failures:
        failures.append(fields)
        raise ServiceUnavailable("down")
    return real_update(job, fields, *arguments)

failures, real_update, DocumentReference.update = [], DocumentReference.update, update
"""

# The job is written, but the response to the nth write is lost: Google's client repeats the write
# by itself, and reports that the job has changed.
LOST_RESPONSE = """
from google.api_core.exceptions import FailedPrecondition
from google.cloud.firestore import DocumentReference

def update(job, *arguments):
    writes.append(real_update(job, *arguments))
    if len(writes) == {nth}:
        raise FailedPrecondition("stale")

writes, real_update, DocumentReference.update = [], DocumentReference.update, update
"""

# An hour on a clock that only `sleep` moves, and the reads that Firestore bills in it: the
# documents of each response, at least one per query.
HOUR = """
import os, time
from google.cloud.firestore_v1.services.firestore import FirestoreClient

clock, reads, run_query = [0.0], [0], FirestoreClient.run_query

def counted(*arguments, **options):
    responses = list(run_query(*arguments, **options))
    reads[0] += max(1, sum("document" in response for response in responses))
    return iter(responses)

def unexpected(*arguments, **options):
    raise AssertionError("an idle worker only queries")

def sleep(seconds):
    clock[0] += seconds
    if clock[0] > 3600:
        print(reads[0], flush=True)
        os._exit(0)

FirestoreClient.run_query = counted
for name in ("batch_get_documents", "listen", "begin_transaction", "run_aggregation_query"):
    setattr(FirestoreClient, name, unexpected)
time.sleep, time.monotonic = sleep, lambda: clock[0]
"""


class Workers(ExitStack):
    """Worker processes, each the container of a pod, and what they have worked on."""

    def __init__(self, host: str, directory: Path) -> None:
        super().__init__()
        self.host, self.log, self.errors = host, directory / "log", directory / "errors"
        self.started: list[Process] = []

    def start(self, pod: str, *, before: str = "", **environment: str) -> Process:
        """The script as in a container: SIGTERM does nothing until the script handles it."""
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(EXAMPLE.parent),
            "POD_NAME": pod,
            "FIRESTORE_EMULATOR_HOST": self.host,
            "FIRESTORE_PROJECT": PROJECT,
            "MAX_PAUSE_SECONDS": "1",
            "LOG": str(self.log),
            **environment,
        }
        with self.errors.open("a") as errors:
            process = subprocess.Popen(
                [
                    "sh",
                    "-c",
                    'trap "" TERM; exec "$@"',
                    "sh",
                    sys.executable,
                    "-c",
                    before + WORKER,
                ],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.started.append(process)
        return process

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()

    @property
    def worked(self) -> list[str]:
        """The number of each job and the pod that began it, in the order of beginning."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def said(self) -> str:
        """Everything that the workers have logged."""
        return self.errors.read_text()


@pytest.fixture
def workers(emulator: Emulator, tmp_path: Path) -> Iterator[Workers]:
    with Workers(emulator.host, tmp_path) as workers:
        workers.callback(workers.stop)
        yield workers


def fill(jobs: Client, numbers: Iterable[int], *, seconds: float = 0, **fields: object) -> None:
    batch = jobs.batch()
    for index in numbers:
        job = {"status": "waiting", "number": index, "seconds": seconds, **fields}
        batch.set(jobs.document(f"jobs/{index:03}"), job)
    batch.commit()


def documents(jobs: Client) -> list[dict[str, Any]]:
    return [job.to_dict() or {} for job in jobs.collection("jobs").stream()]


def values(jobs: Client, field: str = "status") -> Counter[Any]:
    """How many jobs have each value of a field."""
    return Counter(job.get(field) for job in documents(jobs))


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.05)


def caught(process: Process, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = re.search(r"SigCgt:\s*(\w+)", status)
    return bool(mask and int(mask[1], 16) >> number - 1 & 1)


# --- One worker -----------------------------------------------------------------------------------


def test_a_worker_does_the_waiting_jobs_and_ends_when_told(workers: Workers, jobs: Client) -> None:
    fill(jobs, range(3))
    jobs.document("jobs/draft").set({"status": "draft"})
    process = workers.start("pod-a")
    wait_until(lambda: values(jobs) == {"done": 3, "draft": 1})
    assert sorted(workers.worked) == ["0 pod-a", "1 pod-a", "2 pod-a"]
    assert values(jobs, "assignedPodId") == {"pod-a": 3, None: 1}
    assert values(jobs, "leaseUntil") == {None: 4}
    process.terminate()
    assert process.wait(5) == 0
    logged = re.findall(r"^\S+ \S+ INFO (jobs/\S+): done after \d+\.\d s$", workers.said, re.M)
    assert sorted(logged) == ["jobs/000", "jobs/001", "jobs/002"], workers.said
    assert len(workers.said.splitlines()) == 3, workers.said


def test_a_job_that_always_fails_ends_as_failed(workers: Workers, jobs: Client) -> None:
    fill(jobs, range(1), broken=True)
    fill(jobs, range(1, 4))
    workers.start("pod-a", MAX_ATTEMPTS="2")
    wait_until(lambda: values(jobs) == {"failed": 1, "done": 3})
    assert workers.worked.count("0 pod-a") == 2
    assert values(jobs, "attempts") == {2: 1, 1: 3}
    wait_until(lambda: workers.said.count("AssertionError: broken") == 2)


def test_a_job_that_always_kills_its_worker_ends_as_failed(workers: Workers, jobs: Client) -> None:
    """As one that needs more memory than the container has."""
    fill(jobs, range(1), seconds=60)
    for attempt in (1, 2):
        process = workers.start("pod-a", MAX_ATTEMPTS="2")
        wait_until(lambda n=attempt: len(workers.worked) == n)  # type: ignore[misc]
        process.kill()
        process.wait()
    workers.start("pod-a", MAX_ATTEMPTS="2")
    wait_until(lambda: "jobs/000: failed" in workers.said)
    assert values(jobs) == {"failed": 1}
    assert workers.worked == ["0 pod-a"] * 2


def test_a_container_that_restarts_takes_back_its_own_job(workers: Workers, jobs: Client) -> None:
    fill(jobs, range(1), seconds=2)
    other = {"status": "processing", "leaseUntil": datetime.now(UTC) + timedelta(hours=1)}
    jobs.document("jobs/of-another").set({**other, "assignedPodId": "pod-b"})
    first = workers.start("pod-a")
    wait_until(lambda: workers.worked)
    first.kill()
    workers.start("pod-a")
    wait_until(lambda: values(jobs) == {"done": 1, "processing": 1})
    assert workers.worked == ["0 pod-a", "0 pod-a"]


def test_without_the_name_of_its_pod_a_worker_says_what_is_missing(workers: Workers) -> None:
    process = workers.start("")
    assert process.wait(10) == 1
    assert workers.said == "POD_NAME is not set: see examples/worker.yaml\n"


def test_an_outage_ends_no_worker(workers: Workers, jobs: Client) -> None:
    """It begins while a job is worked on, so that the job's end cannot be written for a time."""
    fill(jobs, range(1), seconds=1)
    with ChaosProxy(workers.host) as proxy:
        process = workers.start("pod-a", FIRESTORE_EMULATOR_HOST=proxy.host)
        wait_until(lambda: workers.worked)
        proxy.become("refuse")
        proxy.reset()
        time.sleep(3)
        fill(jobs, range(1, 2))
        assert values(jobs) == {"processing": 1, "waiting": 1}
        proxy.become("pass")
        wait_until(lambda: values(jobs) == {"done": 2})
        assert workers.worked == ["0 pod-a", "1 pod-a"]
        process.terminate()
        assert process.wait(5) == 0


def test_the_end_of_a_job_is_written_in_spite_of_an_error(workers: Workers, jobs: Client) -> None:
    fill(jobs, range(1))
    workers.start("pod-a", before=NO_END)
    wait_until(lambda: values(jobs) == {"done": 1})
    assert workers.worked == ["0 pod-a"]
    assert "jobs/000: its end is not written yet: 503 down" in workers.said


@pytest.mark.parametrize("nth", [1, 2], ids=["claim", "finish"])
def test_a_write_whose_response_is_lost_counts_once(
    workers: Workers, jobs: Client, nth: int
) -> None:
    fill(jobs, range(1))
    workers.start("pod-a", before=LOST_RESPONSE.format(nth=nth), MAX_ATTEMPTS="1")
    wait_until(lambda: "jobs/000: done" in workers.said)
    assert (workers.worked, values(jobs, "attempts")) == (["0 pod-a"], {1: 1})
    assert values(jobs) == {"done": 1}


def test_odd_documents_keep_no_worker_from_its_work(workers: Workers, jobs: Client) -> None:
    odd_fields: list[dict[str, Any]] = [
        {"attempts": None}, {"attempts": "many"}, {"leaseUntil": "soon"}, {"leaseUntil": 1}
    ]  # fmt: skip
    for number, odd in enumerate(odd_fields * 3):
        status = "processing" if "leaseUntil" in odd else "waiting"
        job = {"status": status, "assignedPodId": "pod-b", "number": 9, "seconds": 0, **odd}
        jobs.document(f"jobs/0-odd-{number}").set(job)
    fill(jobs, range(3))
    process = workers.start("pod-a")
    wait_until(lambda: values(jobs) == {"done": 9, "processing": 6})
    assert process.poll() is None and "Error" not in workers.said, workers.said


# --- SIGTERM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [IMPORTING, CLAIMING], ids=["importing", "claiming"])
def test_on_sigterm_in_the_middle_a_worker_leaves_the_job(
    workers: Workers, jobs: Client, before: str
) -> None:
    fill(jobs, range(1), seconds=60)
    process = workers.start("pod-a", before=before)
    assert process.wait(5) == 0
    assert values(jobs) == {"waiting": 1}


def test_on_sigterm_at_any_time_an_idle_worker_ends_at_once(workers: Workers, jobs: Client) -> None:
    """At every tenth of the first two seconds, with a job that begins to wait at that moment."""

    def left_waiting(tenths: int) -> bool:
        collection = f"jobs-of-{tenths}"
        begun = time.monotonic()
        process = workers.start("pod-a", QUEUE_COLLECTION=collection, MAX_PAUSE_SECONDS="30")
        wait_until(lambda: caught(process, signal.SIGTERM), 5)
        time.sleep(max(0, begun + tenths / 10 - time.monotonic()))
        process.terminate()
        job = jobs.document(f"{collection}/1")
        job.set({"status": "waiting", "number": tenths, "seconds": 60})
        assert process.wait(5) == 0, f"{tenths} tenths"
        return job.get().to_dict() == {"status": "waiting", "number": tenths, "seconds": 60}

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(left_waiting, range(1, 21)))
    assert workers.worked == []


def test_on_sigterm_a_worker_finishes_what_it_holds(workers: Workers, jobs: Client) -> None:
    fill(jobs, range(3), seconds=1)
    process = workers.start("pod-a")
    wait_until(lambda: workers.worked)
    process.terminate()
    assert process.wait(30) == 0
    assert len(workers.worked) == 1
    assert values(jobs) == {"done": 1, "waiting": 2}


# --- Several workers ------------------------------------------------------------------------------


def test_eight_workers_do_200_jobs_exactly_once(workers: Workers, jobs: Client) -> None:
    for index in range(8):
        workers.start(f"pod-{index}")
    fill(jobs, range(200))
    wait_until(lambda: len(workers.worked) == 200)
    wait_until(lambda: values(jobs) == {"done": 200})
    numbers, pods = zip(*map(str.split, workers.worked), strict=True)
    assert sorted(map(int, numbers)) == list(range(200)), "each job was begun once"
    assert len({*pods}) == 8, "and each worker had some"
    assert [process.poll() for process in workers.started] == [None] * 8, workers.said
    assert values(jobs, "attempts") == {1: 200}


def test_losing_a_race_for_a_job_is_normal(workers: Workers, jobs: Client) -> None:
    rivals = [workers.start(f"pod-{index}", before=RIVALS) for index in range(4)]
    for number in range(5):
        fill(jobs, [number])
        wait_until(lambda n=number: values(jobs) == {"done": n + 1})  # type: ignore[misc]
    assert len(workers.worked) == 5, "each job was begun once"
    assert [process.poll() for process in rivals] == [None] * 4, workers.said
    wait_until(lambda: workers.said.count(": done after") == 5)
    assert len(workers.said.splitlines()) == 5, workers.said


def test_a_job_three_times_as_long_as_its_lease_stays_with_its_worker(
    workers: Workers, jobs: Client
) -> None:
    fill(jobs, range(1), seconds=9)
    workers.start("pod-a", LEASE_SECONDS="3")
    workers.start("pod-b", LEASE_SECONDS="3")
    wait_until(lambda: values(jobs) == {"done": 1})
    assert len(workers.worked) == 1, workers.said


def test_the_job_of_a_killed_worker_is_done_by_another_after_the_lease(
    workers: Workers, jobs: Client
) -> None:
    fill(jobs, range(1), seconds=2)
    first = workers.start("pod-a", LEASE_SECONDS="3")
    wait_until(lambda: workers.worked)
    first.kill()
    [lost] = documents(jobs)
    workers.start("pod-b", LEASE_SECONDS="3")
    wait_until(lambda: len(workers.worked) == 2)
    assert datetime.now(UTC) > lost["leaseUntil"]
    wait_until(lambda: values(jobs) == {"done": 1})
    assert workers.worked == ["0 pod-a", "0 pod-b"]


def test_a_worker_that_lost_its_lease_does_not_write_the_end(
    workers: Workers, jobs: Client
) -> None:
    """As on a node that stood still: the first worker is stopped for longer than its lease."""
    fill(jobs, range(1), seconds=5)
    first = workers.start("pod-a", LEASE_SECONDS="2")
    wait_until(lambda: workers.worked)
    first.send_signal(signal.SIGSTOP)
    workers.start("pod-b", LEASE_SECONDS="2")
    wait_until(lambda: len(workers.worked) == 2)
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: "jobs/000: lost, not written after" in workers.said)
    assert "jobs/000: lease lost, another worker may have it" in workers.said
    [job] = documents(jobs)
    assert (job["status"], job["assignedPodId"]) == ("processing", "pod-b")
    wait_until(lambda: values(jobs) == {"done": 1})
    assert workers.worked == ["0 pod-a", "0 pod-b"]
    assert values(jobs, "assignedPodId") == {"pod-b": 1}


# --- With the scaler, and what the page says ------------------------------------------------------


def test_the_scaler_spares_a_busy_pod(workers: Workers, jobs: Client, emulated: World) -> None:
    emulated.cluster.scale("worker", 3)
    busy = emulated.cluster.pods("worker")[1]["metadata"]["name"]
    fill(jobs, range(1), seconds=60)
    workers.start(busy)
    wait_until(lambda: values(jobs) == {"processing": 1})
    run = emulated.run(BUSY_FILTER=BUSY, SCALE_DOWN_STABILIZATION_SECONDS="0")
    assert (run.record["busy"], run.reason) == (1, "ScaledDown"), run
    assert [pod["metadata"]["name"] for pod in emulated.cluster.pods("worker")] == [busy], run


def test_an_idle_hour_costs_the_reads_that_the_page_says(workers: Workers) -> None:
    process = workers.start("pod-a", before=HOUR, MAX_PAUSE_SECONDS="30")
    out, _ = process.communicate(timeout=60)
    [documented] = re.findall(r"about (\d+) reads per hour", PAGE.read_text())
    assert int(out) == pytest.approx(int(documented), rel=0.15), workers.said


def test_a_lost_job_starts_a_worker_from_zero(
    workers: Workers, jobs: Client, emulated: World
) -> None:
    """With the page's filters."""
    emulated.now = None
    emulated.cluster.scale("worker", 0)
    fill(jobs, range(1), seconds=60)
    process = workers.start("pod-a", LEASE_SECONDS="1")
    wait_until(lambda: workers.worked)
    process.kill()
    [block] = re.findall(r"```yaml\n(env:.*?)```", PAGE.read_text(), re.DOTALL)
    variables = {each["name"]: each["value"] for each in yaml.safe_load(block)["env"]}
    time.sleep(1)
    run = emulated.run(**variables, MIN_REPLICAS="0")
    assert (run.record["waiting"], run.reason, emulated.replicas) == (1, "ScaledUp", 1), run


def test_the_manifest_has_what_the_page_asks_for() -> None:
    deployment, budget = yaml.safe_load_all(MANIFEST.read_text())
    for document in (deployment, budget):
        kubernetes_validate.validate(document, "1.30", strict=True)
        assert document["metadata"]["name"] == "eventstorming-generator"
        selected = document["spec"]["selector"]["matchLabels"]
        assert selected == deployment["spec"]["template"]["metadata"]["labels"]
    assert "replicas" not in deployment["spec"]
    template = deployment["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"
    }
    assert template["spec"]["terminationGracePeriodSeconds"] == 3600
    [container] = template["spec"]["containers"]
    variables = {each["name"]: each for each in container["env"]}
    reference = {"apiVersion": "v1", "fieldPath": "metadata.name"}
    assert variables["POD_NAME"]["valueFrom"] == {"fieldRef": reference}
    commented = re.findall(r"# - name: (\w+)", MANIFEST.read_text())
    read = re.findall(r'"([A-Z]+_[A-Z_]+)"', EXAMPLE.read_text())
    assert sorted([*variables, *commented]) == sorted(read)
    defaults = dict(re.findall(r'environ.get\("(\w+)", "(\w+)"\)', EXAMPLE.read_text()))
    assert {name: variables[name]["value"] for name in defaults} == defaults


def test_the_example_is_read_in_five_minutes() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 150
