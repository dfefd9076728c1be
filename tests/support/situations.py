"""A run in each situation that the docs describe: every reason, and every line that they quote."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from grpc import StatusCode  # type: ignore[import-untyped]

import scaler
from tests.support.firestore import Fail, FakeFirestore, missing_index
from tests.support.kubernetes import FakeKubernetes, Match, answer, hang
from tests.support.world import BUSY, PROJECT, REPOSITORY, START, Run, World

NAME = "eventstorming-generator"


class Situation(World):
    """The docs' Deployment, and a queue."""

    def wait(self, jobs: int) -> None:
        """So many jobs wait, and nothing else is in the queue."""
        self.queue.clear()
        self.queue.fill(jobs)

    def annotate(self, **annotations: str | None) -> None:
        named = {f"queue-scaler/{key.replace('_', '-')}": v for key, v in annotations.items()}
        self.cluster.annotate(NAME, **named)

    def roll_back(self, annotation: str, value: str) -> None:
        """As `kubectl rollout undo` restores an annotation, some time after the creation."""
        self.cluster.store.clock = lambda: datetime.now(UTC) + timedelta(hours=1)
        self.cluster.annotate(NAME, "kubectl", **{annotation: value})

    def queue_fails(self, fault: Fail, **settings: str) -> Run:
        self.queue.heal()
        self.queue.fault("count", fault)
        return self.run(TIMEOUT_SECONDS="1", **settings)

    def as_the_scaler(self, role: str, **settings: str) -> Run:
        """As the scaler's account, by this Role."""
        self.cluster.access.rules = []
        self.cluster.load_rbac(role)
        config = self.directory / "as-queue-scaler"
        self.cluster.write_kubeconfig(config, self.cluster.service_account("queue-scaler"))
        return self.run(KUBECONFIG=str(config), **settings)

    def interrupted(self) -> Run:
        """A run, as a process, that gets SIGTERM while it waits for the API server."""
        log, seen = self.directory / "interrupted", len(self.cluster.requests)
        self.cluster.fault(Match("get"), hang(), times=None)
        process = self.start(log=log)
        while len(self.cluster.requests) == seen and process.poll() is None:
            time.sleep(0.02)
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
        self.cluster.clear_faults()
        return Run(process.returncode, stdout, stderr, json.loads(log.read_text()), 0)

    def without_credentials(self) -> Run:
        environ = {**self.environment(), "NO_GCE_CHECK": "true"}
        del environ["FIRESTORE_EMULATOR_HOST"]
        return self.run_with(environ)

    def without_metadata_server(self) -> Run:
        """In a cluster of Google's, in the first seconds of a pod."""
        nobody = {"GCE_METADATA_HOST": "127.0.0.1:9", "GCE_METADATA_IP": "127.0.0.1:9"}
        environ = {**self.environment(TIMEOUT_SECONDS="3"), **nobody}
        del environ["FIRESTORE_EMULATOR_HOST"]
        return self.run_with(environ)

    def all_busy(self, write: Callable[[str], object] = str) -> None:
        """Each pod works on a job, which names it in this form."""
        self.queue.clear()
        for pod in self.cluster.pods(NAME):
            name = str(pod["metadata"]["name"])
            self.queue.put(f"jobs/{name}", {"status": "processing", "assignedPodId": write(name)})


# In which people store a pod's name.
OTHER_FORMS: tuple[Callable[[str], object], ...] = (
    lambda name: f"{name}.workers.default.svc.cluster.local",
    lambda name: f"default/{name}",
)
NO_WAITS = {"SCALE_DOWN_STABILIZATION_SECONDS": "0", "SCALE_DOWN_COOLDOWN_SECONDS": "0"}
FALLBACK = {"FALLBACK_REPLICAS": "2", "FALLBACK_AFTER_SECONDS": "0"}
DENIED = Fail(StatusCode.PERMISSION_DENIED, "Missing or insufficient permissions.")
DATASTORE_MODE = Fail(
    StatusCode.FAILED_PRECONDITION,
    "The Cloud Firestore API is not available for Firestore in Datastore Mode database (default).",
)
UNAVAILABLE = Fail(StatusCode.UNAVAILABLE, "failed to connect to all addresses")
REFUSED = (
    f"deployments.apps \"{NAME}\" is forbidden: ValidatingAdmissionPolicy 'queue-scaler' with "
    "binding 'queue-scaler' denied request: queue-scaler may not set more than 20 replicas: a"
)


def nothing_works(it: Situation) -> Iterator[Run]:
    """Settings, permissions, and servers that do not respond."""
    run, role = it.run, (REPOSITORY / "rbac.yaml").read_text()
    yield run(MIN_REPLICAS="-1", MAX_REPLICAS="three")
    yield it.interrupted()
    yield run(MAX_REPLICA="5")
    yield run(DEPLOYMENT="worker")
    yield run(KUBECONFIG="/nowhere")
    yield it.as_the_scaler(role.replace(NAME, "another"))
    for resource in ("replicasets", "pods"):
        yield it.as_the_scaler(role.replace(f"[{resource}]", "[]"), BUSY_FILTER=BUSY)
    yield it.without_credentials()
    yield it.without_metadata_server()
    yield run(FIRESTORE_DATABASE="missing")
    for problem in (missing_index(), DATASTORE_MODE, DENIED, UNAVAILABLE):
        yield it.queue_fails(problem)
    yield it.queue_fails(UNAVAILABLE, HTTPS_PROXY="http://proxy.example.com:3128", NO_PROXY="*")
    for problem in (DENIED, UNAVAILABLE):
        yield it.queue_fails(problem, SCALE_UP_STEP="0", **FALLBACK)
        yield it.queue_fails(problem, **FALLBACK)
        it.cluster.scale(NAME, 1)
    it.queue.heal()
    it.wait(25)
    it.cluster.fault(Match("patch"), answer(403, message=REFUSED))
    yield run(MAX_REPLICAS="25")
    it.cluster.stop_listening()
    yield run(TIMEOUT_SECONDS="1")


def others_act(it: Situation) -> Iterator[Run]:
    """What users and other programs do to the Deployment."""
    cluster, run = it.cluster, it.run
    it.annotate(paused="true", last_scale_time="yesterday", pause="true")
    yield run()
    it.annotate(paused="true", last_scale_time=None, pause=None, paused_until="2025-12-31")
    yield run()
    it.roll_back("queue-scaler/paused-replicas", "0")
    yield run()
    it.annotate(paused_replicas=None)
    cluster.scale(NAME, 0)
    yield run()
    cluster.scale(NAME, 2, manager="kube-controller-manager")
    yield run()


def jobs_come(it: Situation) -> Iterator[Run]:
    run = it.run
    yield run()
    it.wait(5)
    yield run("--dry-run")
    created = START - timedelta(minutes=12)
    it.queue.put("jobs/old", {"status": "waiting", "createdAt": created})
    yield run(WAITING_SINCE_FIELD="createdAt", SCALE_UP_STEP="0")
    it.wait(5)
    yield run(SCALE_UP_STABILIZATION_SECONDS="60")
    yield run(SCALE_UP_STEP="0")
    yield run(SCALE_UP_STEP="1")
    it.pass_time(60)
    yield run()
    it.wait(0)
    yield run(SCALE_DOWN_STABILIZATION_SECONDS="0")


def jobs_end(it: Situation) -> Iterator[Run]:
    run = it.run
    yield run()
    it.all_busy()
    yield run(BUSY_FILTER=BUSY)
    yield run(BUSY_FILTER=BUSY, JOBS_PER_POD="2", **NO_WAITS)
    for write in OTHER_FORMS:
        it.all_busy(write)
        yield run(BUSY_FILTER=BUSY, JOBS_PER_POD="2", **NO_WAITS)
    yield run(BUSY_FILTER=BUSY, BUSY_POD_FIELD="podName", **NO_WAITS)
    it.queue.clear()
    it.queue.put("jobs/lost", {"status": "processing", "assignedPodId": "a-lost-worker"})
    until = scaler.write_time(START + timedelta(seconds=30))
    lease = {scaler.LEASE: f"{until} -189388900 abcd1234"}
    it.cluster.annotate(NAME, "queue-scaler", **lease)
    yield run(BUSY_FILTER=BUSY, **NO_WAITS)
    it.cluster.annotate(NAME, "queue-scaler", **dict.fromkeys(lease))
    it.wait(0)
    yield run(SCALE_DOWN_STEP="0", **NO_WAITS)
    yield run(**NO_WAITS)
    yield run(MIN_REPLICAS="2")
    yield run(MIN_REPLICAS="1", MAX_REPLICAS="1")


def odd_jobs(it: Situation) -> Iterator[Run]:
    """Jobs whose fields hold something else than the settings say."""
    busy = {"BUSY_FILTER": BUSY, **NO_WAITS}
    at = ["performAt", "<=", "2026-01-01T00:00:00Z"]
    yield it.run(WAITING_FILTER=json.dumps([["status", "==", "waiting"], at]))
    it.queue.put("jobs/a", {"status": "processing", "worker": "w"})
    yield it.run(**busy)
    pod = it.cluster.pods(NAME)[0]["metadata"]["name"]
    it.queue.put("jobs/a", {"status": "processing", "assignedPodId": f"default/{pod}"})
    it.queue.put("jobs/b", {"status": "processing", "assignedPodId": "worker-gone"})
    yield it.run(**busy)


def rollout(it: Situation) -> Iterator[Run]:
    it.cluster.start_rollout(NAME, new_pods=1, old_pods=2)
    it.all_busy()
    yield it.run(BUSY_FILTER=BUSY, JOBS_PER_POD="2", **NO_WAITS)


def first_scale(it: Situation) -> Iterator[Run]:
    it.wait(2)
    yield it.run(BUSY_FILTER=BUSY)


# With so many pods each.
SITUATIONS = (
    (1, first_scale), (1, nothing_works), (1, others_act), (1, jobs_come), (3, jobs_end),
    (3, rollout), (2, odd_jobs),
)  # fmt: skip


def every_run(directory: Path) -> list[Run]:
    """Lines are JSON, whose `message` is what a line of text says."""
    found: list[Run] = []
    for replicas, situation in SITUATIONS:
        with FakeKubernetes(seed=1) as cluster, FakeFirestore(project=PROJECT) as queue:
            cluster.add_deployment(NAME, replicas=replicas)
            as_json = {"LOG_FORMAT": "json"}
            found += situation(Situation(cluster, queue, NAME, START, as_json, directory))
    return found
