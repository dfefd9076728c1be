"""A run in each situation that the pages describe: every reason, and every line that they quote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grpc import StatusCode  # type: ignore[import-untyped]

from tests.support.firestore import Fail, FakeFirestore, missing_index
from tests.support.kubernetes import FakeKubernetes, Match, answer
from tests.support.world import BUSY, PROJECT, REPOSITORY, START, Run, World

NAME = "eventstorming-generator"


class Situation(World):
    """The pages' Deployment, and a queue."""

    def wait(self, jobs: int) -> None:
        """So many jobs wait, and nothing else is in the queue."""
        self.queue.clear()
        self.queue.fill(jobs)

    def annotate(self, **annotations: str | None) -> None:
        named = {f"queue-scaler/{key.replace('_', '-')}": v for key, v in annotations.items()}
        self.cluster.annotate(NAME, **named)

    def roll_back(self, annotation: str, value: str) -> None:
        """As `kubectl rollout undo` puts an annotation back."""
        self.cluster.annotate(NAME, "kubectl", **{annotation: value})

    def queue_fails(self, fault: Fail, **settings: str) -> Run:
        self.queue.heal()
        self.queue.fault("count", fault)
        return self.run(TIMEOUT_SECONDS="1", **settings)

    def without_permission(self) -> Run:
        """As the scaler's account, by a Role that names another Deployment."""
        cluster = self.cluster
        cluster.load_rbac((REPOSITORY / "rbac.yaml").read_text().replace(NAME, "another"))
        config = self.directory / "as-queue-scaler"
        cluster.write_kubeconfig(config, cluster.service_account("queue-scaler"))
        return self.run(KUBECONFIG=str(config))

    def without_credentials(self) -> Run:
        environ = {**self.environment(), "NO_GCE_CHECK": "true"}
        del environ["FIRESTORE_EMULATOR_HOST"]
        return self.run_with(environ)

    def all_busy(self) -> None:
        self.queue.clear()
        for pod in self.cluster.pods(NAME):
            name = pod["metadata"]["name"]
            self.queue.put(f"jobs/{name}", {"status": "processing", "assignedPodId": name})


NO_WAITS = {"SCALE_DOWN_STABILIZATION_SECONDS": "0", "SCALE_DOWN_COOLDOWN_SECONDS": "0"}
FALLBACK = {"FALLBACK_REPLICAS": "2", "FALLBACK_AFTER_SECONDS": "0"}
DENIED = Fail(StatusCode.PERMISSION_DENIED, "Missing or insufficient permissions.")
UNAVAILABLE = Fail(StatusCode.UNAVAILABLE, "failed to connect to all addresses")
REFUSED = (
    f"deployments.apps \"{NAME}\" is forbidden: ValidatingAdmissionPolicy 'queue-scaler' with "
    "binding 'queue-scaler' denied request: queue-scaler may not set more than 20 replicas: a"
)


def nothing_works(it: Situation) -> Iterator[Run]:
    """Settings, rights, and servers that do not answer."""
    run = it.run
    yield run(MIN_REPLICAS="-1", MAX_REPLICAS="three")
    yield run(MAX_REPLICA="5")
    yield run(DEPLOYMENT="worker")
    yield run(KUBECONFIG="/nowhere")
    yield it.without_permission()
    yield it.without_credentials()
    yield run(FIRESTORE_DATABASE="missing")
    for problem in (missing_index(), DENIED, UNAVAILABLE):
        yield it.queue_fails(problem)
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
    """What people and other programs do to the Deployment."""
    cluster, run = it.cluster, it.run
    it.annotate(paused="true", last_scale_time="yesterday")
    yield run()
    it.annotate(paused=None)
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
    it.wait(0)
    yield run(SCALE_DOWN_STEP="0", **NO_WAITS)
    yield run(**NO_WAITS)
    yield run(MIN_REPLICAS="2")
    yield run(MIN_REPLICAS="1", MAX_REPLICAS="1")


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
    (3, rollout),
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
