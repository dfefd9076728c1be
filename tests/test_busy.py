"""Never kill a busy worker: what a scale-down does to pods that hold a job.

Pods are removed by the fake's ReplicaSet controller, whose rules are upstream's. Which pods may go
is tested in test_removal.py, what a run does if a call fails in test_faults.py, and every order of
events in test_interleavings.py.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud.firestore import Client, DocumentReference
from grpc import StatusCode  # type: ignore[import-untyped]
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import scaler
from scaler import LEASE
from tests.conftest import Queue
from tests.support.firestore import Call, Fail, FakeFirestore, On
from tests.support.kubernetes import FakeKubernetes, Match, Request, answer, scales
from tests.support.kubernetes_objects import DELETION_COST, Object
from tests.support.world import BUSY, START, World

HIGH = str(2**31 - 1)
COST = "-189388800"  # of a victim chosen at START
EAGER = {
    "BUSY_FILTER": BUSY,
    "MAX_REPLICAS": "10",
    "SCALE_DOWN_COOLDOWN_SECONDS": "0",
    "SCALE_DOWN_STABILIZATION_SECONDS": "0",
}
PATCHED_POD, PATCHED_DEPLOYMENT = Match("patch", "pods"), Match("patch", "deployments")
LISTED_PODS = Match("list", "pods")
SECOND_READ = On("query", nth=2)
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


def costs(world: World) -> dict[str, str]:
    """The deletion cost of each pod that has one."""
    found = {
        name_of(pod): pod["metadata"].get("annotations", {}).get(DELETION_COST)
        for pod in world.cluster.pods(world.name)
    }
    return {pod: cost for pod, cost in found.items() if cost is not None}


def set_cost(
    world: World, pods: Iterable[str], cost: str | None, manager: str = "somebody"
) -> None:
    def change(pod: Object) -> None:
        annotations = pod["metadata"].setdefault("annotations", {})
        annotations |= {DELETION_COST: cost}

    for pod in pods:
        world.cluster.edit("pods", pod, change, manager)


def mark(world: World, pods: Iterable[str], cost: str = "-189388900") -> None:
    """As a run does that then does not get to its patch."""
    set_cost(world, pods, cost, "queue-scaler")


def lease(world: World, seconds: int, cost: str = "-189388900", run: str = "abcd1234") -> str:
    """Another run's, until so many seconds from now."""
    assert world.now
    until = scaler.write_time(world.now + timedelta(seconds=seconds))
    world.cluster.annotate("worker", "queue-scaler", **{LEASE: f"{until} {cost} {run}"})
    return until


def lease_patches(world: World) -> list[Request]:
    found = world.cluster.calls(PATCHED_DEPLOYMENT)
    return [one for one in found if one.body["metadata"]["annotations"].get(LEASE)]


def api_calls(world: World) -> list[str]:
    """The calls to the API server, such as `list pods`."""
    return [f"{call.verb} {call.resource}" for call in world.cluster.requests]


def patched(world: World) -> list[str]:
    """The pods whose deletion cost was written, in order."""
    return [call.name for call in world.cluster.calls(PATCHED_POD)]


READ = ["get deployments", "list replicasets", "list pods"]

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


def test_busy_jobs_without_a_live_pod_are_reported_and_hold_nothing_up(world: World) -> None:
    hold(world.queue, ["worker-of-last-week", "worker-of-last-month"])
    run = world.run()
    assert (run.exit_code, world.replicas) == (0, 1), run
    assert "WARNING AutoScaler default/worker: 2 busy jobs name no live pod" in run.stdout, run
    assert "assignedPodId='worker-of-last-month' in jobs/of-worker-of-last-month" in run.stdout


NAMES: dict[str, Callable[[str], object]] = {
    "a host name with its domain": lambda pod: f"{pod}.workers.default.svc.cluster.local",
    "with its namespace": lambda pod: f"default/{pod}",
    "a trailing newline": lambda pod: f"{pod}\n",
    "an array": lambda pod: [pod],
    "a map": lambda pod: {"name": pod, "attempt": 1},
}


@pytest.mark.parametrize("write", NAMES.values(), ids=NAMES)
def test_a_pod_whose_name_is_stored_in_another_form_is_not_killed(
    either: Either, write: Callable[[str], object]
) -> None:
    world, jobs = either
    busy = live(world)[1:3]
    for pod in busy:
        jobs.put(f"jobs/of-{pod}", {"status": "processing", "assignedPodId": write(pod)})
    run = world.run()
    assert sorted(live(world)) == sorted(busy) and run.exit_code == 0, run
    assert "2 " in run.stdout and f"counts as {min(busy)}" in run.stdout, run


def test_the_wrong_pod_field_removes_nothing_and_names_a_right_one(either: Either) -> None:
    world, jobs = either
    job = {"status": "processing", "assignedPodId": live(world)[0], "attempt": 1, "zone": "a"}
    jobs.put("jobs/1", job)
    run = world.run(BUSY_POD_FIELD="podName")
    assert (run.exit_code, run.reason, world.replicas) == (2, "InvalidSettings", 5), run
    assert "no pod in the field `podName` (BUSY_POD_FIELD)" in run.record["message"], run
    assert "a busy job has `assignedPodId`, `attempt`" in run.record["message"], run
    assert patched(world) == []


def test_one_busy_job_with_the_pod_field_is_enough(world: World) -> None:
    busy = live(world)[0]
    world.queue.put("jobs/1", {"status": "processing"})
    hold(world.queue, [busy])
    run = world.run()
    assert live(world) == [busy] and "assignedPodId=None in jobs/1" in run.stdout, run


def test_many_busy_jobs_that_name_no_live_pod_hide_no_busy_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are read at once: those of the live pods are then read by name."""
    monkeypatch.setattr(scaler, "BUSY_JOBS", 1000)
    busy = live(world)[4]
    for number in range(1100):
        lost = {"status": "processing", "assignedPodId": f"gone-{number}"}
        world.queue.put(f"jobs/a-{number:04}", lost)
    world.queue.put("jobs/z", {"status": "processing", "assignedPodId": busy})
    run = world.run()
    assert live(world) == [busy] and "1000 busy jobs name no live pod" in run.stdout, run
    world.cluster.scale("worker", 5)
    world.queue.put("jobs/a", {"status": "processing", "assignedPodId": f"{live(world)[0]}.x"})
    run = world.run()
    assert (run.reason, world.replicas) == ("WorkersBusy", 5), run
    assert "too many busy jobs to read" in run.record["message"], run


# --- Whose pods -----------------------------------------------------------------------------------


def test_more_busy_jobs_of_a_few_pods_than_are_read_hide_no_busy_pod(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the read of these pods by name is cut off, before the only job of the last one."""
    monkeypatch.setattr(scaler, "BUSY_JOBS", 5)
    *crowded, idle, last = live(world)
    for number in range(12):
        job = {"status": "processing", "assignedPodId": crowded[number % 3]}
        world.queue.put(f"jobs/a-{number:03}", job)
    world.queue.put("jobs/z", {"status": "processing", "assignedPodId": last})
    run = world.run(JOBS_PER_POD="13")
    assert (run.reason, sorted(live(world))) == ("ScaledDown", sorted([*crowded, last])), run
    assert idle in world.cluster.deleted_pods


def test_more_busy_jobs_than_are_read_count_once_and_give_a_warning(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two alternatives that a job matches at once."""
    monkeypatch.setattr(scaler, "BUSY_JOBS", 5)
    until = START + timedelta(days=1)
    for number in range(12):
        pod = live(world)[number % 2]
        job = {"status": "processing", "assignedPodId": pod, "leaseUntil": until}
        world.queue.put(f"jobs/a-{number:03}", job)
    unexpired = ["leaseUntil", ">", {"timestampValue": "now"}]
    busy = json.dumps([[["status", "==", "processing"]], [unexpired]])
    run = world.run(JOBS_PER_POD="6", BUSY_FILTER=busy)
    assert (run.record["busy"], world.replicas) == (12, 2), run
    assert "more busy jobs than the 10 that are read" in run.stdout, run


def elsewhere() -> DocumentReference:
    """A document of another project."""
    return Client("other", AnonymousCredentials()).document("pods/a")  # type: ignore[no-untyped-call]


def test_a_job_that_cannot_be_decoded_holds_a_scale_down_in_words(world: World) -> None:
    """Google's client raises ValueError for a reference into another database."""
    world.queue.put("jobs/odd", {"status": "processing", "assignedPodId": elsewhere()})
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas) == (2, "QueueUnavailable", 5), run
    assert "no field that is read may hold a reference into another database" in run.stdout
    assert "Traceback" not in run.stdout and LEASE not in world.cluster.annotations("worker")


def test_a_waiting_since_that_cannot_be_decoded_holds_nothing_up(world: World) -> None:
    world.queue.fill(8, createdAt=elsewhere())
    run = world.run(WAITING_SINCE_FIELD="createdAt")
    assert (run.exit_code, run.reason, world.replicas) == (0, "ScaledUp", 8), run
    assert "WAITING_SINCE_FIELD=createdAt was not read" in run.stdout


def test_the_wrong_pod_field_is_named_even_if_the_job_cannot_be_decoded(world: World) -> None:
    world.queue.put("jobs/odd", {"status": "processing", "tenant": elsewhere()})
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas) == (2, "InvalidSettings", 5), run
    assert run.stdout.endswith("; set BUSY_POD_FIELD to the field with the pod's name\n")


def test_a_bug_in_the_second_read_leaves_no_lease(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[object] = []

    def read(*_: object) -> scaler.BusyPods:
        reads.append(_)
        return scaler.BusyPods(frozenset(), 1 // (2 - len(reads)))

    monkeypatch.setattr(scaler.JobQueue, "busy_pods", read)
    run = world.run()
    assert (run.exit_code, world.replicas) == (1, 5) and "internal error" in run.stdout, run
    assert lease_patches(world) and LEASE not in world.cluster.annotations("worker")


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
    expected = "app=picky,tier in (batch,bulk),tier notin (web),team,!legacy"
    for resource in ("replicasets", "pods"):
        listed = world.cluster.calls(Match("list", resource))
        assert {call.query["labelSelector"] for call in listed} == {expected}


def test_pods_of_others_with_the_same_labels_are_left_alone(world: World) -> None:
    """One of a Job, one made by hand, and a canary: a Deployment whose pods this one's selector
    takes in."""
    busy, *idle = live(world)
    for name in ("migration", "by-hand"):
        world.cluster.add_pod(name, {"app": "worker"})
    world.cluster.edit("pods", "by-hand", lambda pod: pod["metadata"].pop("ownerReferences"))
    world.cluster.add_deployment("worker-canary", labels={"app": "worker", "track": "canary"})
    [canary] = map(name_of, world.cluster.pods("worker-canary"))
    hold(world.queue, [busy, "migration", canary])
    run = world.run()
    assert (run.reason, run.record["busy"], live(world)) == ("ScaledDown", 1, [busy]), run
    assert not {*patched(world)} - {*idle, "by-hand"}, "a ReplicaSet adopts the one made by hand"


def delete_orphaning(world: World, name: str) -> None:
    path = f"/apis/apps/v1/namespaces/default/deployments/{name}?propagationPolicy=Orphan"
    login = {"authorization": f"Bearer {world.cluster.admin_token}"}
    reply, _ = world.cluster.handle("DELETE", path, b"", login)
    assert reply.status == 200


def test_a_renamed_deployment_keeps_its_busy_pods(world: World) -> None:
    """It adopted the ReplicaSet of the old one, whose name, and the pods', are the old one's."""
    busy = live(world)[:4]
    hold(world.queue, busy)
    delete_orphaning(world, "worker")
    world.cluster.add_deployment("renamed", replicas=5, labels={"app": "worker"})
    world.name = "renamed"
    assert {*busy} < {*live(world)}, "adopted"
    run = world.run()
    assert sorted(live(world)) == sorted(busy) and run.record["busy"] == 4, run


@pytest.mark.parametrize("steps", range(4))
def test_a_deployment_that_is_just_adopting_its_pods_loses_none(
    world: World, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Its controller has not got to it yet, or is in the middle of it."""
    monkeypatch.setattr(scaler, "OBSERVE_SECONDS", (0.01,))
    busy = live(world)[:4]
    hold(world.queue, busy)
    delete_orphaning(world, "worker")
    with world.cluster.by_steps() as controllers:
        world.cluster.add_deployment("renamed", replicas=5, labels={"app": "worker"})
        for _ in range(steps):
            controllers.step("default", "deployments", "renamed")
        world.name = "renamed"
        run = world.run()
    controllers.run("default")
    assert {*busy} <= {*live(world)}, f"after {steps} steps\n{run}"


def test_a_long_name_keeps_its_busy_pods(world: World) -> None:
    """The ReplicaSet's and the pods' names begin with only a part of the Deployment's."""
    world.name = "w" * 245
    world.cluster.add_deployment(world.name, replicas=3, labels={"app": "long"})
    busy = live(world)[:2]
    assert all(len(pod) < 70 for pod in busy)
    hold(world.queue, busy)
    run = world.run()
    assert sorted(live(world)) == sorted(busy) and run.record["busy"] == 2, run


def test_the_lists_are_read_in_pages_without_pods_that_have_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scaler.PAGE == 500
    monkeypatch.setattr(scaler, "PAGE", 2)
    busy = live(world)
    for pod in busy[:2]:  # evicted, so that its ReplicaSet has made another one
        world.cluster.set_pod(pod, phase="Failed")
    busy = busy[2:]
    hold(world.queue, busy)
    run = world.run()
    assert run.record["busy"] == 3 and {*busy} <= {*live(world)}, run
    assert (run.reason, world.replicas) == ("ScaledDown", 3), run
    [first, *more] = world.cluster.calls(LISTED_PODS)[:3]
    assert first.query["limit"] == "2" and "continue" not in first.query
    assert first.query["fieldSelector"] == "status.phase!=Succeeded,status.phase!=Failed"
    assert all(call.query["continue"] for call in more)


# --- Rollouts -------------------------------------------------------------------------------------


def rollout_halfway(world: World) -> None:
    world.cluster.start_rollout("worker", new_pods=2, old_pods=4)


def rollout_without_pods(world: World) -> None:
    """The new template's ServiceAccount does not exist; a quota or a webhook does the same."""
    world.cluster.set_template("worker", serviceAccountName="missing")


@pytest.mark.parametrize("begin", [rollout_halfway, rollout_without_pods])
def test_during_a_rollout_no_pod_is_removed_while_one_is_busy(
    world: World, begin: Callable[[World], None]
) -> None:
    begin(world)
    before = live(world)
    hold(world.queue, before[1:2])
    run = world.run()
    assert (run.reason, world.replicas, live(world)) == ("WorkersBusy", 5, before), run
    assert "a rollout is in progress and 1 pod is busy" in run.record["message"], run
    assert patched(world) == []
    finish(world.queue, before[1:2])
    run = world.run()
    assert (run.reason, world.replicas) == ("ScaledDown", 1), run


def test_no_busy_pod_of_twenty_is_killed_by_a_rollout_that_makes_no_pods(world: World) -> None:
    world.cluster.scale("worker", 20)
    rollout_without_pods(world)
    hold(world.queue, live(world)[:12])
    run = world.run(MAX_REPLICAS="20")
    assert (run.reason, world.replicas) == ("WorkersBusy", 20), run


def test_a_rescale_that_is_not_passed_on_yet_is_waited_for(world: World) -> None:
    """Somebody scales, and the controllers are slow: marks would steer the wrong removal."""
    busy = live(world)[0]
    hold(world.queue, [busy])
    with world.cluster.by_steps():
        world.cluster.scale("worker", 4)
        run = world.run()
        assert (run.reason, world.replicas) == ("WorkersBusy", 4), run
        assert "the Deployment controller has not applied the last change yet" in run.stdout
        assert patched(world) == []
    world.cluster.controllers.run("default")
    assert world.run().reason == "ScaledDown"


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
    before, marked = world.resource_version, len(patched(world))
    again = world.run(**settings)
    assert (again.exit_code, again.reason, world.replicas) == (0, "WorkersBusy", 4), again
    assert world.resource_version == before, "nothing is written if all are busy"
    assert len(patched(world)) == marked


@pytest.mark.parametrize(("replicas", "killed"), [(3, 0), (2, 1), (0, 3)])
def test_paused_replicas_is_met_exactly_and_idle_pods_go_first(
    world: World, replicas: int, killed: int
) -> None:
    busy = live(world)[:3]
    hold(world.queue, busy)
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": str(replicas)})
    run = world.run()
    assert (run.reason, world.replicas, len(live(world))) == ("Paused", replicas, replicas), run
    assert len(set(busy) - set(live(world))) == killed, run
    said = {0: "", 1: "; 1 busy pod is among those removed"}
    end = said.get(killed, f"; {killed} busy pods are among those removed")
    assert run.record["message"].endswith(f"from 5 to {scaler.pods(replicas)}{end}"), run


def test_paused_replicas_says_if_a_busy_pod_goes_before_idle_ones(world: World) -> None:
    """The ReplicaSet controller removes pods that are not ready first, whatever they cost."""
    busy, *_ = live(world)
    hold(world.queue, [busy])
    world.cluster.set_pod(busy, ready=False)
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": "4"})
    run = world.run()
    assert "; 1 busy pod is among those removed\n" in run.stdout, run
    assert world.cluster.deleted_pods == [busy]


def test_a_dry_run_marks_nothing(world: World) -> None:
    hold(world.queue, live(world)[:3])
    mark(world, live(world)[3:4])
    before = costs(world)
    run = world.run("--dry-run")
    assert (run.reason, run.record["action"], world.replicas) == ("ScaledDown", "scale-down", 5)
    assert (costs(world), api_calls(world)) == (before, READ), run


def test_only_victims_are_marked(world: World) -> None:
    *busy, first, second = live(world)
    hold(world.queue, busy)
    set_cost(world, busy[:1], "7")
    set_cost(world, [first], "-5")
    seen: list[dict[str, str]] = []
    world.cluster.hook(LISTED_PODS, lambda _: seen.append(costs(world)), times=2)
    run = world.run()
    assert seen[1] == {first: COST, second: COST, busy[0]: "7"}
    assert sorted(patched(world)) == sorted([first, second])
    assert sorted(live(world)) == sorted(busy), run


def test_whole_nodes_become_free(world: World) -> None:
    """Two idle pods are on a node of their own; each of the others has a busy neighbour."""
    for pod, node in zip(live(world), "aabbc", strict=True):
        world.cluster.set_pod(pod, node=f"node-{node}")
    first, second, third, fourth, alone = live(world)
    hold(world.queue, [first, third])
    run = world.run(SCALE_DOWN_STEP="1")
    assert world.cluster.deleted_pods == [alone], run
    assert {second, fourth} < {*live(world)}


# --- The lease ------------------------------------------------------------------------------------


def test_the_lease_is_taken_before_any_mark_and_gone_after_the_scale_down(world: World) -> None:
    hold(world.queue, live(world)[:2])
    seen: list[str | None] = []

    def note(_: Request) -> None:
        seen.append(world.cluster.annotations("worker").get(LEASE))

    world.cluster.hook(PATCHED_DEPLOYMENT, note, times=None)
    world.cluster.hook(PATCHED_POD, note, times=None)
    run = world.run()
    before, *meanwhile = seen
    assert before is None and len(meanwhile) == 4, "three marks, and the patch that scales"
    [held] = {*meanwhile}
    assert held and held.startswith(f"2026-01-01T00:00:44Z {COST} "), "until the end of this look"
    assert len(held) <= 64 and held.isascii()
    assert run.reason == "ScaledDown" and LEASE not in world.cluster.annotations("worker")


def test_another_runs_lease_holds_a_scale_down(world: World) -> None:
    busy = live(world)[:2]
    hold(world.queue, busy)
    until = lease(world, 30)
    before = world.resource_version
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas) == (0, "WorkersBusy", 5), run
    assert f"as another run is removing pods until {until}" in run.record["message"], run
    assert (patched(world), world.resource_version) == ([], before)
    world.pass_time(30)
    run = world.run()
    assert (run.reason, sorted(live(world))) == ("ScaledDown", sorted(busy)), "it has expired"
    assert LEASE not in world.cluster.annotations("worker")


def test_the_marks_of_a_run_that_is_at_work_are_left_alone(world: World) -> None:
    lease(world, 30)
    mark(world, live(world)[:2])
    world.queue.fill(5)
    assert (world.run().reason, patched(world)) == ("AtTarget", [])


def test_another_runs_lease_does_not_hold_a_scale_up(world: World) -> None:
    lease(world, 30)
    world.queue.fill(7)
    assert (world.run().reason, world.replicas) == ("ScaledUp", 7)
    assert LEASE in world.cluster.annotations("worker"), "it is for that run to remove"


def test_paused_replicas_takes_over_another_runs_lease(world: World) -> None:
    busy, *idle = live(world)
    hold(world.queue, [busy])
    lease(world, 30)
    mark(world, idle[:1])
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": "1"})
    run = world.run()
    assert (run.reason, live(world)) == ("Paused", [busy]), run
    assert LEASE not in world.cluster.annotations("worker")


def test_two_runs_with_the_same_order_do_not_rob_each_other_for_ever(world: World) -> None:
    """Once a run has taken over the lease of another one, it respects the next."""
    busy, *idle = live(world)
    hold(world.queue, [busy])
    until = lease(world, 30)
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": "1"})
    world.cluster.hook(scales, lambda _: taken_over(world, idle))
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas) == (0, "Paused", 5), run
    assert "paused-replicas=1, as another run is removing pods until" in run.stdout, (run, until)
    assert costs(world) == dict.fromkeys(idle, "-300000000"), run


def test_a_run_reuses_its_own_lease_after_a_conflict(world: World) -> None:
    """Somebody annotates the Deployment between the marks and the patch."""
    busy, *idle = live(world)
    hold(world.queue, [busy])
    world.queue.hook(SECOND_READ, lambda _: world.cluster.annotate("worker", team="a"))
    run = world.run()
    assert (run.reason, live(world)) == ("ScaledDown", [busy]), run
    statuses = [call.status for call in world.cluster.calls(PATCHED_DEPLOYMENT)]
    assert statuses == [200, 409, 200], "the lease once, and the patch that scales twice"
    assert sorted(patched(world)) == sorted(idle), "each victim once"


def taken_over(world: World, pods: Iterable[str]) -> None:
    """Another run has taken the lease over and marked its own victims: by an order, or as its clock
    is ahead."""
    lease(world, 60, run="beef1234")
    mark(world, pods, "-300000000")


@pytest.mark.parametrize("in_attempt", [1, 2])
def test_a_run_that_has_lost_its_lease_leaves_the_pods_alone(world: World, in_attempt: int) -> None:
    """It is lost between reading the Deployment and listing the pods: before the second read, after
    one of the victims has claimed a job; or after a conflict, when jobs have come."""
    busy, late, *idle = live(world)
    hold(world.queue, [busy])
    lists: list[Request] = []

    def meanwhile(request: Request) -> None:
        lists.append(request)
        if len(lists) == 1 + in_attempt:
            taken_over(world, [late, *idle])
            hold(world.queue, [late])

    def conflict(_: Request) -> None:
        world.cluster.annotate("worker", team="a")
        world.queue.fill(3)

    world.cluster.hook(Match("list", "replicasets"), meanwhile, times=None)
    if in_attempt == 2:
        world.cluster.hook(scales, conflict)
    run = world.run()
    assert len(live(world)) == 5 and run.exit_code == 0, run
    assert costs(world) == dict.fromkeys([late, *idle], "-300000000"), run
    assert world.cluster.annotations("worker")[LEASE].endswith("beef1234")


@pytest.mark.parametrize(
    "fault",
    [
        lambda world: world.queue.fault(SECOND_READ, Fail(StatusCode.PERMISSION_DENIED)),
        lambda world: world.cluster.fault(LISTED_PODS, answer(403), nth=2),
        lambda world: world.cluster.fault(PATCHED_DEPLOYMENT, answer(422), nth=2),
    ],
    ids=["Firestore", "list", "patch"],
)
def test_a_run_that_fails_removes_its_lease(world: World, fault: Callable[[World], object]) -> None:
    hold(world.queue, live(world)[:1])
    fault(world)
    run = world.run()
    assert (run.exit_code, world.replicas) == (2, 5), run
    assert len(patched(world)) == 4 and LEASE not in world.cluster.annotations("worker")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("mine", "not a lease of a run: counts as absent"),
        ("soon -189388900 abcd1234", "not a time such as 2026-01-01T00:00:00Z or 1767225600"),
        (
            "2026-01-01T00:02:00Z -189388900 abcd1234",
            "further ahead than a run can last: counts as absent",
        ),
    ],
)
def test_an_odd_lease_counts_as_absent(world: World, value: str, why: str) -> None:
    world.cluster.annotate("worker", **{LEASE: value})
    run = world.run()
    assert (run.reason, world.replicas) == ("ScaledDown", 1), run
    assert f"{LEASE}='{value}': {why}" in run.stdout, run
    assert LEASE not in world.cluster.annotations("worker")


# --- Marks that a run left behind -----------------------------------------------------------------


def die_before_the_patch(world: World) -> None:
    """A run that has marked its victims, and from then on may not write."""
    world.cluster.fault(PATCHED_DEPLOYMENT, answer(403), nth=2, times=2)
    run = world.run()
    assert run.exit_code == 2 and costs(world) and world.replicas == 5, run
    assert LEASE in world.cluster.annotations("worker")


LATER: dict[str, tuple[int, dict[str, str]]] = {
    "at the target": (5, {}),
    "scaled up": (8, {}),
    "scale-up disabled": (8, {"SCALE_UP_STEP": "0"}),
    "scale-down disabled": (0, {"SCALE_DOWN_STEP": "0"}),
    "stabilized": (0, {"SCALE_DOWN_STABILIZATION_SECONDS": "300"}),
}


@pytest.mark.parametrize(("jobs", "settings"), LATER.values(), ids=LATER)
def test_marks_left_behind_are_removed_whatever_the_next_look_decides(
    world: World, jobs: int, settings: dict[str, str]
) -> None:
    die_before_the_patch(world)
    world.pass_time()
    world.queue.fill(jobs)
    run = world.run(**settings)
    assert run.exit_code == 0 and (costs(world), len(live(world))) == ({}, world.replicas), run
    assert LEASE not in world.cluster.annotations("worker")
    before, written = world.resource_version, len(patched(world))
    world.run("--dry-run", **settings)
    assert (world.resource_version, len(patched(world))) == (before, written)


@pytest.mark.parametrize("status", [403, 422, 500])
def test_marks_that_cannot_be_removed_do_not_hold_up_a_scale_up(world: World, status: int) -> None:
    die_before_the_patch(world)
    world.pass_time()
    world.queue.fill(8)
    world.cluster.fault(PATCHED_POD, answer(status, message="the webhook is down"), times=None)
    left, before = costs(world), len(patched(world))
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas, costs(world)) == (0, "ScaledUp", 8, left), (
        run
    )
    assert "deletion costs of an earlier run may be left: the API server answered" in run.stdout
    assert len(patched(world)) - before <= len(left), "at most one try each"
    assert LEASE not in world.cluster.annotations("worker")


def test_many_marks_leave_time_for_a_scale_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaler, "CONCURRENT_CALLS", 1)
    mark(world, live(world))
    world.queue.fill(8)
    world.cluster.hook(PATCHED_POD, lambda _: time.sleep(0.6), times=None)
    run = world.run(TIMEOUT_SECONDS="4")
    assert (run.exit_code, run.reason, world.replicas) == (0, "ScaledUp", 8), run
    assert 0 < len(costs(world)) < 5 and "may be left: there was no time" in run.stdout, run


def test_a_run_that_died_does_not_delay_the_next_minutes_scale_down(world: World) -> None:
    busy = live(world)[:3]
    hold(world.queue, busy[:1])
    die_before_the_patch(world)
    hold(world.queue, busy)  # two of its victims have claimed a job since
    world.pass_time()
    run = world.run()
    assert (run.reason, sorted(live(world))) == ("ScaledDown", sorted(busy)), run
    world.pass_time()
    world.run()
    assert costs(world) == {}, "and the marks of those two are removed"


def test_marks_stay_while_a_replica_set_still_has_pods_to_remove(world: World) -> None:
    """It chooses them by these marks."""
    busy, *idle = live(world)
    hold(world.queue, [busy])
    mark(world, idle)
    with world.cluster.by_steps() as controllers:
        world.cluster.scale("worker", 3)
        for _ in range(2):  # the Deployment controller is done, the ReplicaSet's is not
            controllers.step("default", "deployments", "worker")
        run = world.run(SCALE_DOWN_STEP="0")
        assert run.exit_code == 0 and patched(world) == [], run
    world.cluster.controllers.run("default")
    assert busy in live(world)
    assert world.run(SCALE_DOWN_STEP="0").exit_code == 0 and costs(world) == {}


def test_other_peoples_deletion_costs_are_left_alone(world: World) -> None:
    set_cost(world, live(world)[:2], "-5")
    mark(world, live(world)[2:3])
    world.queue.fill(5)
    world.run()
    assert costs(world) == dict.fromkeys(live(world)[:2], "-5")


@pytest.mark.parametrize("cost", ["7", "-5", None])
def test_a_spared_pod_gets_back_the_cost_that_somebody_else_had_set(
    world: World, cost: str | None
) -> None:
    claims, *others = live(world)
    hold(world.queue, others[1:])
    if cost:
        set_cost(world, [claims], cost)
    world.queue.hook(SECOND_READ, lambda _: hold(world.queue, [claims]))
    run = world.run()
    assert others[0] not in live(world) and claims in live(world), run
    world.pass_time()
    for _ in range(2):
        assert costs(world) == ({claims: cost} if cost else {}), run
        run = world.run()


def test_a_conflict_loses_nobodys_deletion_cost(world: World) -> None:
    busy, *idle = live(world)
    hold(world.queue, [busy])
    set_cost(world, idle, "1000")

    def conflict(_: Request) -> None:
        world.cluster.annotate("worker", team="a")
        world.queue.fill(5)

    world.cluster.hook(scales, conflict)
    run = world.run()
    assert (run.reason, costs(world)) == ("ScaledUp", dict.fromkeys(idle, "1000")), run


# --- What happens meanwhile -----------------------------------------------------------------------


def test_a_victim_that_claims_a_job_is_spared_and_one_pod_fewer_is_removed(world: World) -> None:
    *busy, late, idle = live(world)
    hold(world.queue, busy)
    world.queue.hook(SECOND_READ, lambda _: hold(world.queue, [late]))
    run = world.run()
    assert sorted(live(world)) == sorted([*busy, late]), run
    assert (costs(world), world.cluster.deleted_pods) == ({}, [idle]), "its mark is removed"


@pytest.mark.parametrize("replicas", [None, "2"])
def test_one_pod_finishes_while_another_claims(world: World, replicas: str | None) -> None:
    """The one that finished goes at the next look or, with paused-replicas, immediately."""
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": replicas})
    world.cluster.scale("worker", 3)
    stays, finishes, claims = live(world)
    world.cluster.set_pod(finishes, created=START - timedelta(days=99), ready_since=START)
    hold(world.queue, [stays, finishes])

    def meanwhile(_: Call) -> None:
        finish(world.queue, [finishes])
        hold(world.queue, [claims])

    world.queue.hook(SECOND_READ, meanwhile)
    run = world.run()
    assert {stays, claims} <= set(live(world)), run
    assert len(live(world)) == (2 if replicas else 3), run
    world.pass_time()
    world.run()
    assert sorted(live(world)) == sorted([stays, claims]), "the next run removes the idle one"


def test_a_job_claimed_while_the_second_read_goes_on_is_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One collection is answered at once, and a job is claimed there while the other one takes its
    time."""
    monkeypatch.setattr(scaler, "FRESH_SECONDS", 1)
    busy, late, *_ = live(world)
    hold(world.queue, [busy])

    def slow(_: Call) -> None:
        time.sleep(1.2)
        hold(world.queue, [late])

    of_more = On("query", nth=2, where=lambda call: call.collection.endswith("more"))
    world.queue.hook(of_more, slow)
    run = world.run(QUEUE_COLLECTION="jobs,more")
    assert (run.reason, sorted(live(world))) == ("ScaledDown", sorted([busy, late])), run


def test_a_job_that_changes_hands_while_it_is_read_protects_both_pods(world: World) -> None:
    """It matches two alternatives, and is read twice."""
    first, second, *_ = live(world)

    def give(pod: str) -> None:
        until = START + timedelta(days=1)
        job = {"status": "processing", "assignedPodId": pod, "leaseUntil": until}
        world.queue.put("jobs/1", job)

    def later(_: Call) -> None:
        time.sleep(0.5)
        give(second)

    give(first)
    by_status = On(
        "query", nth=2, where=lambda call: call.filters[0] == ("status", "==", "processing")
    )
    world.queue.hook(by_status, later)
    unexpired = ["leaseUntil", ">", {"timestampValue": "now"}]
    run = world.run(BUSY_FILTER=json.dumps([[["status", "==", "processing"]], [unexpired]]))
    assert {first, second} <= set(live(world)), run


def test_no_pod_is_removed_while_the_deployment_controller_is_asleep(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it wakes up, the victims may be at work."""
    monkeypatch.setattr(scaler, "OBSERVE_SECONDS", (0.01, 0.02))
    busy, *idle = live(world)
    hold(world.queue, [busy])
    with world.cluster.by_steps():
        run = world.run()
        assert (run.reason, world.replicas, costs(world)) == ("WorkersBusy", 5, {}), run
        assert "the Deployment controller has not applied the last change" in run.stdout, run
        hold(world.queue, idle)
    world.cluster.controllers.run("default")
    assert world.cluster.deleted_pods == []


def test_a_slow_deployment_controller_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaler, "OBSERVE_SECONDS", (0.01, 0.02, 0.03, 0.04))
    busy, *_ = live(world)
    hold(world.queue, [busy])
    reads: list[Request] = []
    with world.cluster.by_steps() as controllers:

        def observe_late(request: Request) -> None:
            reads.append(request)
            if len(reads) == 5:  # one before the lease, and four that wait
                controllers.step("default", "deployments", "worker")

        world.cluster.hook(Match("get", "deployments"), observe_late, times=None)
        run = world.run()
        assert (run.reason, world.replicas) == ("ScaledDown", 1), run
    world.cluster.controllers.run("default")
    assert live(world) == [busy]


def test_paused_replicas_goes_as_far_as_idle_pods_can_be_chosen_in_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaler, "CONCURRENT_CALLS", 1)
    world.cluster.scale("worker", 12)
    busy = max(live(world))
    world.cluster.set_pod(busy, ready_since=START)  # the youngest goes first
    hold(world.queue, [busy])
    world.cluster.annotate("worker", **{"queue-scaler/paused-replicas": "1"})
    world.cluster.hook(PATCHED_POD, lambda _: time.sleep(0.6), times=None)
    run = world.run(TIMEOUT_SECONDS="4")
    assert busy in live(world) and len(live(world)) == world.replicas in range(2, 12), run
    assert "paused-replicas=1, as far as there was time to choose idle pods; scaled" in run.stdout
    assert "among those removed" not in run.stdout
    world.cluster.clear_faults()
    world.pass_time()
    run = world.run()
    assert (run.reason, live(world)) == ("Paused", [busy]), run


@pytest.mark.parametrize("resource", ["deployments", "pods"])
def test_after_a_conflict_everything_is_read_again(world: World, resource: str) -> None:
    """A job is claimed, and somebody writes to the Deployment or to the only victim, just before
    the scaler does."""
    *busy, first, second = live(world)
    hold(world.queue, busy)

    def interfere(request: Request) -> None:
        busy.append(second if request.name == first else first)
        hold(world.queue, busy)
        if resource == "pods":
            world.cluster.set_pod(request.name, restarts=3)
        else:
            world.cluster.annotate("worker", team="a")

    world.cluster.hook(Match("patch", resource), interfere)
    run = world.run(SCALE_DOWN_STEP="1")
    assert 409 in [call.status for call in world.cluster.calls(Match("patch", resource))], run
    assert sorted(live(world)) == sorted(busy), run
    assert costs(world) == {} and LEASE not in world.cluster.annotations("worker")


@pytest.mark.parametrize("status", ["idle", "busy"])
def test_a_pod_deleted_meanwhile_is_no_error(world: World, status: str) -> None:
    busy, other, *_ = live(world)
    hold(world.queue, [busy])
    gone = other if status == "idle" else busy
    path = f"/api/v1/namespaces/default/pods/{gone}"
    login = {"authorization": f"Bearer {world.cluster.admin_token}"}
    world.cluster.hook(
        replace(PATCHED_POD, name=other),
        lambda _: world.cluster.handle("DELETE", path, b"", login),
    )
    run = world.run()
    assert (run.exit_code, run.reason) == (0, "ScaledDown"), run
    assert (404 in [call.status for call in world.cluster.calls(PATCHED_POD)]) is (gone == other)
    if status == "idle":
        assert busy in live(world), run


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
    assert sorted(live(world)) == sorted([busy, *ready]), "those that rank no higher may go"


def test_waiting_and_busy_jobs_are_counted_one_right_after_the_other(world: World) -> None:
    """No request to the API server between the two, and none to the queue before it."""
    counted: list[tuple[object, int]] = []
    world.queue.hook(
        "count", lambda call: counted.append((call.filters[0][2], len(world.cluster.requests)))
    )
    world.run()
    assert counted == [("waiting", 3), ("processing", 3)], "after the Deployment and its pods"


# --- What it costs --------------------------------------------------------------------------------


def test_a_run_that_changes_nothing_costs_three_calls_and_two_counts(world: World) -> None:
    world.cluster.scale("worker", 30)
    hold(world.queue, live(world))
    run = world.run(MAX_REPLICAS="30")
    assert run.reason == "AtTarget", run
    assert api_calls(world) == READ
    assert [call.kind for call in world.queue.calls] == ["count", "count"]
    assert [call.reads_billed for call in world.queue.calls] == [1, 1]


@pytest.mark.parametrize(
    "wait",
    [{"SCALE_DOWN_COOLDOWN_SECONDS": "300"}, {"SCALE_DOWN_STABILIZATION_SECONDS": "300"}],
    ids=["cooldown", "stabilization"],
)
def test_no_pod_is_marked_while_a_scale_down_is_delayed(world: World, wait: dict[str, str]) -> None:
    hold(world.queue, live(world)[:2])
    world.cluster.annotate("worker", **{"queue-scaler/last-scale-time": START.isoformat()})
    run = world.run(**wait)
    assert run.record["action"] == "none", run
    assert [call.kind for call in world.queue.calls] == ["count", "count"]
    assert not patched(world)


def test_four_of_thirty_pods_are_removed_with_four_pod_patches(world: World) -> None:
    world.cluster.scale("worker", 30)
    busy = live(world)[:26]
    hold(world.queue, busy)
    run = world.run(MAX_REPLICAS="30")
    assert (run.reason, sorted(live(world))) == ("ScaledDown", sorted(busy)), run
    marking, again = ["patch pods"] * 4, READ
    scaling = ["patch deployments", "create events"]
    expected = [*READ, "patch deployments", *marking, *again, *scaling]
    assert api_calls(world) == expected and len(expected) == 4 + 9, run
    reads = [call for call in world.queue.calls if call.kind == "query"]
    assert [call.select for call in reads] == [("assignedPodId",)] * 2, "only the pod's field"


def test_two_hundred_pods_are_counted_thirty_at_a_time(world: World) -> None:
    world.cluster.scale("worker", 200)
    busy = live(world)[::3]
    hold(world.queue, busy)
    run = world.run(MAX_REPLICAS="200")
    assert (run.record["busy"], sorted(live(world))) == (len(busy), sorted(busy)), run
    assert len(api_calls(world)) == (200 - len(busy)) + 9
    assert Counter(call.kind for call in world.queue.calls) == {"count": 1 + 7, "query": 2}


# --- Without the permissions ----------------------------------------------------------------------

ROLE_OF_0_2_0 = """
kind: Role
metadata: {name: queue-scaler}
rules:
  - {apiGroups: [apps], resources: [deployments], resourceNames: [worker], verbs: [get, patch]}
  - {apiGroups: [""], resources: [events], verbs: [create]}
  - {apiGroups: [""], resources: [pods], verbs: [list, patch]}
---
kind: RoleBinding
metadata: {name: queue-scaler}
roleRef: {kind: Role, name: queue-scaler}
subjects: [{kind: ServiceAccount, name: queue-scaler, namespace: default}]
"""


@pytest.mark.parametrize("resource", ["replicasets", "pods"])
def test_a_missing_rule_removes_nothing_and_is_named(world: World, resource: str) -> None:
    role = ROLE_OF_0_2_0 if resource == "replicasets" else ROLE_OF_0_2_0.replace(
        "resources: [pods]", "resources: [secrets]"
    ).replace('apiGroups: [""], resources: [events]', 'apiGroups: [apps], resources: [replicasets]'
    ).replace("[create]", "[list]")  # fmt: skip
    world.cluster.load_rbac(role)
    config = world.directory / "as-queue-scaler"
    world.cluster.write_kubeconfig(config, world.cluster.service_account("queue-scaler"))
    run = world.run(KUBECONFIG=str(config))
    assert (run.exit_code, run.reason, world.replicas) == (2, "Forbidden", 5), run
    assert "BUSY_FILTER needs" in run.record["message"] and "DEPLOYMENT" not in run.stdout, run
    allow = f"the Role in namespace default must allow list on {resource} (rbac.yaml)"
    assert allow in run.record["message"], run


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
def test_the_pods_name_may_be_nested(either: Either, name: str) -> None:
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

            queue.hook(SECOND_READ, meanwhile)
            run = world.run()
            assert len(cluster.requests) <= 2 * len(pattern) + 9, "a mark, and at times its end"
            assert not {*pods["busy"], *pods["claims"]} & set(cluster.deleted_pods), run
            scaled_down += bool(cluster.deleted_pods)

    scale_down()
    assert scaled_down > 20, "or it proves little"


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_busy_jobs_of_which_none_names_a_pod_are_a_wrong_setting(
    world: World, nothing: object
) -> None:
    """As the field is there from the start, empty, and the workers write another one."""
    for pod in live(world):
        fields = {"status": "processing", "assignedPodId": nothing, "worker": pod}
        world.queue.put(f"jobs/of-{pod}", fields)
    run = world.run()
    assert (run.exit_code, world.cluster.deleted_pods) == (2, []), run
