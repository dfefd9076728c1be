"""Somebody else sets `spec.replicas`, too: the run says who, and obeys its own rules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

from tests.support.firestore import Fail, FakeFirestore
from tests.support.kubernetes import Match
from tests.support.world import Run, World

HPA = "kube-controller-manager"


def warnings(run: Run) -> list[str]:
    """What a run says of another master."""
    return [line for line in run.stdout.splitlines() if "two masters" in line]


def set_replicas(world: World, replicas: int, manager: str, subresource: str = "scale") -> None:
    world.cluster.edit(
        "deployments",
        "worker",
        lambda d: d["spec"].update(replicas=replicas),
        manager=manager,
        subresource=subresource,
    )


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
    world: World, queue: FakeFirestore, manager: str, subresource: str, named: str
) -> None:
    queue.fill(3)
    assert world.run().reason == "ScaledUp"
    set_replicas(world, 2, manager, subresource)
    run = world.run()
    assert run.exit_code == 0 and run.reason == "ScaleUpCooldown", run
    assert len(warnings(run)) == 1 and named in warnings(run)[0], run
    assert " WARNING AutoScaler " in warnings(run)[0]


@pytest.mark.parametrize("manager", ["kubectl", "kubectl-edit", "kubectl-scale", "kubectl-patch"])
def test_a_persons_kubectl_is_no_master(world: World, queue: FakeFirestore, manager: str) -> None:
    queue.fill(2)
    for subresource in ("", "scale"):
        set_replicas(world, 1, "kubectl", "")
        set_replicas(world, 2, manager, subresource)
        assert warnings(world.run()) == []


@pytest.mark.parametrize("scaled_before", [False, True])
def test_whoever_created_the_deployment_is_no_master(
    world: World, queue: FakeFirestore, scaled_before: bool
) -> None:
    """Helm and CI write `replicas` once, and own the field until somebody changes it."""
    world.name, world.now = "created", None
    world.cluster.add_deployment("created", replicas=2, manager="helm")
    queue.fill(2)
    if scaled_before:
        later = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
        world.cluster.annotate("created", **{"queue-scaler/last-scale-time": later})
    assert warnings(world.run()) == []


def test_whoever_writes_other_fields_is_no_master(world: World) -> None:
    paused = {"paused": True}
    world.cluster.edit("deployments", "worker", lambda d: d["spec"].update(paused), manager="other")
    assert warnings(world.run()) == []


def test_the_other_one_is_named_even_where_the_queue_cannot_be_read(
    world: World, queue: FakeFirestore
) -> None:
    queue.fault("count", Fail(StatusCode.UNKNOWN))
    set_replicas(world, 2, HPA)
    run = world.run()
    assert run.exit_code == 1 and len(warnings(run)) == 1, run


def test_the_other_one_comes_in_between_reading_and_patching(
    world: World, queue: FakeFirestore
) -> None:
    """Its write is a conflict, and the decision is made again on what it left."""
    queue.fill(5)
    world.cluster.hook(Match("patch", "deployments"), lambda _: set_replicas(world, 2, HPA))
    run = world.run()
    assert (run.exit_code, run.reason, run.record["current"]) == (0, "ScaledUp", 2), run
    assert world.replicas == 3 and len(warnings(run)) == 1
    assert warnings(world.run()) == [], "after the scaler's own scale"


@pytest.mark.parametrize("odd", [[], [{"manager": "old", "operation": "Update"}], None], ids=str)
def test_a_deployment_whose_fields_nobody_manages_is_fine(world: World, odd: object) -> None:
    stored = world.cluster.store.objects[("deployments", "default", "worker")]
    stored["metadata"]["managedFields"] = odd
    run = world.run()
    assert run.exit_code == 0 and warnings(run) == [], run
