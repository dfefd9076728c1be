"""Every message that a run can write, in one table per kind: what happened, what the scaler did
about it, what to do.

Mistakes in the settings are in test_settings.py and test_filters.py; quoted lines of whole runs are
in the pages.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from google.api_core import exceptions
from grpc import StatusCode  # type: ignore[import-untyped]

import scaler
from scaler import (
    ANNOTATION,
    Deadline,
    Decision,
    Inputs,
    Pod,
    Progress,
    QueueFailure,
    QueueLength,
    ReplicaSet,
    Settings,
    decide,
    find_busy_pods,
    full_message,
    make_fleet,
    parse_state,
    queue_failure,
    removable,
    without_queue,
)
from tests.support import kubernetes
from tests.support.firestore import CountAs, Fail
from tests.support.inputs import CALM, SETTINGS, ago, failing, history, observed
from tests.support.kubernetes import Match
from tests.support.world import BUSY, START, Run, World

UNTIL = "2026-01-01T01:00:00Z"
FALLBACK = replace(SETTINGS, max_replicas=9, fallback_replicas=5)

# --- Decisions ------------------------------------------------------------------------------------

# Of a window or a cooldown: how much longer it lasts, and which variable sets it.
# fmt: off
DECISIONS = [
    (SETTINGS, observed(2, 9, paused="true"),
     "Paused: paused by annotation; stays at 2 pods"),
    (SETTINGS, observed(1, paused="true", paused_until=UNTIL),
     "Paused: paused by annotation until 2026-01-01T01:00:00Z; stays at 1 pod"),
    (SETTINGS, observed(2, paused_replicas="5"),
     "Paused: queue-scaler/paused-replicas=5; scaled up from 2 to 5 pods"),
    (SETTINGS, observed(5, paused_replicas="5", paused_until=UNTIL),
     "Paused: queue-scaler/paused-replicas=5 until 2026-01-01T01:00:00Z; stays at 5 pods"),
    (SETTINGS, observed(8, reach=3, paused_replicas="2"),
     "Paused: queue-scaler/paused-replicas=2, as far as there was time; scaled down from 8 "
     "to 5 pods"),
    (SETTINGS, observed(8, reach=6, paused_replicas="2"),
     "Paused: queue-scaler/paused-replicas=2; scaled down from 8 to 2 pods"),
    (SETTINGS, observed(2, paused="true", paused_replicas="5"),
     "Paused: paused by annotation, queue-scaler/paused-replicas=5 waits until it is deleted; "
     "stays at 2 pods"),
    (replace(SETTINGS, min_replicas=2), observed(0),
     "ScalingDisabled: scaled to 0 externally despite MIN_REPLICAS=2; stays at 0 pods, disabled "
     "until someone scales it to 1 or more"),
    (replace(SETTINGS, min_replicas=2), observed(1),
     "TooFewReplicas: 1 pod, below MIN_REPLICAS=2; scaled up from 1 to 2 pods"),
    (SETTINGS, observed(4),
     "TooManyReplicas: 4 pods, above MAX_REPLICAS=3; scaled down from 4 to 3 pods"),
    (SETTINGS, observed(2, 1, busy=1),
     "AtTarget: 1 job waiting, 1 busy: 2 pods wanted; stays at 2 pods"),
    (SETTINGS, replace(observed(1), queue=QueueLength(1000, capped=True)),
     "ScaledUp: 1000 or more jobs waiting: 3 pods wanted, the maximum; scaled up from 1 to 3 pods"),
    (SETTINGS, replace(observed(1), queue=QueueLength(1, oldest_seconds=120)),
     "AtTarget: 1 job waiting for 2 min: 1 pod wanted, the minimum; stays at 1 pod"),
    (SETTINGS, replace(observed(2), queue=QueueLength(2, oldest_seconds=119.9)),
     "AtTarget: 2 jobs waiting, the oldest for 119 s: 2 pods wanted; stays at 2 pods"),
    (SETTINGS, replace(observed(3), queue=QueueLength(5, busy=2, oldest_seconds=7200)),
     "AtTarget: 5 jobs waiting, the oldest for 2 h, 2 busy: 3 pods wanted, the maximum; stays at 3 "
     "pods"),
    (CALM, observed(3),
     "ScaledDown: 0 jobs waiting: 1 pod wanted, the minimum; scaled down from 3 to 1 pod"),
    (SETTINGS, observed(3, 1, recommendations=history((200, 3), (100, 1))),
     "ScaleDownStabilized: 1 job waiting: 1 pod wanted, the minimum; stays at 3 pods for 100 s "
     "more (SCALE_DOWN_STABILIZATION_SECONDS=300)"),
    (replace(SETTINGS, scale_up_stabilization_seconds=60),
     observed(1, 3, recommendations=history((50, 0), (40, 1), (30, 3))),
     "ScaleUpStabilized: 3 jobs waiting: 3 pods wanted, the maximum; stays at 1 pod for 20 s more "
     "(SCALE_UP_STABILIZATION_SECONDS=60)"),
    (replace(CALM, scale_up_step="0"), observed(1, 2),
     "ScaleUpDisabled: 2 jobs waiting: 2 pods wanted; stays at 1 pod, as scale-up is disabled "
     "(SCALE_UP_STEP=0)"),
    (replace(CALM, scale_down_step="0"), observed(3, 2),
     "ScaleDownDisabled: 2 jobs waiting: 2 pods wanted; stays at 3 pods, as scale-down is disabled "
     "(SCALE_DOWN_STEP=0)"),
    (CALM, observed(3, paused_scale_in="true", paused_until=UNTIL),
     "ScaleDownDisabled: 0 jobs waiting: 1 pod wanted, the minimum; stays at 3 pods, as scale-down "
     "is disabled (queue-scaler/paused-scale-in until 2026-01-01T01:00:00Z)"),
    (CALM, observed(2, removable=0, because=", as removing one would hit a busy pod"),
     "WorkersBusy: 0 jobs waiting: 1 pod wanted, the minimum; stays at 2 pods, as removing one "
     "would hit a busy pod"),
    (CALM, observed(1, 2, **ago(60)),
     "ScaleUpCooldown: 2 jobs waiting: 2 pods wanted; stays at 1 pod for 60 s more "
     "(SCALE_UP_COOLDOWN_SECONDS=120 since 2025-12-31T23:59:00Z)"),
    (CALM, observed(3, 2, **ago(100)),
     "ScaleDownCooldown: 2 jobs waiting: 2 pods wanted; stays at 3 pods for 200 s more "
     "(SCALE_DOWN_COOLDOWN_SECONDS=300 since 2025-12-31T23:58:20Z)"),
]
UNREADABLE = [
    (SETTINGS, observed(3),
     "QueueUnavailable: no answer; stays at 3 pods; wait a little"),
    (FALLBACK, observed(3),
     "QueueUnavailable: no answer; stays at 3 pods; falls back to FALLBACK_REPLICAS=5 in 180 s; "
     "wait a little"),
    (FALLBACK, observed(3, **failing(180)),
     "Fallback: no answer; falls back to FALLBACK_REPLICAS=5; scaled up from 3 to 5 pods; wait a "
     "little"),
    (FALLBACK, observed(7, **failing(180)),
     "Fallback: no answer; falls back to FALLBACK_REPLICAS=5; stays at 7 pods; wait a little"),
    (FALLBACK, observed(3, paused_scale_out="true", **failing(180)),
     "ScaleUpDisabled: no answer; stays at 3 pods, as scale-up is disabled "
     "(queue-scaler/paused-scale-out); wait a little"),
    (FALLBACK, observed(3, paused_replicas="1"),
     "QueueUnavailable: no answer; stays at 3 pods, as it is unknown which pods are busy; "
     "queue-scaler/paused-replicas=1 waits for the queue; wait a little"),
    (SETTINGS, observed(9),
     "QueueUnavailable: no answer; stays at 9 pods, as it is unknown which pods are busy; wait a "
     "little"),
]
# fmt: on


def sentence(decision: Decision) -> str:
    return f"{decision.reason}: {full_message(decision)}"


@pytest.mark.parametrize(("settings", "seen", "expected"), DECISIONS)
def test_a_decision_in_words(settings: Settings, seen: Inputs, expected: str) -> None:
    assert sentence(decide(settings, seen)) == expected


@pytest.mark.parametrize(("settings", "seen", "expected"), UNREADABLE)
def test_a_decision_without_the_queue_in_words(
    settings: Settings, seen: Inputs, expected: str
) -> None:
    problem = QueueFailure("QueueUnavailable", "no answer", advice="wait a little")
    assert sentence(without_queue(settings, seen, problem)) == expected


# Why no pod can go: replicas, what each ReplicaSet wants and says that it has, and which of the
# three listed pods are busy.
APPLIES = "the Deployment controller has not applied the last change yet"
HELD = [
    (3, [(3, 3)], "abc", ", as removing one would hit a busy pod"),
    (3, [(3, 3), (1, 0)], "a", ", as a rollout is in progress and 1 pod is busy"),
    (3, [(3, 3), (1, 0)], "ab", ", as a rollout is in progress and 2 pods are busy"),
    (2, [(2, 3)], "a", ", as the last scale-down has not finished yet and 1 pod is busy"),
    (2, [(3, 3)], "a", f", as {APPLIES} and 1 pod is busy"),
    (2, [(3, 3)], "", f", as {APPLIES}, and a pod may be busy"),
    (4, [(4, 4)], "", ", as only 3 of 4 pods were listed, and a pod may be busy"),
]


@pytest.mark.parametrize(("replicas", "sets", "busy", "because"), HELD)
def test_why_no_pod_can_go_in_words(
    replicas: int, sets: list[tuple[int, int]], busy: str, because: str
) -> None:
    wanted = [ReplicaSet(str(n), want, has) for n, (want, has) in enumerate(sets)]
    live = [Pod(name, name, "1", "0", "node-a", (True, 2, True)) for name in "abc"]
    fleet = make_fleet(replicas, True, wanted, live)
    held = removable(fleet, replicas, frozenset(busy), -1)
    assert (held.pods, held.because) == (0, because)


# --- Warnings -------------------------------------------------------------------------------------


def annotated(restored: bool = False, **annotations: str) -> Callable[[], tuple[str, ...]]:
    named = {ANNOTATION + name.replace("_", "-"): value for name, value in annotations.items()}
    again = frozenset(named) if restored else frozenset[str]()
    return lambda: parse_state(named, SETTINGS, START, again).warnings


def busy_jobs(*jobs: tuple[str, object]) -> Callable[[], tuple[str, ...]]:
    live = [Pod("worker-5d4-x", "0c1a", "1", "rs", "node-a", (True, 2, True))]
    return lambda: find_busy_pods(live, jobs, "assignedPodId").warnings


def variables(**environ: str) -> Callable[[], tuple[str, ...]]:
    return lambda: tuple(scaler.misspelled(environ))


# fmt: off
WARNINGS = [
    (annotated(last_scale_time="yesterday"),
     "queue-scaler/last-scale-time='yesterday': not a time such as 2026-01-01T00:00:00Z or "
     "1767225600: counts as absent"),
    (annotated(last_scale_time="2027-01-01T00:00:00Z"),
     "queue-scaler/last-scale-time='2027-01-01T00:00:00Z': further ahead than the longest "
     "cooldown: counts as absent"),
    (annotated(recommendations="3"),
     "queue-scaler/recommendations='3': not a history such as '1767225600:3 1767225660:1': the "
     "window starts over"),
    (annotated(paused="yes"),
     "queue-scaler/paused='yes': not true or false: counts as true"),
    (annotated(paused_replicas="lots"),
     "queue-scaler/paused-replicas='lots': expected a whole number of pods from 0 to 2147483647: "
     "holds the current number"),
    (annotated(paused_until="tomorrow"),
     "queue-scaler/paused-until='tomorrow': not a time such as 2026-01-01T00:00:00Z or 1767225600: "
     "nothing expires"),
    (annotated(scale_down_lease="mine"),
     "queue-scaler/scale-down-lease='mine': not a lease of a run: counts as absent"),
    (annotated(scale_down_lease="2026-01-01T00:02:00Z -189388800 abcd1234"),
     "queue-scaler/scale-down-lease='2026-01-01T00:02:00Z -189388800 abcd1234': further ahead than "
     "a run can last: counts as absent"),
    (annotated(restored=True, paused_replicas="0"),
     "queue-scaler/paused-replicas='0': may have been restored by a rollback: not applied; "
     "delete it, and set it again with kubectl annotate if intended"),
    (annotated(restored=True, paused="true"),
     "queue-scaler/paused='true': may have been restored by a rollback: the pause holds; "
     "delete it, and set it again with kubectl annotate if intended"),
    (annotated(pause="true"),
     "the annotation queue-scaler/pause is unknown to the scaler: did you mean "
     "queue-scaler/paused?"),
    (annotated(note="x"),
     "the annotation queue-scaler/note is unknown to the scaler: delete it"),
    (variables(MIN_REPLICA="2"),
     "the variable MIN_REPLICA is unknown to the scaler: did you mean MIN_REPLICAS?"),
    (busy_jobs(("jobs/1", "worker-5d4-x.local")),
     "1 busy job does not hold the plain name of a pod in assignedPodId: 'worker-5d4-x.local' in "
     "jobs/1 counts as worker-5d4-x; such a pod is not removed, but its job may not be counted; "
     "store metadata.name from the downward API"),
    (busy_jobs(("jobs/1", "worker-5d4-x.local"), ("jobs/2", "worker-5d4-x.local")),
     "2 busy jobs do not hold the plain name of a pod in assignedPodId: 'worker-5d4-x.local' in "
     "jobs/1 counts as worker-5d4-x; such a pod is not removed, but its job may not be counted; "
     "store metadata.name from the downward API"),
    (busy_jobs(("jobs/1", "gone")),
     "1 busy job names no live pod of the Deployment, such as assignedPodId='gone' in jobs/1, and "
     "protects none; if that worker is gone, return its job to the queue"),
    (busy_jobs(("jobs/1", "")),
     "1 busy job names no pod, such as assignedPodId='' in jobs/1; the pod that works on such a "
     "job is not protected; set the field in the same write that claims the job"),
    (busy_jobs(("jobs/1", ""), ("jobs/2", "")),
     "2 busy jobs name no pod, such as assignedPodId='' in jobs/1; the pod that works on such a "
     "job is not protected; set the field in the same write that claims the job"),
    (busy_jobs(("jobs/1", "gone"), ("jobs/2", "lost")),
     "2 busy jobs name no live pod of the Deployment, such as assignedPodId='gone' in jobs/1, and "
     "protect none; if that worker is gone, return its job to the queue"),
    (lambda: scaler.unmatched_times("WAITING_FILTER", ((("at", "<=", "2026-01-01T00:00:00Z"),),)),
     'WAITING_FILTER matches no job: ["at", "<=", "2026-01-01T00:00:00Z"] compares text, which '
     'no timestamp matches; if at is a timestamp, write {"timestampValue": "now"} or '
     '{"timestampValue": "2026-01-01T00:00:00Z"}'),
]
# fmt: on


@pytest.mark.parametrize(("found", "expected"), WARNINGS)
def test_a_warning_in_words(found: Callable[[], Any], expected: str) -> None:
    assert list(found()) == [expected]


# --- Failures of the queue ------------------------------------------------------------------------

LINK = "https://console.firebase.google.com/v1/r/project/p/firestore/indexes?create_composite=a"
# fmt: off
QUEUE_FAILURES = [
    (("UNAVAILABLE", "failed to connect"), "",
     "QueueUnavailable: Firestore failed while counting jobs: UNAVAILABLE: 503 failed to connect"),
    (("UNAVAILABLE", "failed to connect"), "set https_proxy",
     "QueueUnavailable: Firestore failed while counting jobs: UNAVAILABLE: 503 failed to connect; "
     "set https_proxy"),
    (("UNAVAILABLE", "http://metadata.google.internal: timed out"), "",
     "QueueUnavailable: Firestore failed while counting jobs: UNAVAILABLE: 503 "
     "http://metadata.google.internal: timed out; Google's metadata server did not respond: the "
     "next run tries again"),
    (("UNAVAILABLE", "http://metadata.google.internal: Status: 403"), "",
     "QueueUnavailable: Firestore failed while counting jobs: UNAVAILABLE: 503 "
     "http://metadata.google.internal: Status: 403; Google's metadata server gave no token, check "
     "Workload Identity: the next run tries again"),
    (("UNAUTHENTICATED", "no"), "",
     "Forbidden: Firestore failed while counting jobs: UNAUTHENTICATED: 401 no; check "
     "GOOGLE_APPLICATION_CREDENTIALS or Workload Identity"),
    (("PERMISSION_DENIED", "no"), "",
     "Forbidden: Firestore failed while counting jobs: PERMISSION_DENIED: 403 no; grant the "
     "scaler's Google account the IAM role roles/datastore.viewer"),
    (("NOT_FOUND", "no such database"), "",
     "QueueUnavailable: Firestore failed while counting jobs: NOT_FOUND: 404 no such database; "
     "check FIRESTORE_PROJECT and FIRESTORE_DATABASE"),
    (("INVALID_ARGUMENT", "no"), "",
     "QueueUnavailable: Firestore failed while counting jobs: INVALID_ARGUMENT: 400 no; check "
     "QUEUE_COLLECTION, WAITING_FILTER, BUSY_FILTER and BUSY_POD_FIELD"),
    (("FAILED_PRECONDITION", f"The query requires an index: {LINK}"), "",
     "QueueUnavailable: Firestore failed while counting jobs: FAILED_PRECONDITION: 400 The query "
     f"requires an index: {LINK}; create the index with the link above"),
    (("FAILED_PRECONDITION", "The query requires an index."), "",
     "QueueUnavailable: Firestore failed while counting jobs: FAILED_PRECONDITION: 400 The query "
     "requires an index.; check FIRESTORE_DATABASE and the filters"),
    (("FAILED_PRECONDITION", "The Cloud Firestore API is not available for Datastore Mode "
      "databases."), "",
     "QueueUnavailable: Firestore failed while counting jobs: FAILED_PRECONDITION: 400 The Cloud "
     "Firestore API is not available for Datastore Mode databases.; set FIRESTORE_DATABASE to a "
     "database in native mode: the scaler reads no other"),
]
# fmt: on


@pytest.mark.parametrize(("error", "advice", "expected"), QUEUE_FAILURES)
def test_a_failure_of_the_queue_in_words(
    error: tuple[str, str], advice: str, expected: str
) -> None:
    code, text = error
    response = exceptions.from_grpc_status(StatusCode[code], text)  # type: ignore[no-untyped-call]
    failure = queue_failure("counting jobs", response, advice)
    message = "; ".join(filter(None, (str(failure), failure.advice)))
    assert f"{failure.reason}: {message}" == expected
    assert (failure.exit_code == 2) is (not failure.transient)


# --- Failures of the cluster ----------------------------------------------------------------------

ROLE = "(rbac.yaml), and a RoleBinding there must name this account"
DENIED = "ValidatingAdmissionPolicy 'a' denied request: no more than 20 replicas"
# A call, the status that it is answered with, the server's words, and the line.
# fmt: off
REFUSED = [
    ("get", "deployments", 401, "Unauthorized",
     "Forbidden: the API server answered 401 while reading the Deployment: Unauthorized; the "
     "credentials of the scaler are missing or expired: renew them"),
    ("get", "deployments", 403, "a cannot b",
     "Forbidden: the API server answered 403 while reading the Deployment: a cannot b; check "
     "that DEPLOYMENT=worker is the name in the Role: the Role in namespace default must allow get "
     f"on deployments {ROLE}"),
    ("list", "replicasets", 403, "a cannot b",
     "Forbidden: the API server answered 403 while listing the ReplicaSets: a cannot b; stays "
     "at 3 pods; "
     "BUSY_FILTER needs a rule that is new in 0.3.0: the Role in namespace default must allow list "
     f"on replicasets {ROLE}"),
    ("list", "pods", 403, "a cannot b",
     "Forbidden: the API server answered 403 while listing the pods: a cannot b; stays at 3 pods; "
     f"BUSY_FILTER needs a rule: the Role in namespace default must allow list on pods {ROLE}"),
    ("patch", "pods", 403, "a cannot b",
     "Forbidden: the API server answered 403 while setting a pod's deletion cost: a cannot b; "
     "stays at 3 "
     "pods; BUSY_FILTER needs a rule: "
     f"the Role in namespace default must allow patch on pods {ROLE}"),
    ("patch", "deployments", 403, "a cannot b",
     "Forbidden: the API server answered 403 while patching the Deployment: a cannot b; stays "
     "at 3 pods; "
     "check that DEPLOYMENT=worker is the name in the Role: the Role in namespace default must "
     f"allow patch on deployments {ROLE}"),
    ("patch", "deployments", 403, DENIED,
     "Forbidden: the API server answered 403 while patching the Deployment: "
     f"{DENIED}; stays at 3 pods"),
    ("patch", "deployments", 422, DENIED,
     "Forbidden: the API server answered 422 while patching the Deployment: "
     f"{DENIED}; stays at 3 pods"),
    ("get", "deployments", 404, "deployments.apps \"worker\" not found",
     "DeploymentNotFound: there is no Deployment worker in namespace default; check DEPLOYMENT and "
     "NAMESPACE"),
    ("get", "deployments", 500, "etcd is gone",
     "ClusterUnavailable: the API server answered 500 while reading the Deployment: etcd is gone"),
    ("patch", "deployments", 409, "the object has been modified",
     "ClusterUnavailable: the API server answered 409 while patching the Deployment: the object "
     "has been modified; stays at 3 pods"),
]
# fmt: on


def last_line(run: Run) -> str:
    """Without time, severity and the Deployment."""
    line = run.stdout.splitlines()[-1]
    return line.partition(" AutoScaler default/worker ")[2]


DOWN = {"BUSY_FILTER": BUSY, "SCALE_DOWN_STABILIZATION_SECONDS": "0"}


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize(("verb", "resource", "status", "message", "expected"), REFUSED)
def test_a_refusal_in_words(
    world: World, verb: str, resource: str, status: int, message: str, expected: str
) -> None:
    world.cluster.scale("worker", 3)
    refusal = kubernetes.answer(status, message=message)
    world.cluster.fault(Match(verb, resource), refusal, times=None)
    run = world.run(**DOWN)
    assert last_line(run) == expected, run


@pytest.mark.usefixtures("one_try")
def test_an_unusable_response_in_words(world: World) -> None:
    table = kubernetes.body(b'{"kind": "Table", "items": [], "metadata": {}}')
    world.cluster.fault(Match("list", "pods"), table, times=None)
    assert last_line(world.run(**DOWN)) == (
        "ClusterUnavailable: the API server sent an unusable response while listing the pods: "
        "ValueError: kind is 'Table'; stays at 1 pod"
    )


@pytest.mark.usefixtures("one_try")
def test_a_server_that_does_not_respond_in_words(world: World) -> None:
    world.cluster.stop_listening()
    line = last_line(world.run())
    said = "ClusterUnavailable: the API server did not respond while reading the Deployment: "
    assert line.startswith(said) and "Connection refused" in line


def test_credentials_that_no_request_can_carry_in_words(world: World) -> None:
    config = world.cluster.write_kubeconfig(world.directory / "odd", token="two\nlines")
    assert last_line(world.run(KUBECONFIG=str(config))) == (
        "Forbidden: the credentials contain a character that HTTP headers forbid, such as a newline"
    )


def test_a_look_without_time_in_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    over = Deadline(0, 0, math.inf)
    monkeypatch.setattr(scaler, "look_deadline", lambda *_: over)
    assert last_line(world.run()) == (
        "ClusterUnavailable: no time was left for reading the Deployment"
    )


@pytest.mark.usefixtures("one_try")
def test_a_queue_read_too_long_ago_in_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaler, "FRESH_SECONDS", 0)
    world.cluster.scale("worker", 3)
    assert last_line(world.run(**DOWN)) == (
        "QueueUnavailable: the busy jobs were read 0 s ago, too long ago to remove pods; stays at "
        "3 pods; if each run says so, reading them takes more than 0 s: raise the CPU request, or "
        "return the jobs of lost workers to the queue"
    )


@pytest.mark.usefixtures("one_try")
def test_a_change_while_pods_are_chosen_in_words(world: World) -> None:
    world.cluster.scale("worker", 3)
    marking = Match("patch", "pods")
    world.cluster.hook(marking, lambda _: world.cluster.annotate("worker", team="a"), "after")
    assert last_line(world.run(**DOWN)) == (
        "ClusterUnavailable: the Deployment changed while pods were chosen; stays at 3 pods"
    )


@pytest.mark.usefixtures("one_try")
def test_an_unusable_count_in_words(world: World) -> None:
    world.queue.fault("count", CountAs(None))
    assert last_line(world.run()) == (
        "QueueUnavailable: Firestore returned no usable count while counting waiting jobs; stays "
        "at 1 pod"
    )


def test_a_missing_configuration_in_words(world: World) -> None:
    line = world.run(KUBECONFIG="/nowhere").stdout.partition(" ERROR AutoScaler worker ")[2]
    assert line == (
        "ClusterUnavailable: no usable cluster configuration: looked for a service account "
        "(KUBERNETES_SERVICE_HOST and /var/run/secrets/kubernetes.io/serviceaccount), KUBECONFIG "
        "and ~/.kube/config: ConfigException: no such file\n"
    )


def test_missing_credentials_in_words(world: World) -> None:
    environ = {**world.environment(), "NO_GCE_CHECK": "true"}
    del environ["FIRESTORE_EMULATOR_HOST"]
    assert last_line(world.run_with(environ)) == (
        "Forbidden: no usable Google credentials or project for Firestore: looked for "
        "GOOGLE_APPLICATION_CREDENTIALS (the path of a file), gcloud's login, Workload Identity, "
        "FIRESTORE_PROJECT (DefaultCredentialsError); stays at 1 pod; set one of them"
    )


def test_an_event_that_is_refused_is_a_warning_with_the_rule(world: World) -> None:
    world.queue.fill(2)
    refusal = kubernetes.answer(403, message="a cannot b")
    world.cluster.fault(Match("create", "events"), refusal)
    run = world.run()
    assert run.exit_code == 0
    assert run.stdout.splitlines()[0].partition(" ")[2] == (
        "WARNING AutoScaler default/worker: no Event was written: the API server answered 403 "
        "while writing the Event: a cannot b; the Role in namespace default must allow create on "
        f"events {ROLE}"
    )


# --- Looks that end early -------------------------------------------------------------------------


def aborted(
    why: str, reason: scaler.Reason | None = None, *, current: int | None = 3, doubt: bool = False
) -> Decision:
    progress = Progress(Deadline(0, 0, 0), current=current, in_doubt=doubt)
    return progress.abort(why, reason)


# fmt: off
ABORTED = [
    (aborted("ended by SIGTERM while counting waiting jobs", "Interrupted"),
     "Interrupted: ended by SIGTERM while counting waiting jobs; stays at 3 pods"),
    (aborted("ended by SIGTERM while reading the settings", "Interrupted", current=None),
     "Interrupted: ended by SIGTERM while reading the settings"),
    (aborted("out of time (TIMEOUT_SECONDS=45) while listing the pods"),
     "ClusterUnavailable: out of time (TIMEOUT_SECONDS=45) while listing the pods; stays at 3 "
     "pods"),
    (aborted("the API server did not respond", doubt=True),
     "ClusterUnavailable: the API server did not respond; not known whether the patch was applied, "
     "the next look will check"),
    (aborted(scaler.suspended(61.4), "Interrupted"),
     "Interrupted: the process was suspended until 61 s past its deadline; the next run looks "
     "again; stays at 3 pods"),
]
# fmt: on


@pytest.mark.parametrize(("decision", "expected"), ABORTED)
def test_a_look_that_ends_early_in_words(decision: Decision, expected: str) -> None:
    assert sentence(decision) == expected


def test_a_crash_in_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("made by the test")

    monkeypatch.setattr(scaler, "decide", crash)
    world.queue.fill(1)
    assert last_line(world.run()) == (
        "QueueUnavailable: internal error while counting waiting jobs: ZeroDivisionError: made by "
        "the test; stays at 1 pod; this is a bug of queue-scaler: report it with the lines above"
    )


# --- How a line is written ------------------------------------------------------------------------


def test_the_record_of_invalid_settings_has_no_oldest_job(world: World) -> None:
    run = world.run(MIN_REPLICAS="many")
    assert run.exit_code == 2 and "oldestWaitingSeconds" not in run.record, run


def log_of(**values: Any) -> scaler.Log:
    return scaler.Log(replace(scaler.read_output({}), **values), lambda: START)


def test_a_json_line_has_the_fields_that_cloud_logging_reads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_of(log_format="json").write("ERROR", " AtTarget: 작업", {"reason": "AtTarget"})
    line = capsys.readouterr().out
    assert "작업" in line and json.loads(line) == {
        "time": "2026-01-01T00:00:00Z",
        "namespace": None,
        "deployment": None,
        "reason": "AtTarget",
        "severity": "ERROR",
        "message": "AutoScaler AtTarget: 작업",
    }


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_what_took_how_long_is_written_at_debug_only(
    capsys: pytest.CaptureFixture[str], level: str
) -> None:
    log_of(log_level=level).debug(lambda: "GET took 1 s")
    expected = "2026-01-01T00:00:00Z DEBUG AutoScaler: GET took 1 s\n"
    assert capsys.readouterr().out == (expected if level == "DEBUG" else "")


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_line_that_cannot_be_written_is_lost(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(_: str) -> int:
        raise error

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=fail))
    log_of().line("INFO", "hello")


def test_a_line_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever follows the log of a run sees each line when it is written."""
    done: list[str] = []
    out = SimpleNamespace(write=done.append, flush=lambda: done.append("flush"))
    monkeypatch.setattr(sys, "stdout", out)
    log_of().line("INFO", "hello")
    assert done == ["2026-01-01T00:00:00Z INFO AutoScaler: hello", "\n", "flush"]


# --- Whole lines ----------------------------------------------------------------------------------


def held_by_a_lease(world: World) -> Run:
    until = {scaler.LEASE: "2026-01-01T00:00:30Z -189388900 abcd1234"}
    world.cluster.annotate("worker", "queue-scaler", **until)
    return world.run(**DOWN)


def expired(world: World) -> Run:
    pause = {scaler.PAUSED: "true", scaler.PAUSED_UNTIL: "2025-12-31T00:00:00Z"}
    world.cluster.annotate("worker", **pause)
    world.queue.fill(3)
    return world.run()


def rollout(world: World) -> Run:
    world.cluster.start_rollout("worker", new_pods=1, old_pods=3)
    busy(world, "assignedPodId")
    return world.run(**DOWN)


def override(world: World) -> Run:
    busy(world, "assignedPodId")
    world.cluster.annotate("worker", **{scaler.PAUSED_REPLICAS: "0"})
    return world.run(**DOWN)


def busy(world: World, name: str) -> None:
    pod = world.cluster.pods("worker")[0]["metadata"]["name"]
    world.queue.put("jobs/1", {"status": "processing", name: pod, "attempt": 1})


def wrong_pod_field(world: World) -> Run:
    busy(world, "pod")
    return world.run(**DOWN)


def two_writers(world: World) -> Run:
    world.cluster.scale("worker", 2, manager="keda")
    world.queue.fill(2)
    return world.run()


def at_the_limit(world: World) -> Run:
    world.queue.fill(1001)
    return world.run()


# fmt: off
RUNS: dict[str, tuple[Callable[[World], Run], list[str]]] = {
    "a dry run": (lambda world: world.run("--dry-run", WAITING_FILTER="[]", **DOWN), [
        "INFO AutoScaler default/worker ScaledDown: dry run, nothing is changed: 0 jobs waiting, 0 "
        "busy: 1 pod wanted, the minimum; scaled down from 3 to 1 pod"]),
    "another run's lease": (held_by_a_lease, [
        "INFO AutoScaler default/worker: no document in `jobs` has the field `status`: unless "
        "the queue is just empty, check QUEUE_COLLECTION and WAITING_FILTER",
        "INFO AutoScaler default/worker WorkersBusy: 0 jobs waiting, 0 busy: 1 pod wanted, the "
        "minimum; stays at 3 pods, as another run is removing pods until 2026-01-01T00:00:30Z"]),
    "an expired pause": (expired, [
        "INFO AutoScaler default/worker AtTarget: the pause has expired, queue-scaler/paused-"
        "until, queue-scaler/paused removed; 3 jobs waiting: 3 pods wanted, the maximum; stays at "
        "3 pods"]),
    "a rollout": (rollout, [
        "INFO AutoScaler default/worker WorkersBusy: 0 jobs waiting, 1 busy: 1 pod wanted, the "
        "minimum; stays at 3 pods, as a rollout is in progress and 1 pod is busy"]),
    "the wrong pod field": (wrong_pod_field, [
        "ERROR AutoScaler default/worker InvalidSettings: the busy job names no pod in the "
        "field `assignedPodId` (BUSY_POD_FIELD), so it is unknown which pods are busy; "
        "stays at 3 "
        "pods; set BUSY_POD_FIELD to the field with the pod's name; a busy job has `pod`, "
        "`attempt`, `status`"]),
    "two writers": (two_writers, [
        "WARNING AutoScaler default/worker: two writers: spec.replicas was last set by keda "
        "through the scale subresource at TIME; remove one",
        "INFO AutoScaler default/worker AtTarget: 2 jobs waiting: 2 pods wanted; stays at 2 pods"]),
    "a misspelled variable": (lambda world: world.run(WAITING_FILTER="[]", MIN_REPLICA="2"), [
        "WARNING AutoScaler worker: the variable MIN_REPLICA is unknown to the scaler: did you "
        "mean MIN_REPLICAS?",
        "INFO AutoScaler default/worker ScaleDownStabilized: 0 jobs waiting: 1 pod wanted, the "
        "minimum; stays at 3 pods for 300 s more (SCALE_DOWN_STABILIZATION_SECONDS=300)"]),
    "paused-replicas below the busy pods": (override, [
        "INFO AutoScaler default/worker Paused: queue-scaler/paused-replicas=0; scaled down from 3 "
        "to 0 pods; 1 busy pod is among those removed"]),
    "an emulator with a scheme": (
        lambda world: world.run(FIRESTORE_EMULATOR_HOST="http://127.0.0.1:8080"), [
        "ERROR AutoScaler worker InvalidSettings: FIRESTORE_EMULATOR_HOST='http://127.0.0.1:8080': "
        "expected HOST:PORT, no scheme"]),
    "an unknown argument": (lambda world: world.run("--force"), [
        "ERROR AutoScaler worker InvalidSettings: unknown argument '--force': expected --dry-run, "
        "--help, --version"]),
    "a count at the limit": (at_the_limit, [
        "INFO AutoScaler default/worker AtTarget: 1000 or more jobs waiting: 3 pods wanted, the "
        "maximum; stays at 3 pods"]),
}
# fmt: on


@pytest.mark.parametrize(("act", "lines"), RUNS.values(), ids=RUNS)
def test_the_lines_of_a_run(world: World, act: Callable[[World], Run], lines: list[str]) -> None:
    world.cluster.scale("worker", 3)
    printed = act(world).stdout
    assert re.findall(r"^\S+Z (.*)$", re.sub(r"at 20\S+Z", "at TIME", printed), re.M) == lines


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_the_line_with_the_decision_is_written_at_every_level(world: World, level: str) -> None:
    """Or an alert on its absence would fire all day."""
    world.cluster.annotate("worker", **{ANNOTATION + "note": "x"})
    run = world.run(LOG_LEVEL=level)
    assert "INFO AutoScaler default/worker AtTarget: " in run.stdout.splitlines()[-1], run
    assert ("WARNING AutoScaler" in run.stdout) is (level != "ERROR"), run
    assert ("no document in `jobs`" in run.stdout) is (level in ("DEBUG", "INFO")), run


@pytest.mark.parametrize(
    ("settings", "deployment", "namespace"),
    [({}, "worker", "default"), ({"NAMESPACE": "nowhere"}, "worker", "nowhere")],
)
def test_every_line_names_the_deployment(
    world: World, settings: dict[str, str], deployment: str, namespace: str
) -> None:
    world.cluster.annotate("worker", **{ANNOTATION + "note": "x"})
    run = world.run(LOG_FORMAT="json", **settings)
    entries = [json.loads(line) for line in run.stdout.splitlines()]
    for entry in entries:
        assert (entry["deployment"], entry["namespace"]) == (deployment, namespace)
        assert entry["message"].startswith(f"AutoScaler {namespace}/{deployment}"), entry
    assert len(entries) == (3 if namespace == "default" else 1), "hint, warning, decision"


# --- The hint about a wrong collection or field ---------------------------------------------------


@pytest.mark.parametrize(
    ("document", "settings", "hint"),
    [
        (None, {}, "no document in `jobs` has the field `status`"),
        ({"state": "done"}, {}, "no document in `jobs` has the field `status`"),
        ({"status": "done"}, {}, None),
        ({"state": "done"}, {"QUEUE_COLLECTION": "tasks,jobs"}, "in `tasks` or `jobs` has the fi"),
        ({"status": "done"}, {"QUEUE_COLLECTION": "tasks,jobs"}, None),
        (None, {"WAITING_FILTER": "[]"}, None),
        (None, {"LOG_LEVEL": "WARNING"}, None),
    ],
)
def test_a_hint_names_a_wrong_collection_or_field(
    world: World, document: dict[str, object] | None, settings: dict[str, str], hint: str | None
) -> None:
    if document:
        world.queue.put("jobs/1", document)
    run = world.run(**settings)
    assert run.exit_code == 0
    assert (hint or "AtTarget") in run.stdout.splitlines()[0], run


def test_the_hint_is_given_once_a_run_and_only_at_0(world: World) -> None:
    polling = {"POLLING_INTERVAL_SECONDS": "1", "TIMEOUT_SECONDS": "2"}
    run = world.run(**polling)
    assert run.record["looks"] >= 2 and run.stdout.count("no document in") == 1, run
    world.queue.calls.clear()
    world.queue.fill(1)
    assert "no document" not in world.run().stdout
    assert [call.kind for call in world.queue.calls] == ["count"], "no read is spent on it"


def test_a_hint_that_cannot_be_read_costs_nothing(world: World) -> None:
    world.queue.fault("query", Fail(StatusCode.PERMISSION_DENIED))
    run = world.run()
    assert (run.exit_code, run.reason, run.stdout.count("\n")) == (0, "AtTarget", 1), run


def test_a_line_without_a_deployment_names_none(capsys: pytest.CaptureFixture[str]) -> None:
    scaler.Log(scaler.read_output({}), lambda: START).line("WARNING", "something")
    assert capsys.readouterr().out == "2026-01-01T00:00:00Z WARNING AutoScaler: something\n"
