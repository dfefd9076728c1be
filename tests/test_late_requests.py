"""A rescale whose client has given up, but that still reaches the API server."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterable

import pytest

import scaler
from scaler import LEASE
from tests.support.firestore import On
from tests.support.kubernetes import Match, Request, hang, scales
from tests.support.kubernetes_objects import DELETION_COST
from tests.support.world import BUSY, World

EAGER = {
    "BUSY_FILTER": BUSY,
    "MAX_REPLICAS": "10",
    "SCALE_DOWN_COOLDOWN_SECONDS": "0",
    "SCALE_DOWN_STABILIZATION_SECONDS": "0",
}
PATCH = Match("patch", "deployments")


def ends(request: Request) -> bool:
    """The patch of a decision, whatever it changes."""
    return PATCH(request) and (
        scales(request) or request.body["metadata"]["annotations"].get(LEASE, "") is None
    )


@pytest.fixture
def world(world: World) -> World:
    world.settings = dict(EAGER)
    world.cluster.scale("worker", 5)
    return world


def live(world: World) -> list[str]:
    return [
        str(pod["metadata"]["name"])
        for pod in world.cluster.pods(world.name)
        if "deletionTimestamp" not in pod["metadata"]
    ]


def hold(world: World, pods: Iterable[str]) -> None:
    for pod in pods:
        world.queue.put(f"jobs/of-{pod}", {"status": "processing", "assignedPodId": pod})


def deliver(world: World, request: Request) -> int:
    """A request whose client has given up, and that arrives all the same."""
    url = f"{world.cluster.url}/apis/apps/v1/namespaces/default/deployments/worker"
    late = urllib.request.Request(
        f"{url}?fieldManager=queue-scaler",
        json.dumps(request.body).encode(),
        {
            "Authorization": f"Bearer {world.cluster.admin_token}",
            "Content-Type": "application/merge-patch+json",
        },
        method="PATCH",
    )
    try:
        return int(urllib.request.urlopen(late).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_patch_that_there_was_no_time_for_is_known_not_to_have_arrived(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = scaler.Look.apply

    def apply_late(look: scaler.Look, decision: scaler.Decision) -> scaler.Decision:
        look.progress.deadline = scaler.Deadline(0, 1, time.monotonic() + 60)
        return apply(look, decision)

    monkeypatch.setattr(scaler.Look, "apply", apply_late)
    world.queue.fill(8)
    run = world.run()
    assert (run.exit_code, run.reason, run.record["replicas"]) == (1, "ClusterUnavailable", 5), run
    assert "no time was left for patching the Deployment; stays at 5 pods" in run.stdout
    assert world.cluster.calls(PATCH) == []


@pytest.mark.parametrize(("claimed_at", "lowest"), [(3, False), (4, False), (3, True)])
def test_a_late_patch_meets_the_version_of_the_next_attempt(
    world: World, claimed_at: int, lowest: bool
) -> None:
    """The first scale hangs on its way until the client gives up; a victim claims a job; the second
    attempt takes its mark away; then the first scale arrives. `lowest`: somebody has set the lowest
    deletion cost that there is, so that no lease's can be lower."""
    held = live(world)[:3]
    hold(world, held)
    if lowest:
        cost = {DELETION_COST: str(-(2**31))}
        world.cluster.edit(
            "pods",
            live(world)[-1],
            lambda pod: pod["metadata"].setdefault("annotations", {}).update(cost),
            "somebody",
        )
    world.cluster.fault(scales, hang())
    answers: list[int] = []

    def arrive(_: Request) -> None:
        answers.append(deliver(world, world.cluster.calls(scales)[0]))

    def hung(_: Request) -> None:
        victim = world.cluster.calls(Match("patch", "pods"))[0].name
        world.queue.hook(On("query", nth=claimed_at - 2), lambda _: hold(world, [victim]))
        world.cluster.hook(ends, arrive)

    world.cluster.hook(scales, hung, "after")
    run = world.run(TIMEOUT_SECONDS="10")
    assert not set(held) & set(world.cluster.deleted_pods), (answers, run)
    assert answers == [409], run
