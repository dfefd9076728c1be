"""Never kill a busy worker: what a scale-down does to pods that hold a job.

Victims are chosen by the fake's ReplicaSet controller, whose rules are upstream's. What a run does
where a call fails stands in the matrix of test_faults.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.conftest import Queue
from tests.support.firestore import Call, FakeFirestore, On
from tests.support.kubernetes import FakeKubernetes, Match
from tests.support.kubernetes_objects import DELETION_COST, Object
from tests.support.world import BUSY, START, World

HIGH = str(2**31 - 1)
EAGER = {
    "BUSY_FILTER": BUSY,
    "MAX_REPLICAS": "10",
    "SCALE_DOWN_COOLDOWN_SECONDS": "0",
    "SCALE_DOWN_STABILIZATION_SECONDS": "0",
}
PATCHED_POD, PATCHED_DEPLOYMENT = Match("patch", "pods"), Match("patch", "deployments")
SECOND_LOOK = On("query", nth=2)
Either = tuple[World, Queue]


@pytest.fixture
def world(world: World) -> World:
    """Five pods, busy-aware, with nothing that delays a scale-down."""
    world.settings = dict(EAGER)
    world.cluster.scale("worker", 5)
    return world


@pytest.fixture
def either(world: World, any_queue: Queue) -> Either:
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


def finish(jobs: Queue, pods: Iterable[str]) -> None:
    for pod in pods:
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


# --- What counts as busy --------------------------------------------------------------------------


def test_no_waiting_and_three_running_jobs_keep_three_pods(either: Either) -> None:
    world, jobs = either
    busy = live(world)[1:4]
    hold(jobs, [*busy, "worker-of-last-week"])
    run = world.run()
    assert (run.reason, run.record["busy"], world.replicas) == ("ScaledDown", 3, 3), run
    assert sorted(live(world)) == sorted(busy), run
    world.pass_time()
    assert world.run().reason == "AtTarget"


def test_a_job_of_a_terminating_pod_holds_nothing_up(world: World) -> None:
    world.cluster.keep_terminating()
    world.cluster.scale("worker", 3)
    hold(world.queue, world.cluster.deleted_pods)
    assert len(world.cluster.pods("worker")) == 5, "two are still terminating"
    run = world.run()
    assert (run.record["busy"], world.replicas) == (0, 1), run


def test_a_selector_may_have_expressions_of_every_operator(world: World) -> None:
    expressions = [
        {"key": "tier", "operator": "In", "values": ["batch", "bulk"]},
        {"key": "tier", "operator": "NotIn", "values": ["web"]},
        {"key": "team", "operator": "Exists"},
        {"key": "legacy", "operator": "DoesNotExist"},
    ]
    selector = {"matchLabels": {"app": "picky"}, "matchExpressions": expressions}
    labels = {"app": "picky", "tier": "batch", "team": "a"}
    world.cluster.add_deployment("picky", replicas=4, labels=labels, selector=selector)
    world.name = "picky"
    busy = live(world)[:2]
    hold(world.queue, busy)
    run = world.run()
    assert (run.record["busy"], sorted(live(world))) == (2, sorted(busy)), run
    [listed] = world.cluster.calls(Match("list", "pods"))
    expected = "app=picky,tier in (batch,bulk),tier notin (web),team,!legacy"
    assert listed.query == {"labelSelector": expected}


def test_pods_of_others_with_the_same_labels_are_left_alone(world: World) -> None:
    """One of a Job, one that somebody made by hand, and a canary: a Deployment whose pods this
    one's selector takes in."""
    busy = live(world)[1]
    for name in ("migration", "by-hand"):
        world.cluster.add_pod(name, {"app": "worker"})
        mark(world, [name], "5")
    world.cluster.edit("pods", "by-hand", lambda pod: pod["metadata"].pop("ownerReferences"))
    world.cluster.add_deployment("worker-canary", labels={"app": "worker", "track": "canary"})
    [canary] = map(name_of, world.cluster.pods("worker-canary"))
    hold(world.queue, [busy, "migration", "by-hand", canary])
    run = world.run()
    assert (run.reason, run.record["busy"], live(world)) == ("ScaledDown", 1, [busy]), run
    assert {call.name for call in world.cluster.calls(PATCHED_POD)} == {busy}, run


# --- What a scale-down leaves ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"MAX_REPLICAS": "2"}, "TooManyReplicas"),
        ({"JOBS_PER_POD": "10", "SCALE_DOWN_STEP": "100%", "MIN_REPLICAS": "0"}, "ScaledDown"),
    ],
)
def test_a_scale_down_never_goes_below_the_busy_pods(
    world: World, settings: dict[str, str], reason: str
) -> None:
    busy = live(world)[:4]
    hold(world.queue, busy)
    run = world.run(**settings)
    assert (run.reason, sorted(live(world))) == (reason, sorted(busy)), run
    world.pass_time()
    before, marked = world.resource_version, len(world.cluster.calls(PATCHED_POD))
    again = world.run(**settings)
    assert (again.exit_code, again.reason, world.replicas) == (0, "WorkersBusy", 4), again
    assert world.resource_version == before, "where all are busy nothing is written"
    assert len(world.cluster.calls(PATCHED_POD)) == marked


@pytest.mark.parametrize(("ordered", "killed"), [(3, 0), (2, 1), (0, 3)])
def test_an_order_is_met_exactly_and_idle_pods_go_first(
    world: World, ordered: int, killed: int
) -> None:
    busy = live(world)[:3]
    hold(world.queue, busy)
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": str(ordered)})
    run = world.run()
    assert (run.reason, world.replicas, len(live(world))) == ("Paused", ordered, ordered), run
    assert len(set(busy) - set(live(world))) == killed, run


def test_a_dry_run_marks_nothing(world: World) -> None:
    hold(world.queue, live(world)[:3])
    run = world.run("--dry-run")
    assert (run.reason, run.record["action"], world.replicas) == ("ScaledDown", "scale-down", 5)
    assert (marks(world), asked(world)) == ({}, ["get deployments", "list pods"]), run


def test_marks_are_set_only_where_they_differ(world: World) -> None:
    marked, unmarked, stale, negative, _ = live(world)
    hold(world.queue, [marked, unmarked])
    mark(world, [marked, stale], HIGH)
    mark(world, [negative], "-7")
    costs: dict[str, str] = {}
    world.cluster.hook(PATCHED_DEPLOYMENT, lambda _: costs.update(marks(world)))
    run = world.run()
    assert costs == {marked: HIGH, unmarked: HIGH, stale: "0", negative: "0"}, run
    assert {call.name for call in world.cluster.calls(PATCHED_POD)} == {unmarked, stale, negative}
    assert sorted(live(world)) == sorted([marked, unmarked]), run


# --- What happens meanwhile -----------------------------------------------------------------------


def test_a_job_claimed_between_the_marking_and_the_patch_protects_its_pod(world: World) -> None:
    *busy, late, _, _ = live(world)
    hold(world.queue, busy)
    world.cluster.hook(  # the second and last mark
        replace(PATCHED_POD, name=busy[1]), lambda _: hold(world.queue, [late]), "after"
    )
    run = world.run()
    assert sorted(live(world)) == sorted([*busy, late]), run


def test_a_scale_down_waits_where_it_would_take_more_than_one_mark_a_pod(world: World) -> None:
    """Each pod had to be marked, and then one takes a job: the next run has fewer marks to make."""
    pods = live(world)
    mark(world, pods, "7")
    last = replace(PATCHED_POD, name=pods[-1])
    world.cluster.hook(last, lambda _: hold(world.queue, [pods[0]]), "after")
    run = world.run()
    assert run.reason == "WorkersBusy" and "while the pods were marked" in run.stdout, run
    assert live(world) == pods and len(world.cluster.calls(PATCHED_POD)) == len(pods)
    assert world.run().reason == "ScaledDown" and pods[0] in live(world)


@pytest.mark.parametrize("order", [None, "2"])
def test_one_pod_finishes_while_another_claims(world: World, order: str | None) -> None:
    """The one that finished still carries the mark, and would outlive the others by its age. It
    goes at the next look or, where a person orders the number, at once."""
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": order})
    world.cluster.scale("worker", 3)
    stays, finishes, claims = live(world)
    world.cluster.set_pod(finishes, created=START - timedelta(days=99), ready_since=START)
    hold(world.queue, [stays, finishes])

    def meanwhile(_: Call) -> None:
        finish(world.queue, [finishes])
        hold(world.queue, [claims])

    world.queue.hook(SECOND_LOOK, meanwhile)
    run = world.run()
    assert {stays, claims} <= set(live(world)), run
    assert len(live(world)) == (2 if order else 3), run
    world.pass_time()
    world.run()
    assert sorted(live(world)) == sorted([stays, claims]), "the next run takes the idle one"


def test_after_a_conflict_the_busy_pods_are_read_afresh(world: World) -> None:
    busy, late = live(world)[:2]
    hold(world.queue, [busy])

    def interfere(_: object) -> None:
        hold(world.queue, [late])
        world.cluster.annotate("worker", team="a")

    world.cluster.hook(PATCHED_DEPLOYMENT, interfere)
    run = world.run()
    assert [call.status for call in world.cluster.calls(PATCHED_DEPLOYMENT)] == [409, 200], run
    assert sorted(live(world)) == sorted([busy, late]), run


@pytest.mark.parametrize("status", ["idle", "busy"])
def test_a_pod_that_somebody_deletes_meanwhile_is_no_error(world: World, status: str) -> None:
    busy, other = live(world)[:2]
    hold(world.queue, [busy])
    mark(world, [other], HIGH)  # so that the idle one has to be marked, too
    gone = other if status == "idle" else busy
    path = f"/api/v1/namespaces/default/pods/{gone}"
    login = {"authorization": f"Bearer {world.cluster.admin_token}"}
    world.cluster.hook(
        replace(PATCHED_POD, name=gone), lambda _: world.cluster.handle("DELETE", path, b"", login)
    )
    run = world.run()
    assert 404 in [call.status for call in world.cluster.calls(PATCHED_POD)], run
    assert (run.exit_code, world.replicas) == (0, 1), run
    if status == "idle":
        assert live(world) == [busy], run


# --- Pods that the ReplicaSet controller removes before it looks at any cost ----------------------

WEAK: dict[str, Object] = {
    "not ready": {"ready": False},
    "pending": {"ready": False, "phase": "Pending"},
    "unknown": {"phase": "Unknown"},
    "unassigned": {"ready": False, "phase": "Pending", "node": ""},
}


@pytest.mark.parametrize("state", WEAK.values(), ids=WEAK.keys())
def test_a_busy_pod_that_would_go_first_keeps_them_all(world: World, state: Object) -> None:
    busy, same, lower, *ready = live(world)
    hold(world.queue, [busy])
    world.cluster.set_pod(busy, **state)
    run = world.run()
    assert (run.reason, world.replicas) == ("WorkersBusy", 5), run
    world.cluster.set_pod(same, **state)
    world.cluster.set_pod(lower, ready=False, phase="Pending", node="")
    run = world.run()
    assert sorted(live(world)) == sorted([busy, *ready]), "those that stand no higher may go"


def test_in_the_middle_of_a_rollout_nothing_is_removed_while_a_pod_is_busy(world: World) -> None:
    world.cluster.start_rollout("worker", new_pods=2, old_pods=4)
    busy = live(world)[1]
    hold(world.queue, [busy])
    run = world.run()
    assert (run.reason, world.replicas, len(live(world))) == ("WorkersBusy", 5, 6), run
    finish(world.queue, [busy])
    run = world.run()
    assert (run.reason, world.replicas) == ("ScaledDown", 1), run


def test_waiting_and_busy_jobs_are_counted_at_one_moment(world: World) -> None:
    """Nothing is asked of the API server between the two, and nothing of the queue before it."""
    counted: list[tuple[object, int]] = []
    world.queue.hook(
        "count", lambda call: counted.append((call.filters[0][2], len(world.cluster.requests)))
    )
    world.run()
    assert counted == [("waiting", 2), ("processing", 2)], "after the Deployment and its pods"


# --- What it costs --------------------------------------------------------------------------------


def test_a_run_that_changes_nothing_costs_two_calls_and_two_counts(world: World) -> None:
    world.cluster.scale("worker", 30)
    hold(world.queue, live(world))
    run = world.run(MAX_REPLICAS="30")
    assert run.reason == "AtTarget", run
    assert asked(world) == ["get deployments", "list pods"]
    assert [call.kind for call in world.queue.calls] == ["count", "count"]
    assert [call.reads_billed for call in world.queue.calls] == [1, 1]


@pytest.mark.parametrize(
    "wait",
    [{"SCALE_DOWN_COOLDOWN_SECONDS": "300"}, {"SCALE_DOWN_STABILIZATION_SECONDS": "300"}],
    ids=["cooldown", "stabilization"],
)
def test_while_a_scale_down_waits_no_pod_is_marked(world: World, wait: dict[str, str]) -> None:
    hold(world.queue, live(world)[:2])
    world.cluster.annotate("worker", **{"queue-scaler/last-scale-time": START.isoformat()})
    run = world.run(**wait)
    assert run.record["action"] == "none", run
    assert [call.kind for call in world.queue.calls] == ["count", "count"]
    assert not world.cluster.calls(PATCHED_POD)


def test_a_scale_down_costs_a_call_for_each_mark_and_four_more(world: World) -> None:
    hold(world.queue, live(world)[:3])
    run = world.run()
    marking = ["patch pods"] * 3
    scaling = ["patch deployments", "create events"]
    assert asked(world) == ["get deployments", "list pods", *marking, *scaling], run
    looks = [call.select for call in world.queue.calls if call.kind == "query"]
    assert looks == [("assignedPodId",)] * 2, "of a job only the field with its pod is read"


def test_two_hundred_pods_are_asked_about_thirty_at_a_time(world: World) -> None:
    world.cluster.scale("worker", 200)
    busy = live(world)[::3]
    hold(world.queue, busy)
    run = world.run(MAX_REPLICAS="200")
    assert (run.record["busy"], sorted(live(world))) == (len(busy), sorted(busy)), run
    assert len(asked(world)) == len(busy) + 4 <= 200 + 4
    assert Counter(call.kind for call in world.queue.calls) == {"count": 1 + 7, "query": 2 * 7}


# --- Queries, on the fake and on the official emulator --------------------------------------------


# A filter, with the rest of a job that is busy by it, and of one that is not.
FILTERS: dict[str, tuple[list[object], Object, Object]] = {
    "greater": (["attempt", ">", 0], {"attempt": 1}, {"attempt": 0}),
    "unequal": (["lane", "!=", "test"], {"lane": "live"}, {"lane": "test"}),
    "lists": (["lane", "in", [0, 1]], {"lane": 1}, {"lane": 2}),
}


@pytest.mark.parametrize(("condition", "matching", "other"), FILTERS.values(), ids=FILTERS)
def test_a_busy_filter_may_compare(
    either: Either, condition: list[object], matching: Object, other: Object
) -> None:
    """With a list of three beside it: lists share the limit of thirty with the pods' names."""
    world, jobs = either
    world.cluster.scale("worker", 13)
    for number, pod in enumerate(live(world)):
        status = ("processing", "retrying", "paused")[number % 3]
        rest = other if number % 2 else matching
        jobs.put(f"jobs/{number}", {"status": status, "assignedPodId": pod, **rest})
    busy = live(world)[::2]
    lists = [["status", "in", ["processing", "retrying", "paused"]], condition]
    run = world.run(MAX_REPLICAS="13", BUSY_FILTER=json.dumps(lists))
    assert (run.record["busy"], sorted(live(world))) == (len(busy), sorted(busy)), run


@pytest.mark.parametrize("name", ["worker.pod", "worker.`pod-name`"])
def test_the_pods_name_may_lie_deeper(either: Either, name: str) -> None:
    world, jobs = either
    busy = live(world)[3]
    inner = name.removeprefix("worker.").strip("`")
    jobs.put("jobs/1", {"status": "processing", "worker": {inner: busy, "node": "node-a"}})
    run = world.run(BUSY_POD_FIELD=name)
    assert (run.record["busy"], live(world)) == (1, [busy]), run


# --- Any pattern of pods --------------------------------------------------------------------------


def minutes_ago(most: int) -> st.SearchStrategy[object]:
    return st.integers(0, most).map(lambda minutes: START - timedelta(minutes=minutes))


COSTS = st.sampled_from([None, None, "0", "-5", "100", HIGH])
PODS = {
    "ready": st.sampled_from([True] * 9 + [False]),
    "phase": st.sampled_from(["Running"] * 14 + ["Pending", "Unknown"]),
    "node": st.sampled_from(["node-a"] * 6 + ["node-b"] * 6 + [""]),
    "annotations": COSTS.map(lambda cost: {DELETION_COST: cost}),
    "restarts": st.integers(0, 3),
    "created": minutes_ago(10_000),
    "ready_since": minutes_ago(5_000),
}
# What a pod does; some change between the two looks at which pods are busy.
JOBS = st.sampled_from(["idle"] * 6 + ["claims"] + ["busy"] * 6 + ["finishes"])
PATTERNS = st.lists(st.tuples(JOBS, st.fixed_dictionaries(PODS)), min_size=2, max_size=12)


@pytest.mark.slow
def test_no_busy_pod_is_killed_over_many_patterns(queue: FakeFirestore, tmp_path: Path) -> None:
    scaled_down = 0

    @hypothesis_settings(
        max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(PATTERNS, st.sampled_from(["1", "2", "10"]), st.integers(0, 99))
    def scale_down(pattern: list[tuple[str, Object]], jobs_per_pod: str, seed: int) -> None:
        nonlocal scaled_down
        queue.clear()
        queue.heal()
        with FakeKubernetes(seed=seed, clock=lambda: START) as cluster:
            cluster.add_deployment("worker", replicas=len(pattern))
            more = {"MAX_REPLICAS": "12", "JOBS_PER_POD": jobs_per_pod}
            world = World(cluster, queue, "worker", START, {**EAGER, **more}, tmp_path)
            pods: dict[str, list[str]] = {"busy": [], "claims": [], "finishes": [], "idle": []}
            for pod, (job, state) in zip(live(world), pattern, strict=True):
                pods[job].append(pod)
                cluster.set_pod(pod, **state)
            hold(queue, pods["busy"] + pods["finishes"])

            def meanwhile(_: Call) -> None:
                hold(queue, pods["claims"])
                finish(queue, pods["finishes"])

            queue.hook(SECOND_LOOK, meanwhile)
            run = world.run()
            assert len(cluster.requests) <= len(pattern) + 4, run
            assert not {*pods["busy"], *pods["claims"]} & set(cluster.deleted_pods), run
            scaled_down += bool(cluster.deleted_pods)

    scale_down()
    assert scaled_down > 20, "or it proves little"
