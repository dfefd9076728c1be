"""`kubectl rollout undo` puts back the annotations of an older revision: they are not orders."""

from __future__ import annotations

import pytest

from scaler import ANNOTATION, rolled_back
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


def test_an_order_that_came_back_is_not_carried_out(world: World, queue: FakeFirestore) -> None:
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
def test_a_pause_that_came_back_stays_a_pause(
    name: str, world: World, queue: FakeFirestore
) -> None:
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


def test_a_history_that_came_back_starts_afresh(world: World, queue: FakeFirestore) -> None:
    world.cluster.scale("worker", 3)
    undo(world, recommendations="1767225480:1 1767225540:1")
    run = world.run()
    assert run.reason == "ScaleDownStabilized" and "300 s more" in run.record["message"], run
    assert "recommendations" in run.stdout
    assert "came back" not in world.run().stdout, "it is the scaler's own again"


def test_whoever_owns_an_annotation_beside_the_rollback_has_set_it() -> None:
    def entry(manager: str, *names: str, **more: str) -> dict[str, object]:
        owned: dict[str, object] = {f"f:{name}": {} for name in names}
        fields = {"f:metadata": {"f:annotations": {".": {}, **owned}}}
        return {"manager": manager, "operation": "Update", "fieldsV1": fields, **more}

    paused, number = ANNOTATION + "paused", ANNOTATION + "paused-replicas"
    undone = entry("kubectl", paused, number, "team", ANNOTATION + "last-scale-time")
    assert rolled_back([undone]) == {paused, number}
    assert rolled_back([undone, entry("ci", number, operation="Apply")]) == {paused}
    assert rolled_back([undone, entry("kubectl-annotate", paused)]) == {number}
    assert rolled_back([entry("kubectl", paused, subresource="scale")]) == set()
    assert rolled_back([entry("kubectl", paused, operation="Apply")]) == set()
    assert rolled_back([{"manager": "old"}]) == set()
