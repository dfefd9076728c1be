"""Other hands at the Deployment: another master is named, and what `kubectl rollout undo` puts back
is no order."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

from scaler import ANNOTATION
from tests.support.firestore import Fail
from tests.support.kubernetes import Match
from tests.support.world import Run, World

HPA = "kube-controller-manager"


def warnings(run: Run) -> list[str]:
    """What a run says of another master."""
    return [line for line in run.stdout.splitlines() if "two masters" in line]


def set_replicas(world: World, replicas: int, manager: str, subresource: str = "scale") -> None:
    spec = {"replicas": replicas}
    world.cluster.edit(
        "deployments", "worker", lambda d: d["spec"].update(spec), manager, subresource
    )


# --- Two masters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manager", "subresource", "named"),
    [
        (HPA, "scale", "a HorizontalPodAutoscaler (kube-controller-manager through the scale"),
        ("keda", "scale", "keda through the scale subresource"),
        ("argocd-controller", "", "argocd-controller at "),
        ("Helm", "", "Helm at "),
        ("queue-scaler-of-another-team", "", "queue-scaler-of-another-team at "),
    ],
)
def test_another_master_is_noticed_and_named(
    world: World, manager: str, subresource: str, named: str
) -> None:
    world.queue.fill(3)
    assert world.run().reason == "ScaledUp"
    set_replicas(world, 2, manager, subresource)
    run = world.run()
    assert run.exit_code == 0 and run.reason == "ScaleUpCooldown", run
    [warning] = warnings(run)
    assert named in warning and " WARNING AutoScaler " in warning


@pytest.mark.parametrize("manager", ["kubectl", "kubectl-edit", "kubectl-scale", "kubectl-patch"])
def test_a_persons_kubectl_is_no_master(world: World, manager: str) -> None:
    world.queue.fill(2)
    for subresource in ("", "scale"):
        set_replicas(world, 1, "kubectl", "")
        set_replicas(world, 2, manager, subresource)
        assert warnings(world.run()) == []


@pytest.mark.parametrize("scaled_before", [False, True])
def test_whoever_created_it_is_no_master(world: World, scaled_before: bool) -> None:
    """Helm and CI write `replicas` once, and own the field until somebody changes it."""
    world.name, world.now = "created", None
    world.cluster.add_deployment("created", replicas=2, manager="helm")
    world.queue.fill(2)
    if scaled_before:
        later = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
        world.cluster.annotate("created", **{ANNOTATION + "last-scale-time": later})
    stopped = {"paused": True}
    world.cluster.edit("deployments", "created", lambda d: d["spec"].update(stopped), "other")
    assert warnings(world.run()) == []


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_owners_the_later_one_counts(world: World, order: int) -> None:
    """The Deployment was applied with `replicas`, and scaled after that."""
    owns: dict[str, object] = {"operation": "Update", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    applied = {**owns, "manager": "helm", "time": "2025-12-31T00:00:00Z"}
    scaled = {**owns, "manager": "keda", "subresource": "scale", "time": "2026-01-01T00:00:00Z"}
    stored = world.cluster.store.objects[("deployments", "default", "worker")]
    stored["metadata"]["managedFields"] = [applied, scaled][::order]
    assert len(warnings(world.run())) == 1


def test_the_other_one_is_named_even_where_the_queue_cannot_be_read(world: World) -> None:
    world.queue.fault("count", Fail(StatusCode.UNKNOWN))
    set_replicas(world, 2, HPA)
    run = world.run()
    assert run.exit_code == 1 and len(warnings(run)) == 1, run


def test_the_other_one_comes_in_between_reading_and_patching(world: World) -> None:
    """Its write is a conflict, and the decision is made again on what it left."""
    world.queue.fill(5)
    world.cluster.hook(Match("patch", "deployments"), lambda _: set_replicas(world, 2, HPA))
    run = world.run()
    assert (run.exit_code, run.reason, run.record["current"]) == (0, "ScaledUp", 2), run
    assert world.replicas == 3 and len(warnings(run)) == 1
    assert warnings(world.run()) == [], "after the scaler's own scale"


# --- kubectl rollout undo -------------------------------------------------------------------------


def undo(world: World, name: str, value: str) -> None:
    """What `kubectl rollout undo` does: a patch of the whole object by plain `kubectl`."""
    world.cluster.annotate("worker", "kubectl", **{ANNOTATION + name: value})


def test_an_order_that_came_back_is_not_carried_out(world: World) -> None:
    world.cluster.scale("worker", 3)
    undo(world, "paused-replicas", "0")
    for _ in range(2):
        run = world.run()
        assert (run.exit_code, run.reason, world.replicas) == (0, "Paused", 3), run
        assert "paused-replicas='0': came back with a kubectl rollout undo" in run.stdout, run
        world.pass_time()
    world.cluster.annotate("worker", **{ANNOTATION + "paused-replicas": "2"})
    run = world.run()
    assert world.replicas == 2 and "came back" not in run.stdout, "set again, it counts"


def test_a_history_that_came_back_starts_afresh(world: World) -> None:
    world.cluster.scale("worker", 3)
    undo(world, "recommendations", "1767225480:1 1767225540:1")
    run = world.run()
    assert run.reason == "ScaleDownStabilized" and "300 s more" in run.record["message"], run
    assert "recommendations" in run.stdout
    assert "came back" not in world.run().stdout, "it is the scaler's own again"


def owner(manager: str, *names: str, **more: str) -> dict[str, object]:
    """An entry of managedFields."""
    owned: dict[str, object] = {f"f:{ANNOTATION}{name}": {} for name in names}
    fields = {"f:metadata": {"f:annotations": {".": {}, **owned}}}
    return {"manager": manager, "operation": "Update", "fieldsV1": fields, **more}


UNDONE = owner("kubectl", "paused-scale-in", "paused-scale-out", "last-scale-time")
ANNOTATED = owner("kubectl-annotate", "paused-scale-in")
APPLIED = owner("ci", "paused-scale-in", operation="Apply")
OWNERS: dict[str, tuple[list[dict[str, object]] | None, set[str]]] = {
    "the rollback alone": ([UNDONE], {"paused-scale-in", "paused-scale-out"}),
    "a person's annotate, too": ([UNDONE, ANNOTATED], {"paused-scale-out"}),
    "an Apply, too": ([UNDONE, APPLIED], {"paused-scale-out"}),
    "an Apply of kubectl": ([owner("kubectl", "paused-scale-in", operation="Apply")], set()),
    "a subresource": ([owner("kubectl", "paused-scale-in", subresource="scale")], set()),
    "somebody without fields": ([{"manager": "old", "operation": "Update"}], set()),
    "somebody without more than a name": ([{"manager": "old"}], set()),
    "nobody": ([], set()),
    "null": (None, set()),
}


@pytest.mark.parametrize(("owners", "came_back"), OWNERS.values(), ids=OWNERS)
def test_whoever_owns_an_annotation_beside_the_rollback_has_set_it(
    owners: list[dict[str, object]] | None, came_back: set[str], world: World
) -> None:
    both = {ANNOTATION + name: "true" for name in ("paused-scale-in", "paused-scale-out")}
    world.cluster.annotate("worker", **both)
    stored = world.cluster.store.objects[("deployments", "default", "worker")]
    stored["metadata"]["managedFields"] = owners
    run = world.run()
    said = set(re.findall(r"queue-scaler/(\S+)='true':? came back", run.stdout))
    assert run.exit_code == 0 and said == came_back and warnings(run) == [], run
