"""The simulator, held against the real script, against the windows' model, and by hand."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import scaler
from tests.support.firestore import FakeFirestore
from tests.support.kubernetes import FakeKubernetes
from tests.support.world import BUSY, PROJECT, START, World
from tools import simulate
from tools.simulate import Job

AWARE = {"BUSY_FILTER": BUSY}
BEGIN = int(START.timestamp())


def settings(environ: Mapping[str, str]) -> scaler.Settings:
    return scaler.read_settings({"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs", **environ})


def random_jobs(number: int, seconds: int, seed: int = 1) -> list[Job]:
    """Jobs in bursts and alone, in whole seconds, of 20 s to an hour."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    while len(jobs) < number:
        created = BEGIN + rng.randrange(seconds)
        for _ in range(rng.choice((1, 1, 1, 2, 15))):
            length = int(min(3600, max(20, rng.lognormvariate(5.5, 1))))
            jobs.append(Job(created, created, created + length))
    return sorted(jobs[:number], key=lambda job: job.created)


class NewestFirst(random.Random):
    """Which of equal pods goes is luck; this one goes for the newest, as the simulator does."""

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        return list(reversed(population))[:k]


@dataclass
class Naive:
    """The same jobs on the fake's pods, second by second."""

    cluster: FakeKubernetes
    queue: FakeFirestore
    jobs: Sequence[Job]
    pod_start: int
    status: list[str] = field(default_factory=list)  # of each job that has been created
    ready_at: dict[str, int] = field(default_factory=dict)  # by pod, the oldest first
    working: dict[str, tuple[int, int]] = field(default_factory=dict)  # by pod: job, end

    def see_pods(self, now: int, pod_start: int) -> None:
        """New pods are on a node of their own; jobs of pods that went wait again."""
        there = {pod["metadata"]["name"] for pod in self.cluster.pods("worker")}
        for name in there - self.ready_at.keys():
            self.ready_at[name] = now + pod_start
            self.cluster.set_pod(name, node=name, ready=False, phase="Pending")
        for name in self.ready_at.keys() - there:
            del self.ready_at[name]
            if name in self.working:
                self.status[self.working.pop(name)[0]] = "waiting"

    def work(self, now: int) -> None:
        """What happens in this second."""
        while len(self.status) < len(self.jobs) and self.jobs[len(self.status)].created <= now:
            self.status.append("waiting")
        for pod, (job, end) in list(self.working.items()):
            if end == now:
                self.status[job] = "done"
                del self.working[pod]
        for pod, ready_at in self.ready_at.items():
            if ready_at == now:
                since = START + timedelta(seconds=now - BEGIN)
                self.cluster.set_pod(pod, ready=True, phase="Running", ready_since=since)
            if ready_at <= now and pod not in self.working and "waiting" in self.status:
                job = self.status.index("waiting")
                self.status[job] = "processing"
                self.working[pod] = job, now + int(self.jobs[job].seconds)

    def show(self) -> None:
        """The queue as it is now."""
        self.queue.clear()
        pods = {job: pod for pod, (job, _) in self.working.items()}
        for job, status in enumerate(self.status):
            if status != "done":
                self.queue.put(f"jobs/{job}", {"status": status, "assignedPodId": pods.get(job)})


def real_replicas(
    jobs: Sequence[Job], environ: Mapping[str, str], pod_start: int, looks: int, directory: Path
) -> Iterator[int]:
    """The replicas after each run of the real script."""
    now = BEGIN
    with (
        FakeKubernetes(clock=lambda: START + timedelta(seconds=now - BEGIN)) as cluster,
        FakeFirestore(project=PROJECT) as queue,
    ):
        cluster.store.rng = NewestFirst(1)
        cluster.add_deployment("worker", replicas=int(environ.get("MIN_REPLICAS", "1")))
        world = World(cluster, queue, "worker", START, dict(environ), directory)
        naive = Naive(cluster, queue, jobs, pod_start)
        naive.see_pods(now, 0)
        for _ in range(looks):
            naive.work(now)
            naive.show()
            run = world.run()
            assert run.exit_code == 0, run
            naive.see_pods(now, pod_start)
            naive.work(now)
            replicas = world.replicas
            assert replicas is not None
            yield replicas
            for now in range(now + 1, now + 61):  # noqa: B020
                naive.work(now)
            world.pass_time()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "pod_start", "looks"),
    [
        ({**AWARE, "MAX_REPLICAS": "8"}, 45, 1440),
        ({"MAX_REPLICAS": "8", "SCALE_DOWN_STABILIZATION_SECONDS": "120"}, 45, 300),
        (
            {
                **AWARE,
                "MIN_REPLICAS": "0",
                "MAX_REPLICAS": "10",
                "JOBS_PER_POD": "3",
                "SCALE_UP_STABILIZATION_SECONDS": "60",
                "SCALE_DOWN_COOLDOWN_SECONDS": "60",
                "SCALE_UP_STEP": "50%",
                "SCALE_DOWN_STEP": "2",
                "SCHEDULED_MIN_REPLICAS": "4 Thu 02:00-03:00 UTC",
            },
            100,
            300,
        ),
    ],
    ids=["a day", "without a busy filter", "other settings"],
)
def test_the_replicas_are_those_of_the_real_script(
    environ: dict[str, str], pod_start: int, looks: int, tmp_path: Path
) -> None:
    jobs = [Job(BEGIN, BEGIN, BEGIN + 60), *random_jobs(looks // 4, looks * 50)]
    outcome = simulate.simulate("", settings(environ), jobs, pod_start)
    begun = time.monotonic()
    real = list(real_replicas(jobs, environ, pod_start, looks, tmp_path))
    print(f"{looks} runs in {time.monotonic() - begun:.0f} s")
    ours = [point.pods for point in outcome.panel.points]
    ours += [ours[-1]] * (looks - len(ours))
    assert ours[:looks] == real
    assert len(set(real)) > 4, "the test is of a load that changes"
