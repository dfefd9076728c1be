"""Responses that nobody expects: a run takes them for what they are, or holds; it never guesses."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

import scaler
from tests.support import kubernetes
from tests.support.firestore import CountAs, EmptyStream, Fail, On
from tests.support.kubernetes import Match
from tests.support.kubernetes_objects import Object
from tests.support.world import BUSY, START, World

SPEC = {"replicas": 1, "selector": {"matchLabels": {"app": "worker"}}}


Change = Callable[[Object], object]


def edit(world: World, change: Change) -> None:
    """Change the stored Deployment past everything that an API server checks."""
    change(world.cluster.store.objects[("deployments", "default", "worker")])


# ------------------------------------------------------------------------------ the Deployment


ABSENT: dict[str, Change] = {
    "no replicas": lambda d: d["spec"].pop("replicas"),
    "no annotations": lambda d: d["metadata"].pop("annotations"),
    "null for annotations": lambda d: d["metadata"].update(annotations=None),
}


@pytest.mark.parametrize("change", ABSENT.values(), ids=ABSENT)
def test_a_missing_part_of_a_deployment_has_its_default(world: World, change: Change) -> None:
    world.queue.fill(5)
    edit(world, change)
    run = world.run()
    assert (run.reason, run.record["current"], world.replicas) == ("ScaledUp", 1, 3), run
    assert set(world.annotations) == {"last-scale", "last-scale-time"}


def test_other_peoples_huge_annotations_are_left_alone(world: World) -> None:
    world.queue.fill(5)
    huge = {"example.com/last-applied": "x" * 200_000, "queue-scaler/note": "ä\n" * 10_000}
    edit(world, lambda d: d["metadata"]["annotations"].update(huge))
    run = world.run(LOG_LEVEL="DEBUG")
    assert (run.reason, world.replicas) == ("ScaledUp", 3), run
    assert huge.items() <= world.cluster.annotations("worker").items()
    assert all(len(line) < 4000 for line in run.stdout.splitlines())


def test_a_deployment_without_room_for_our_annotations_is_left_as_it_is(world: World) -> None:
    """The API server takes 256 KiB of annotations; the user has to make room."""
    world.queue.fill(5)
    full = {"example.com/full": "x" * (256 * 1024 - 100)}
    edit(world, lambda d: d["metadata"]["annotations"].update(full))
    run = world.run()
    assert (run.exit_code, world.replicas, run.record["replicas"]) == (2, 1, 1), run
    assert "Too long: may not be more than 262144 bytes" in run.record["message"], run


def test_a_long_history_is_read_and_does_not_grow(world: World) -> None:
    now = int(START.timestamp())
    history = " ".join(f"{now - age}:{age % 3 + 1}" for age in range(10_000))
    world.cluster.scale("worker", 3)
    world.cluster.annotate("worker", **{"queue-scaler/recommendations": history})
    run = world.run()
    assert (run.exit_code, run.reason) == (0, "ScaleDownStabilized"), run
    assert len(world.annotations["recommendations"]) < 4096


def test_no_annotation_can_forge_a_line_of_the_log(world: World) -> None:
    forged = "2026-01-01T00:00:00Z INFO AutoScaler default/worker ScaledUp: forged"
    for name in ("last-scale-time", "paused", "recommendations", "paused-replicas"):
        world.cluster.annotate("worker", **{f"queue-scaler/{name}": f"x\n{forged}"})
    run = world.run()
    assert not any(line.startswith(forged) for line in run.stdout.splitlines()), run


def odd_deployment(spec: object, **metadata: object) -> bytes:
    metadata = {"name": "worker", "resourceVersion": "1", **metadata}
    return json.dumps({"kind": "Deployment", "metadata": metadata, "spec": spec}).encode()


ODD_DEPLOYMENTS: dict[str, bytes] = {
    "null": b"null",
    "a string": b'"Deployment"',
    "only its kind": b'{"kind":"Deployment"}',
    "no resourceVersion": odd_deployment(SPEC, resourceVersion=None),
    "no spec": odd_deployment(None),
    "no selector": odd_deployment({"replicas": 1}),
    "an empty selector": odd_deployment({"replicas": 1, "selector": {}}),
    "words for numbers": odd_deployment({**SPEC, "replicas": "three"}),
    "a number in quotes": odd_deployment({**SPEC, "replicas": "3"}),
    "endless replicas": odd_deployment({**SPEC, "replicas": float("inf")}),
    "a list of annotations": odd_deployment(SPEC, annotations=["queue-scaler/paused"]),
    "numbers in annotations": odd_deployment(SPEC, annotations={"queue-scaler/last-scale": 5}),
    "not UTF-8": b"\xff\xfe\x00",
    "endless lists": b"[" * 200_000,
    "a long number": b"9" * 10_000,
    "words for a generation": odd_deployment(SPEC, generation="two"),
}


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("raw", ODD_DEPLOYMENTS.values(), ids=ODD_DEPLOYMENTS)
def test_an_unusable_deployment_changes_nothing(world: World, raw: bytes) -> None:
    world.queue.fill(5)
    world.cluster.fault(Match("get", "deployments"), kubernetes.body(raw), times=None)
    run = world.run()
    assert (run.exit_code, run.reason) == (1, "ClusterUnavailable"), run
    assert "an unusable response" in run.record["message"], run
    assert run.record["action"] == "none" and world.cluster.calls(Match("patch")) == []


# ------------------------------------------------------------------ the lists of a scale-down


def listing(kind: str, *items: object, **metadata: object) -> bytes:
    return json.dumps({"kind": kind, "metadata": metadata, "items": items}).encode()


def odd_set(**changes: object) -> dict[str, object]:
    owner = {"kind": "Deployment", "uid": UID, "controller": True}
    metadata = {"name": "worker-1", "uid": "rs", "ownerReferences": [owner], **changes}
    return {"metadata": metadata, "spec": {"replicas": changes.get("replicas", 3)}}


def odd_pod(**changes: object) -> dict[str, object]:
    owner = {"kind": "ReplicaSet", "uid": "rs", "controller": True}
    metadata = {"name": "w", "uid": "u", "resourceVersion": "1", "ownerReferences": [owner]}
    return {"metadata": {**metadata, **changes}, "spec": {}, "status": {"phase": "Running"}}


UID = "the Deployment's"
ODD_LISTS: dict[str, tuple[str, bytes]] = {
    "null": ("replicasets", b"null"),
    "a string": ("pods", b'"PodList"'),
    "no kind": ("pods", b'{"metadata": {}, "items": []}'),
    "pods for ReplicaSets": ("replicasets", listing("PodList")),
    "ReplicaSets for pods": ("pods", listing("ReplicaSetList")),
    "a table": ("pods", listing("Table")),
    "no metadata": ("pods", b'{"kind": "PodList", "items": []}'),
    "items that are a number": ("replicasets", b'{"kind": "ReplicaSetList", "items": 5}'),
    "items that are names": ("pods", listing("PodList", "worker-1")),
    "a ReplicaSet without metadata": ("replicasets", listing("ReplicaSetList", {"spec": {}})),
    "a ReplicaSet without a UID": ("replicasets", listing("ReplicaSetList", odd_set(uid=None))),
    "words for numbers": ("replicasets", listing("ReplicaSetList", odd_set(replicas="3"))),
    "a pod without a name": ("pods", listing("PodList", odd_pod(name=None))),
    "a pod without a resourceVersion": (
        "pods", listing("PodList", odd_pod(resourceVersion=None))),
    "owners that are names": ("pods", listing("PodList", odd_pod(ownerReferences=["worker"]))),
    "no pod at all": ("pods", listing("PodList")),
    "no ReplicaSet at all": ("replicasets", listing("ReplicaSetList")),
    "another Deployment's ReplicaSet only": (
        "replicasets", listing("ReplicaSetList", odd_set(ownerReferences=[]))),
    "endless lists": ("pods", b"[" * 200_000),
    "not UTF-8": ("pods", b"\xff\xfe"),
}  # fmt: skip


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize(("resource", "raw"), ODD_LISTS.values(), ids=ODD_LISTS)
def test_an_unusable_list_removes_nothing(world: World, resource: str, raw: bytes) -> None:
    world.cluster.scale("worker", 3)
    uid = str(world.cluster.deployment("worker")["metadata"]["uid"])
    raw = raw.replace(json.dumps(UID).encode(), json.dumps(uid).encode())
    busy = str(world.cluster.pods("worker")[0]["metadata"]["name"])
    world.queue.put("jobs/1", {"status": "processing", "assignedPodId": busy})
    world.cluster.fault(Match("list", resource), kubernetes.body(raw), times=None)
    run = world.run(BUSY_FILTER=BUSY, SCALE_DOWN_STABILIZATION_SECONDS="0")
    assert world.replicas == 3 and world.cluster.calls(Match("patch")) == [], run
    assert (run.exit_code, run.reason) in [(1, "ClusterUnavailable"), (0, "WorkersBusy")], run


def test_a_page_that_has_expired_is_listed_again_from_the_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API server keeps a list's later pages for a few minutes, then answers 410."""
    monkeypatch.setattr(scaler, "PAGE", 1)
    world.cluster.scale("worker", 3)
    world.cluster.fault(Match("list", "pods"), kubernetes.answer(410), nth=2)
    run = world.run(BUSY_FILTER=BUSY, SCALE_DOWN_STABILIZATION_SECONDS="0")
    assert (run.exit_code, world.replicas) == (0, 1), run


# ----------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize(
    ("doing", "nth"), [("counting waiting jobs", 1), ("counting busy jobs", 2)]
)
@pytest.mark.parametrize("answer", [CountAs(None), CountAs(-1), EmptyStream()], ids=str)
def test_an_unusable_count_holds(world: World, answer: Any, doing: str, nth: int) -> None:
    world.cluster.scale("worker", 3)
    world.queue.fault(On("count", nth), answer)
    run = world.run(BUSY_FILTER=BUSY, SCALE_DOWN_STABILIZATION_SECONDS="0")
    assert (run.exit_code, run.reason, world.replicas) == (1, "QueueUnavailable", 3), run
    assert f"no usable count while {doing}" in run.record["message"], run


@pytest.mark.parametrize("value", [1000, 1001, 2**31, 2**63 - 1])
def test_a_count_beyond_the_limit_is_that_many_or_more(world: World, value: int) -> None:
    world.queue.fault("count", CountAs(value))
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas) == (0, "ScaledUp", 3), run
    assert run.record["waitingCapped"] is True and "or more jobs waiting" in run.record["message"]


# ----------------------------------------------------------------------------------- the clocks


@pytest.mark.parametrize("minutes", [10, -10])
def test_an_api_server_whose_clock_is_off_changes_nothing(world: World, minutes: int) -> None:
    world.cluster.store.clock = lambda: START + timedelta(minutes=minutes)
    world.queue.fill(5)
    assert [world.run().reason for _ in range(2)] == ["ScaledUp", "AtTarget"]
    world.queue.clear()
    run = world.run(SCALE_DOWN_STABILIZATION_SECONDS="0")
    assert run.reason == "ScaleDownCooldown" and "WARNING" not in run.stdout, run


def test_a_failing_queue_by_another_clock_is_timed_from_scratch(world: World) -> None:
    world.queue.fault("count", Fail(StatusCode.UNKNOWN))
    fallback = {"FALLBACK_REPLICAS": "2", "FALLBACK_AFTER_SECONDS": "120"}
    world.pass_time(600)
    assert world.run(**fallback).reason == "QueueUnavailable"
    world.pass_time(-600)
    reasons = []
    for _ in range(3):
        reasons.append(world.run(**fallback).reason)
        world.pass_time()
    assert reasons == ["QueueUnavailable", "QueueUnavailable", "Fallback"]
    assert world.replicas == 2
