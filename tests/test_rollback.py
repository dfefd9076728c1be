"""`kubectl rollout undo` puts back the annotations of an older revision: they are not orders."""

from __future__ import annotations

import re

import pytest

from scaler import ANNOTATION
from tests.support.firestore import FakeFirestore
from tests.support.world import World


def undo(world: World, **annotations: str) -> None:
    """What `kubectl rollout undo` does: a patch of the whole object by plain `kubectl`."""
    ours = {ANNOTATION + name.replace("_", "-"): value for name, value in annotations.items()}
    world.cluster.edit(
        "deployments",
        "worker",
        lambda d: d["metadata"].setdefault("annotations", {}).update(ours),
        manager="kubectl",
    )


def test_an_order_that_came_back_is_not_carried_out(world: World) -> None:
    world.cluster.scale("worker", 3)
    undo(world, paused_replicas="0")
    for _ in range(2):
        run = world.run()
        assert (run.exit_code, run.reason, world.replicas) == (0, "Paused", 3), run
        assert "paused-replicas='0': came back with a kubectl rollout undo" in run.stdout, run
        world.pass_time()
    world.cluster.annotate("worker", **{ANNOTATION + "paused-replicas": "2"})
    run = world.run()
    assert world.replicas == 2 and "came back" not in run.stdout, "set again, it counts"


@pytest.mark.parametrize("name", ["paused", "paused_scale_in"])
def test_a_pause_that_came_back_stays_a_pause(name: str, world: World) -> None:
    world.cluster.scale("worker", 3)
    undo(world, **{name: "true"})
    run = world.run(SCALE_DOWN_STABILIZATION_SECONDS="0")
    assert run.reason in ("Paused", "ScaleDownDisabled") and world.replicas == 3, run
    assert "came back" in run.stdout, run


def test_an_end_that_came_back_ends_nothing(world: World, queue: FakeFirestore) -> None:
    queue.fill(3)
    world.cluster.annotate("worker", **{ANNOTATION + "paused": "true"})
    undo(world, paused_until="2025-12-31T00:00:00Z")
    run = world.run()
    assert (run.reason, world.replicas) == ("Paused", 1), run
    assert "paused-until='2025-12-31T00:00:00Z': came back" in run.stdout, run


def test_a_history_that_came_back_starts_afresh(world: World) -> None:
    world.cluster.scale("worker", 3)
    undo(world, recommendations="1767225480:1 1767225540:1")
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
OWNERS: dict[str, tuple[list[dict[str, object]], set[str]]] = {
    "the rollback alone": ([UNDONE], {"paused-scale-in", "paused-scale-out"}),
    "a person's annotate, too": ([UNDONE, ANNOTATED], {"paused-scale-out"}),
    "an Apply, too": ([UNDONE, APPLIED], {"paused-scale-out"}),
    "an Apply of kubectl": ([owner("kubectl", "paused-scale-in", operation="Apply")], set()),
    "a subresource": ([owner("kubectl", "paused-scale-in", subresource="scale")], set()),
    "nobody's fields": ([{"manager": "old"}], set()),
}


@pytest.mark.parametrize(("owners", "came_back"), OWNERS.values(), ids=OWNERS)
def test_whoever_owns_an_annotation_beside_the_rollback_has_set_it(
    owners: list[dict[str, object]], came_back: set[str], world: World
) -> None:
    both = {ANNOTATION + name: "true" for name in ("paused-scale-in", "paused-scale-out")}
    world.cluster.annotate("worker", **both)
    stored = world.cluster.store.objects[("deployments", "default", "worker")]
    stored["metadata"]["managedFields"] = owners
    run = world.run()
    said = set(re.findall(r"queue-scaler/(\S+)='true':? came back", run.stdout))
    assert run.exit_code == 0 and said == came_back, run
