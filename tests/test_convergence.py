"""From any state, with a queue that no longer changes, the number settles and stays, whatever goes
wrong before; the property that Sieve and Anvil test controllers for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.firestore import CountAs, Fail, FakeFirestore
from tests.support.kubernetes import FakeKubernetes, Match, answer, reset
from tests.support.kubernetes_objects import stamp
from tests.support.world import BUSY, PROJECT, START, Run, World

ANNOTATION = "queue-scaler/"
PATCH = Match("patch", "deployments")
UNREADABLE = Fail(StatusCode.UNKNOWN, "as the test wants it")

# What may go wrong in a run; each ends it, or is over within it.
FAULTS: dict[str, Callable[[FakeKubernetes, FakeFirestore], object]] = {
    "nothing": lambda cluster, queue: None,
    "no count": lambda cluster, queue: queue.fault("count", UNREADABLE),
    "an unusable count": lambda cluster, queue: queue.fault("count", CountAs(None)),
    "no login": lambda cluster, queue: queue.fault("count", Fail(StatusCode.PERMISSION_DENIED)),
    "no busy pods": lambda cluster, queue: queue.fault("query", UNREADABLE),
    "no Deployment": lambda cluster, queue: refuse(cluster, Match("get", "deployments"), 403),
    "no ReplicaSets": lambda cluster, queue: refuse(cluster, Match("list", "replicasets"), 403),
    "no pods": lambda cluster, queue: refuse(cluster, Match("list", "pods"), 403),
    "no marks": lambda cluster, queue: refuse(cluster, Match("patch", "pods"), 403),
    "no patch": lambda cluster, queue: refuse(cluster, PATCH, 422),
    "no Event": lambda cluster, queue: refuse(cluster, Match("create", "events"), 500),
    "no patch after the lease": lambda cluster, queue: cluster.fault(PATCH, answer(403), nth=2),
    "no patch after the lease, not even of it": lambda cluster, queue: cluster.fault(
        PATCH, answer(403), None, nth=2
    ),
    "a conflict": lambda cluster, queue: cluster.fault(PATCH, answer(409)),
    "a response that is lost": lambda cluster, queue: cluster.fault(PATCH, reset(applied=True)),
}


def refuse(cluster: FakeKubernetes, match: Match, status: int) -> None:
    cluster.fault(match, answer(status), times=None)


def times(*, ahead: int = 0) -> st.SearchStrategy[str]:
    written = st.integers(-1000, ahead).map(lambda s: stamp(START + timedelta(seconds=s)))
    return written | st.sampled_from(["", "yesterday", "9999-12-31T23:59:59Z", "1767225600"])


HISTORIES = st.lists(
    st.tuples(st.integers(-600, 60), st.integers(0, 8)).map(
        lambda entry: f"{int(START.timestamp()) + entry[0]}:{entry[1]}"
    ),
    max_size=5,
).map(" ".join) | st.sampled_from(["3", "x:y"])
ANNOTATIONS = st.fixed_dictionaries(
    {},
    optional={
        "last-scale-time": times(ahead=300),
        "last-scale": st.sampled_from(["up 1->2", "down 3->1", "sideways", ""]),
        "recommendations": HISTORIES,
        "queue-failing-since": times(),
    },
)
PAUSES = st.fixed_dictionaries(
    {},
    optional={
        "paused": st.sampled_from(["true", "false", "perhaps"]),
        "paused-replicas": st.sampled_from(["0", "2", "8", "lots"]),
        "paused-scale-in": st.sampled_from(["true", "false"]),
        "paused-scale-out": st.sampled_from(["true", "false"]),
    },
)
SECONDS, STEPS = st.sampled_from(["0", "60", "120"]), st.sampled_from(["", "1", "50%", "0"])


@st.composite
def variables(draw: st.DrawFn) -> dict[str, str]:
    most = draw(st.integers(1, 6))
    found = {
        "MIN_REPLICAS": str(draw(st.integers(0, most))),
        "MAX_REPLICAS": str(most),
        "JOBS_PER_POD": str(draw(st.integers(1, 3))),
        "SCALE_UP_COOLDOWN_SECONDS": draw(SECONDS),
        "SCALE_DOWN_COOLDOWN_SECONDS": draw(SECONDS),
        "SCALE_UP_STABILIZATION_SECONDS": draw(SECONDS),
        "SCALE_DOWN_STABILIZATION_SECONDS": draw(SECONDS),
        "SCALE_UP_STEP": draw(STEPS),
        "SCALE_DOWN_STEP": draw(STEPS),
        "FALLBACK_AFTER_SECONDS": draw(SECONDS),
    }
    fallback = draw(st.none() | st.integers(0, most))
    if fallback is not None:
        found["FALLBACK_REPLICAS"] = str(fallback)
    return found


@dataclass(frozen=True)
class Case:
    """Where it begins, what is in the queue, and what goes wrong in the first runs."""

    variables: dict[str, str]
    replicas: int
    waiting: int
    busy: int  # so many pods hold a job
    annotations: dict[str, str]
    pauses: dict[str, str]
    undone: bool  # a rollback restored the pauses
    faults: list[str]

    def number(self, variable: str) -> int:
        return int(self.variables[variable])

    @property
    def bound(self) -> int:
        """The most runs, a minute apart, until the number is where it stays: the windows, the
        longest cooldown twice (a time may be ahead), and a cooldown for each step."""
        cooldowns = [self.number(f"SCALE_{way}_COOLDOWN_SECONDS") for way in ("UP", "DOWN")]
        windows = [self.number(f"SCALE_{way}_STABILIZATION_SECONDS") for way in ("UP", "DOWN")]
        waits = 2 * max(cooldowns) + sum(windows)
        steps = 8 * (max(cooldowns) // 60 + 1)
        return waits // 60 + steps + 2

    @property
    def settled(self) -> int | None:
        """Where the number ends; None if something that the user disabled decides it."""
        if any(self.pauses.values()) or "0" in (
            self.variables["SCALE_UP_STEP"],
            self.variables["SCALE_DOWN_STEP"],
        ):
            return None
        if self.replicas == 0 and self.number("MIN_REPLICAS") > 0:
            return 0
        wanted = math.ceil((self.waiting + self.busy) / self.number("JOBS_PER_POD"))
        least, most = self.number("MIN_REPLICAS"), self.number("MAX_REPLICAS")
        desired = min(max(wanted, least), most)
        return desired if self.replicas <= desired else max(desired, self.busy)


CASES = st.builds(
    Case,
    variables(),
    replicas=st.integers(0, 7),
    waiting=st.integers(0, 12),
    busy=st.integers(0, 3),
    annotations=ANNOTATIONS,
    pauses=st.just({}) | PAUSES,
    undone=st.booleans(),
    faults=st.lists(st.sampled_from(list(FAULTS)), max_size=3),
).filter(lambda case: case.busy <= case.replicas)


def arrange(case: Case, cluster: FakeKubernetes, queue: FakeFirestore) -> list[str]:
    """The Deployment and the queue of a case; the names of the busy pods."""
    cluster.add_deployment("worker", replicas=case.replicas)
    cluster.annotate("worker", **{ANNOTATION + n: v for n, v in case.annotations.items()})
    pauses = {ANNOTATION + name: value for name, value in case.pauses.items()}
    cluster.edit(
        "deployments",
        "worker",
        lambda d: d["metadata"].setdefault("annotations", {}).update(pauses),
        manager="kubectl" if case.undone else "kubectl-annotate",
    )
    queue.clear()
    queue.fill(case.waiting)
    busy = [str(pod["metadata"]["name"]) for pod in cluster.pods("worker")][: case.busy]
    for pod in busy:
        queue.put(f"jobs/of-{pod}", {"status": "processing", "assignedPodId": pod})
    return busy


def run_twice(world: World) -> Run:
    """A run, and an identical one, which has nothing left to write."""
    first = world.run()
    before = world.resource_version
    again = world.run()
    assert world.resource_version == before, f"{first}\nthe same again wrote:\n{again}"
    return first


@pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_the_number_settles_and_stays(queue: FakeFirestore, tmp_path: Path, examples: int) -> None:
    assert queue.project == PROJECT

    @settings(
        max_examples=examples,
        phases=[Phase.generate],  # to make a case smaller would take minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def settle(case: Case) -> None:
        check(case, queue, tmp_path)

    settle()


def check(case: Case, queue: FakeFirestore, tmp_path: Path) -> None:
    with FakeKubernetes(seed=1) as cluster:
        busy = arrange(case, cluster, queue)
        variables = {"BUSY_FILTER": BUSY, **case.variables}
        world = World(cluster, queue, "worker", START, variables, tmp_path)
        for fault in case.faults:
            FAULTS[fault](cluster, queue)
            world.run()
            cluster.clear_faults()
            queue.heal()
            world.pass_time()
        numbers = []
        for _ in range(case.bound):
            run = world.run()
            assert run.exit_code == 0, run
            numbers.append(world.replicas)
            world.pass_time()
            if numbers[-1] == case.settled:
                break
        for seconds in (60, 60, 300, 86_400):
            last = run_twice(world)
            numbers.append(world.replicas)
            world.pass_time(seconds)
        assert len(set(numbers[-5:])) == 1, f"{numbers}\n{last}"
        assert case.settled in (None, numbers[-1]), f"{numbers} instead of {case.settled}\n{last}"
        if "paused-replicas" not in case.pauses:
            assert not set(busy) & set(cluster.deleted_pods), last
