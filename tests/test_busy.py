"""Never kill a busy worker: what a scale-down does to pods that hold a job.

Victims are chosen by the fake's ReplicaSet controller, whose rules are upstream's. Two tests at the
end count busy pods killed over random patterns of pods, with the marking and without it; run them
with `-s` to read the figures.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.conftest import Queue
from tests.support.firestore import Call, Fail, FakeFirestore, On
from tests.support.kubernetes import FakeKubernetes, Match, answer, body
from tests.support.kubernetes_objects import DELETION_COST, Object
from tests.support.world import BUSY, REPOSITORY, START, Run, World

HIGH = str(2**31 - 1)
EAGER = {
    "BUSY_FILTER": BUSY,
    "MAX_REPLICAS": "10",
    "SCALE_DOWN_COOLDOWN_SECONDS": "0",
    "SCALE_DOWN_STABILIZATION_SECONDS": "0",
}
PATCHED_POD = Match(verb="patch", resource="pods")
PATCHED_DEPLOYMENT = Match(verb="patch", resource="deployments")
SECOND_LOOK = On("query", nth=2)


@pytest.fixture
def world(world: World) -> World:
    """Five pods, busy-aware, with nothing that delays a scale-down."""
    world.settings = dict(EAGER)
    world.cluster.scale("worker", 5)
    return world


@pytest.fixture
def either(world: World, any_queue: Queue) -> tuple[World, Queue]:
    """The same world, its queue once the fake and once the official emulator."""
    world.firestore = any_queue.host
    return world, any_queue


def name_of(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def live(world: World) -> list[str]:
    """The names of the pods that are not terminating."""
    pods = world.cluster.pods(world.name)
    return [name_of(pod) for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def hold(jobs: Queue, pods: Iterable[str]) -> None:
    """Each of the pods works on a job."""
    for pod in pods:
        jobs.put(f"jobs/of-{pod}", {"status": "processing", "assignedPodId": pod})


def finish(jobs: Queue, pod: str) -> None:
    jobs.put(f"jobs/of-{pod}", {"status": "done", "assignedPodId": pod})


def marks(world: World) -> dict[str, str]:
    """The deletion cost of each pod that has one."""
    costs = {
        name_of(pod): pod["metadata"].get("annotations", {}).get(DELETION_COST)
        for pod in world.cluster.pods(world.name)
    }
    return {pod: cost for pod, cost in costs.items() if cost is not None}


def mark(world: World, pods: Iterable[str], cost: str) -> None:
    for pod in pods:
        world.cluster.set_pod(pod, annotations={DELETION_COST: cost})


def asked(world: World) -> list[str]:
    """The calls to the API server, such as `list pods`."""
    return [f"{call.verb} {call.resource}" for call in world.cluster.requests]


def queries(queue: FakeFirestore) -> list[Call]:
    return [call for call in queue.calls if call.kind in ("count", "query")]


def assert_alive(world: World, pods: Iterable[str], run: Run) -> None:
    killed = set(pods) - set(live(world))
    assert not killed, f"busy, and killed: {sorted(killed)}\n{run}"


# --- What counts as busy --------------------------------------------------------------------------


def test_no_waiting_and_three_running_jobs_keep_the_three_pods_that_work(
    world: World, queue: FakeFirestore
) -> None:
    busy = live(world)[1:4]
    hold(queue, busy)
    run = world.run()
    assert (run.reason, run.record["busy"], world.replicas) == ("ScaledDown", 3, 3), run
    assert sorted(live(world)) == sorted(busy), run
    world.pass_time()
    assert world.run().reason == "AtTarget"


def test_a_job_of_a_pod_that_is_gone_holds_nothing_up(world: World, queue: FakeFirestore) -> None:
    hold(queue, ["worker-of-last-week", "worker-of-yesterday"])
    run = world.run()
    assert (run.record["busy"], world.replicas) == (0, 1), run


def test_a_job_of_a_terminating_pod_holds_nothing_up(world: World, queue: FakeFirestore) -> None:
    world.cluster.keep_terminating()
    world.cluster.scale("worker", 3)
    hold(queue, world.cluster.deleted_pods)
    assert len(world.cluster.pods("worker")) == 5, "two are still terminating"
    run = world.run()
    assert (run.record["busy"], world.replicas) == (0, 1), run


def test_pods_that_share_only_a_label_with_the_deployment_are_not_its_pods(
    world: World, queue: FakeFirestore
) -> None:
    """`matchExpressions` of every operator, beside `matchLabels`."""
    expressions = [
        {"key": "tier", "operator": "In", "values": ["batch", "bulk"]},
        {"key": "tier", "operator": "NotIn", "values": ["web"]},
        {"key": "team", "operator": "Exists"},
        {"key": "legacy", "operator": "DoesNotExist"},
    ]
    labels = {"app": "worker", "tier": "batch", "team": "a"}
    world.name = "picky"
    world.cluster.add_deployment(
        "picky",
        replicas=4,
        labels=labels,
        selector={"matchLabels": {"app": "worker"}, "matchExpressions": expressions},
    )
    for number, other in enumerate(({"tier": "web"}, {"legacy": "yes"}, {"app": "other"})):
        world.cluster.add_pod(f"decoy-{number}", {**labels, **other})
    world.cluster.add_pod("decoy-3", {"app": "worker", "tier": "batch"})
    world.cluster.add_pod("decoy-4", labels, namespace="other")
    busy = live(world)[:2]
    hold(queue, [*busy, *(f"decoy-{number}" for number in range(5))])
    run = world.run()
    assert (run.record["busy"], world.replicas) == (2, 2), run
    assert sorted(live(world)) == sorted(busy), run


def test_pods_of_others_with_the_same_labels_neither_count_nor_stand_in_the_way(
    world: World, queue: FakeFirestore
) -> None:
    """One of a Job, and one that somebody made by hand."""
    busy = live(world)[1]
    for name in ("migration", "by-hand"):
        world.cluster.add_pod(name, {"app": "worker"})
        mark(world, [name], "5")
    world.cluster.edit("pods", "by-hand", lambda pod: pod["metadata"].pop("ownerReferences"))
    hold(queue, [busy, "migration", "by-hand"])
    run = world.run()
    assert (run.record["busy"], live(world)) == (1, [busy]), run
    assert {call.name for call in world.cluster.calls(PATCHED_POD)} == {busy}, run


# --- What a scale-down leaves ---------------------------------------------------------------------

PRESSED = {
    "a lower MAX_REPLICAS": ({"MAX_REPLICAS": "2"}, "TooManyReplicas"),
    "many jobs a pod, in one step, to none": (
        {"JOBS_PER_POD": "10", "SCALE_DOWN_STEP": "100%", "MIN_REPLICAS": "0"},
        "ScaledDown",
    ),
}


@pytest.mark.parametrize(("settings", "reason"), PRESSED.values(), ids=PRESSED.keys())
def test_a_scale_down_never_goes_below_the_busy_pods(
    world: World, queue: FakeFirestore, settings: dict[str, str], reason: str
) -> None:
    busy = live(world)[:4]
    hold(queue, busy)
    run = world.run(**settings)
    assert (run.reason, sorted(live(world))) == (reason, sorted(busy)), run
    world.pass_time()
    again = world.run(**settings)
    assert (again.reason, world.replicas) == ("WorkersBusy", 4), again


def test_where_all_are_busy_nothing_is_written_and_the_reason_says_so(
    world: World, queue: FakeFirestore
) -> None:
    hold(queue, live(world))
    before = world.resource_version
    run = world.run(JOBS_PER_POD="10")
    assert (run.exit_code, run.reason, world.replicas) == (0, "WorkersBusy", 5), run
    assert (world.resource_version, marks(world)) == (before, {}), run


@pytest.mark.parametrize(("ordered", "killed"), [(3, 0), (2, 1), (0, 3)])
def test_an_order_of_paused_replicas_is_met_exactly_and_idle_pods_go_first(
    world: World, queue: FakeFirestore, ordered: int, killed: int
) -> None:
    busy = live(world)[:3]
    hold(queue, busy)
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": str(ordered)})
    run = world.run()
    assert (run.reason, world.replicas, len(live(world))) == ("Paused", ordered, ordered), run
    assert len(set(busy) - set(live(world))) == killed, run


def test_a_dry_run_marks_nothing(world: World, queue: FakeFirestore) -> None:
    hold(queue, live(world)[:3])
    run = world.run("--dry-run")
    assert (run.reason, run.record["action"], world.replicas) == ("ScaledDown", "scale-down", 5)
    assert (marks(world), asked(world)) == ({}, ["get deployments", "list pods"]), run


def test_marks_are_set_only_where_they_differ(world: World, queue: FakeFirestore) -> None:
    marked, unmarked, stale, negative, _ = live(world)
    hold(queue, [marked, unmarked])
    mark(world, [marked, stale], HIGH)
    mark(world, [negative], "-7")
    world.cluster.hook(PATCHED_DEPLOYMENT, lambda _: costs.update(marks(world)))
    costs: dict[str, str] = {}
    run = world.run()
    assert costs == {marked: HIGH, unmarked: HIGH, stale: "0", negative: "0"}, run
    assert {call.name for call in world.cluster.calls(PATCHED_POD)} == {unmarked, stale, negative}
    assert sorted(live(world)) == sorted([marked, unmarked]), run


# --- What happens meanwhile -----------------------------------------------------------------------


def test_a_job_claimed_between_the_marking_and_the_patch_protects_its_pod(
    world: World, queue: FakeFirestore
) -> None:
    *busy, late, _, _ = live(world)
    hold(queue, busy)
    world.cluster.hook(  # the second and last mark
        replace(PATCHED_POD, name=busy[1]), lambda _: hold(queue, [late]), "after"
    )
    run = world.run()
    assert sorted(live(world)) == sorted([*busy, late]), run


def test_a_pod_that_finishes_while_another_claims_costs_neither_of_the_busy_ones(
    world: World, queue: FakeFirestore
) -> None:
    """The one that finished still carries the mark, and would outlive the others by its age."""
    world.cluster.scale("worker", 3)
    stays, finishes, claims = live(world)
    world.cluster.set_pod(finishes, created=START - timedelta(days=99), ready_since=START)
    hold(queue, [stays, finishes])

    def meanwhile(_: Call) -> None:
        finish(queue, finishes)
        hold(queue, [claims])

    queue.hook(SECOND_LOOK, meanwhile)
    run = world.run()
    assert_alive(world, [stays, claims], run)
    world.pass_time()
    world.run()
    assert sorted(live(world)) == sorted([stays, claims]), "the next run takes the idle one"


def test_after_a_conflict_the_busy_pods_are_read_afresh(world: World, queue: FakeFirestore) -> None:
    busy, late = live(world)[:2]
    hold(queue, [busy])

    def interfere(_: object) -> None:
        hold(queue, [late])
        world.cluster.annotate("worker", team="a")

    world.cluster.hook(PATCHED_DEPLOYMENT, interfere)
    run = world.run()
    assert [call.status for call in world.cluster.calls(PATCHED_DEPLOYMENT)] == [409, 200], run
    assert sorted(live(world)) == sorted([busy, late]), run


@pytest.mark.parametrize("status", ["idle", "busy"])
def test_a_pod_that_somebody_deletes_meanwhile_is_no_error(
    world: World, queue: FakeFirestore, status: str
) -> None:
    busy, other = live(world)[:2]
    hold(queue, [busy])
    mark(world, [other], HIGH)  # so that the idle one has to be marked, too
    gone = other if status == "idle" else busy

    def delete(_: object) -> None:
        path = f"/api/v1/namespaces/default/pods/{gone}"
        world.cluster.handle("DELETE", path, b"", {"authorization": f"Bearer {token}"})

    token = world.cluster.admin_token
    world.cluster.hook(replace(PATCHED_POD, name=gone), delete)
    run = world.run()
    assert 404 in [call.status for call in world.cluster.calls(PATCHED_POD)], run
    assert (run.exit_code, world.replicas) == (0, 1), run
    if status == "idle":
        assert live(world) == [busy], run


# --- What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "others"), [("list", "patch"), ("patch", "list")])
def test_without_permission_for_pods_nothing_is_scaled_down(
    world: World, queue: FakeFirestore, tmp_path: Path, verb: str, others: str
) -> None:
    rbac = (REPOSITORY / "rbac.yaml").read_text().replace("eventstorming-generator", "worker")
    assert "verbs: [list, patch]" in rbac
    world.cluster.load_rbac(rbac.replace("verbs: [list, patch]", f"verbs: [{others}]"))
    token = world.cluster.service_account("queue-scaler")
    hold(queue, live(world)[:2])
    run = world.run(KUBECONFIG=str(world.cluster.write_kubeconfig(tmp_path / "limited", token)))
    assert (run.exit_code, run.reason, world.replicas) == (2, "Forbidden", 5), run
    assert f"allow {verb} on pods" in run.record["message"]


@pytest.mark.parametrize("nth", [1, 2], ids=["first", "second"])
def test_if_a_look_at_the_busy_pods_fails_nothing_is_removed(
    world: World, queue: FakeFirestore, nth: int
) -> None:
    hold(queue, live(world)[:2])
    queue.fault(On("query", nth=nth), Fail(StatusCode.PERMISSION_DENIED, "no"))
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas) == (2, "Forbidden", 5), run


def test_if_a_pod_cannot_be_marked_nothing_is_removed(world: World, queue: FakeFirestore) -> None:
    busy = live(world)[:2]
    hold(queue, busy)
    world.cluster.fault(replace(PATCHED_POD, name=busy[1]), answer(503), times=None)
    run = world.run(TIMEOUT_SECONDS="3")
    assert (run.exit_code, run.reason, world.replicas) == (1, "ClusterUnavailable", 5), run


# --- Pods that the ReplicaSet controller removes before it looks at any cost ----------------------

WEAK: dict[str, Object] = {
    "not ready": {"ready": False},
    "pending": {"ready": False, "phase": "Pending"},
    "unknown": {"phase": "Unknown"},
    "unassigned": {"ready": False, "phase": "Pending", "node": ""},
}


@pytest.mark.parametrize("state", WEAK.values(), ids=WEAK.keys())
def test_a_busy_pod_that_would_go_before_idle_ones_keeps_them_all(
    world: World, queue: FakeFirestore, state: Object
) -> None:
    busy = live(world)[2]
    hold(queue, [busy])
    world.cluster.set_pod(busy, **state)
    run = world.run()
    assert (run.reason, world.replicas) == ("WorkersBusy", 5), run
    world.cluster.set_pod(busy, ready=True, phase="Running", node="node-a")
    run = world.run()
    assert live(world) == [busy], run


@pytest.mark.parametrize("state", WEAK.values(), ids=WEAK.keys())
def test_idle_pods_that_stand_no_higher_than_the_busy_one_may_still_go(
    world: World, queue: FakeFirestore, state: Object
) -> None:
    busy, same, lower, *ready = live(world)
    hold(queue, [busy])
    for pod in (busy, same):
        world.cluster.set_pod(pod, **state)
    world.cluster.set_pod(lower, ready=False, phase="Pending", node="")
    run = world.run()
    assert sorted(live(world)) == sorted([busy, *ready]), run


def test_in_the_middle_of_a_rollout_nothing_is_removed_while_a_pod_is_busy(
    world: World, queue: FakeFirestore
) -> None:
    world.cluster.start_rollout("worker", new_pods=2, old_pods=4)
    busy = live(world)[1]
    hold(queue, [busy])
    run = world.run()
    assert (run.reason, world.replicas, len(live(world))) == ("WorkersBusy", 5, 6), run
    finish(queue, busy)
    run = world.run()
    assert (run.reason, world.replicas) == ("ScaledDown", 1), run


# --- What it costs --------------------------------------------------------------------------------


def test_a_run_that_changes_nothing_costs_two_calls_and_two_counts_for_thirty_pods(
    world: World, queue: FakeFirestore
) -> None:
    world.cluster.scale("worker", 30)
    hold(queue, live(world))
    world.cluster.requests.clear()
    run = world.run(MAX_REPLICAS="30")
    assert run.reason == "AtTarget", run
    assert asked(world) == ["get deployments", "list pods"]
    assert [call.kind for call in queries(queue)] == ["count", "count"]
    assert [call.reads_billed for call in queries(queue)] == [1, 1]


@pytest.mark.parametrize(
    "wait",
    [{"SCALE_DOWN_COOLDOWN_SECONDS": "300"}, {"SCALE_DOWN_STABILIZATION_SECONDS": "300"}],
    ids=["cooldown", "stabilization"],
)
def test_no_document_is_read_and_no_pod_marked_while_a_scale_down_waits(
    world: World, queue: FakeFirestore, wait: dict[str, str]
) -> None:
    hold(queue, live(world)[:2])
    world.cluster.annotate("worker", **{"queue-scaler/last-scale-time": START.isoformat()})
    run = world.run(**wait)
    assert run.record["action"] == "none", run
    assert [call.kind for call in queries(queue)] == ["count", "count"]
    assert not world.cluster.calls(PATCHED_POD)


def test_a_scale_down_costs_a_call_for_each_mark_and_four_more(
    world: World, queue: FakeFirestore
) -> None:
    hold(queue, live(world)[:3])
    world.cluster.requests.clear()
    run = world.run()
    assert asked(world) == [
        "get deployments",
        "list pods",
        *["patch pods"] * 3,
        "patch deployments",
        "create events",
    ], run
    looks = [call.select for call in queries(queue) if call.kind == "query"]
    assert looks == [("assignedPodId",)] * 2, "of a job only the field with its pod is read"


def test_two_hundred_pods_are_asked_about_thirty_at_a_time(
    world: World, queue: FakeFirestore
) -> None:
    world.cluster.scale("worker", 200)
    busy = live(world)[::3]
    hold(queue, busy)
    world.cluster.requests.clear()
    run = world.run(MAX_REPLICAS="200")
    assert (run.record["busy"], sorted(live(world))) == (len(busy), sorted(busy)), run
    assert len(asked(world)) == len(busy) + 4 <= 200 + 4
    assert Counter(call.kind for call in queries(queue)) == {"count": 1 + 7, "query": 2 * 7}
    assert max(disjunctions(call) for call in queries(queue)) == 30


def disjunctions(call: Call) -> int:
    """How many cases a query stands for: the product of its lists."""
    product = 1
    for _, op, value in call.filters:
        if op in ("in", "array-contains-any"):
            assert isinstance(value, list | tuple)
            product *= len(value)
    return product


# --- Queries, on the fake and on the official emulator --------------------------------------------


def test_the_pods_that_hold_jobs_are_found(either: tuple[World, Queue]) -> None:
    world, jobs = either
    busy = live(world)[1:4]
    hold(jobs, [*busy, "gone"])
    run = world.run()
    assert (run.record["busy"], sorted(live(world))) == (3, sorted(busy)), run


def test_lists_in_the_busy_filter_share_the_limit_of_thirty(either: tuple[World, Queue]) -> None:
    world, jobs = either
    world.cluster.scale("worker", 35)
    busy = live(world)[::6]
    for number, pod in enumerate(busy):
        status = ("processing", "retrying", "paused")[number % 3]
        jobs.put(f"jobs/{pod}", {"status": status, "assignedPodId": pod, "lane": number % 2})
    lists = [["status", "in", ["processing", "retrying", "paused"]], ["lane", "in", [0, 1]]]
    run = world.run(MAX_REPLICAS="35", BUSY_FILTER=json.dumps(lists))
    assert (run.record["busy"], sorted(live(world))) == (len(busy), sorted(busy)), run


@pytest.mark.parametrize("condition", [["attempt", ">", 0], ["lane", "!=", "test"]])
def test_a_busy_filter_may_compare(either: tuple[World, Queue], condition: list[object]) -> None:
    world, jobs = either
    busy, other = live(world)[:2]
    jobs.put("jobs/1", {"attempt": 1, "lane": "live", "assignedPodId": busy})
    jobs.put("jobs/2", {"attempt": 0, "lane": "test", "assignedPodId": other})
    run = world.run(BUSY_FILTER=json.dumps([condition]))
    assert (run.record["busy"], live(world)) == (1, [busy]), run


@pytest.mark.parametrize("name", ["worker.pod", "worker.`pod-name`"])
def test_the_pods_name_may_lie_deeper_in_the_document(
    either: tuple[World, Queue], name: str
) -> None:
    world, jobs = either
    busy = live(world)[3]
    inner = name.removeprefix("worker.").strip("`")
    jobs.put("jobs/1", {"status": "processing", "worker": {inner: busy, "node": "node-a"}})
    run = world.run(BUSY_POD_FIELD=name)
    assert (run.record["busy"], live(world)) == (1, [busy]), run


# --- Any pattern of pods: busy pods killed, with the marking and without --------------------------


@dataclass(frozen=True)
class State:
    """One pod as a pattern has it. `meanwhile`: it claims or finishes between the two looks."""

    busy: bool
    ready: bool
    phase: str
    node: str
    cost: str | None
    age_minutes: int
    restarts: int
    meanwhile: bool

    @property
    def busy_at_last(self) -> bool:
        return self.busy != self.meanwhile


OFTEN_READY = st.sampled_from([True, True, True, True, True, False])
OFTEN_RUNNING = st.sampled_from(["Running"] * 8 + ["Pending", "Unknown"])
STATES = st.builds(
    State,
    busy=st.booleans(),
    ready=OFTEN_READY,
    phase=OFTEN_RUNNING,
    node=st.sampled_from(["node-a"] * 4 + ["node-b"] * 3 + [""]),
    cost=st.sampled_from([None, None, "0", "-5", "100", HIGH]),
    age_minutes=st.integers(0, 10_000),
    restarts=st.integers(0, 3),
    meanwhile=st.sampled_from([False] * 6 + [True]),
)
HEALTHY = st.builds(
    replace, STATES, ready=st.just(True), phase=st.just("Running"), node=st.just("node-a")
)


@dataclass
class Tally:
    """What became of busy pods, over many patterns."""

    patterns: int = 0
    busy: int = 0
    killed: int = 0
    removed: int = 0
    scaled_down: int = 0

    def add(self, states: Mapping[str, State], removed: Iterable[str]) -> None:
        gone = set(removed)
        busy = {pod for pod, state in states.items() if state.busy_at_last}
        self.patterns += 1
        self.busy += len(busy)
        self.killed += len(busy & gone)
        self.removed += len(gone)
        self.scaled_down += bool(gone)

    def __str__(self) -> str:
        return (
            f"busy pods killed: {self.killed} of {self.busy} ({self.patterns} patterns, "
            f"{self.scaled_down} of them scaled down, {self.removed} pods removed)"
        )


def arrange(world: World, queue: FakeFirestore, pattern: list[State]) -> dict[str, State]:
    """Make pods and jobs as the pattern says; some change their minds at the second look."""
    queue.clear()
    queue.heal()
    world.cluster.scale("worker", len(pattern))
    states = dict(zip(live(world), pattern, strict=True))
    now = datetime.now(UTC)
    for pod, state in states.items():
        world.cluster.set_pod(
            pod,
            ready=state.ready,
            phase=state.phase,
            node=state.node,
            annotations={DELETION_COST: state.cost},
            created=now - timedelta(minutes=state.age_minutes),
            ready_since=now - timedelta(minutes=state.age_minutes // 2),
            restarts=state.restarts,
        )
    hold(queue, [pod for pod, state in states.items() if state.busy])

    def meanwhile(_: Call) -> None:
        for pod, state in states.items():
            if state.meanwhile and state.busy:
                finish(queue, pod)
            elif state.meanwhile:
                hold(queue, [pod])

    queue.hook(SECOND_LOOK, meanwhile)
    return states


@dataclass(frozen=True)
class Case:
    """A pattern of pods and what makes a scaler remove some; `seed` settles ties."""

    pattern: list[State]
    jobs_per_pod: str
    seed: int


CASES = st.builds(
    Case,
    st.lists(HEALTHY, min_size=2, max_size=12) | st.lists(STATES, min_size=2, max_size=12),
    st.sampled_from(["1", "2", "10"]),
    st.integers(0, 99),
)


def try_case(
    case: Case, queue: FakeFirestore, directory: Path, run: Callable[[World], object], tally: Tally
) -> str:
    """Scale one pattern down as far as the rules let it. What is wrong with what came of it."""
    with FakeKubernetes(seed=case.seed) as cluster:
        cluster.add_deployment("worker", replicas=0)
        eager = {**EAGER, "MAX_REPLICAS": "12", "JOBS_PER_POD": case.jobs_per_pod}
        world = World(cluster, queue.host, now=START, settings=eager, directory=directory)
        states = arrange(world, queue, case.pattern)
        ended = run(world)
        tally.add(states, cluster.deleted_pods)
        killed = [pod for pod in cluster.deleted_pods if states[pod].busy_at_last]
        if killed:
            return f"busy, and killed: {killed}\n{ended}"
        if len(cluster.requests) > len(states) + 4:
            return f"more than pods + 4 calls: {asked(world)}\n{ended}"
        return ""


EVERY = hypothesis_settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_pods_of_another_deployment_under_the_same_labels_are_not_its_own(
    world: World, queue: FakeFirestore
) -> None:
    """A canary beside the stable pods: `app=worker` selects both Deployments' pods."""
    world.cluster.add_deployment(
        "worker-canary", labels={"app": "worker", "track": "canary"}, replicas=1
    )
    canary = str(world.cluster.pods("worker-canary")[0]["metadata"]["name"])
    hold(queue, [canary])
    world.cluster.scale("worker", 3)
    run = world.run(**EAGER)
    assert (run.reason, world.replicas) == ("ScaledDown", 1), run
    marked = [call.name for call in world.cluster.calls(Match("patch", "pods"))]
    assert canary not in marked and run.record["busy"] == 0


def test_waiting_and_busy_jobs_are_counted_at_one_moment(
    world: World, queue: FakeFirestore
) -> None:
    """Nothing is asked of the API server between the two, and nothing of the queue before it."""
    asked: list[tuple[str, int]] = []

    def note(what: str, is_busy: bool) -> None:
        about = On(
            "count", where=lambda call: any(op == "in" for _, op, _ in call.filters) == is_busy
        )
        queue.hook(about, lambda _: asked.append((what, len(world.cluster.requests))))

    note("waiting", False)
    note("busy", True)
    world.run(**EAGER)
    assert asked == [("waiting", 2), ("busy", 2)], "after the Deployment and its pods"


@pytest.mark.slow
def test_no_busy_pod_is_killed_over_many_patterns_and_many_are_without_the_marking(
    queue: FakeFirestore, tmp_path: Path
) -> None:
    """Each pattern twice: with the scaler as it is, and with one whose marks go nowhere."""
    marked, unmarked = Tally(), Tally()

    def believing_it_marks(world: World) -> Run:
        world.cluster.fault(PATCHED_POD, body(b"{}", applied=False), times=None)
        return world.run()

    @EVERY
    @given(CASES)
    def try_both(case: Case) -> None:
        problem = try_case(case, queue, tmp_path, World.run, marked)
        assert not problem, problem
        try_case(case, queue, tmp_path, believing_it_marks, unmarked)

    try_both()
    print(f"\nwith marking     {marked}\nwithout marking  {unmarked}")
    assert marked.killed == 0
    assert marked.scaled_down > 20, "or it proves little"
    assert unmarked.killed > 0, "or it proves nothing"
