"""Concurrent runs, scheduled or manual, rescale once."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

from tests.support.firestore import Fail
from tests.support.kubernetes import Match, Request
from tests.support.world import BUSY, Run, World

PROCESSES = 5
READ, PATCH = Match("get", "deployments"), Match("patch", "deployments")


@pytest.fixture
def world(world: World) -> World:
    world.process = True
    return world


def run_together(world: World, **settings: str) -> list[Run]:
    """So many runs, of which none goes on before each has read the Deployment: whoever wants to
    write, writes on what all of them have seen."""
    meeting = threading.Barrier(PROCESSES, timeout=60)
    world.cluster.hook(READ, lambda _: meeting.wait(), "after", times=PROCESSES)
    logs = [world.directory / f"termination-log-{number}" for number in range(PROCESSES)]
    environ = world.environment(**settings)
    processes = [world.start(log=log, environ=environ) for log in logs]
    runs = []
    for process, log in zip(processes, logs, strict=True):
        stdout, stderr = process.communicate(timeout=120)
        runs.append(Run(process.returncode, stdout, stderr, json.loads(log.read_text()), 0))
    return runs


ONE_STEP = {"SCALE_UP_STEP": "1", "MAX_REPLICAS": "9"}
SCALES: dict[str, tuple[int, int, int, dict[str, str]]] = {
    "up": (1, 3, 3, {}),
    "down": (3, 0, 1, {}),
    "down past a busy pod": (3, 0, 1, {"BUSY_FILTER": BUSY}),
    "by one step, as the cooldown holds all but the first back": (1, 9, 2, ONE_STEP),
}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "jobs", "after", "settings"), SCALES.values(), ids=SCALES)
def test_concurrent_runs_scale_once(
    world: World, before: int, jobs: int, after: int, settings: dict[str, str]
) -> None:
    world.cluster.scale("worker", before)
    busy = str(world.cluster.pods("worker")[0]["metadata"]["name"])
    world.queue.put("jobs/busy", {"status": "processing", "assignedPodId": busy})
    world.queue.fill(jobs)
    world.cluster.scales.clear()
    runs = run_together(world, SCALE_DOWN_STABILIZATION_SECONDS="0", **settings)
    assert [run.exit_code for run in runs] == [0] * PROCESSES, "\n".join(map(str, runs))
    assert [(scale.before, scale.after) for scale in world.cluster.scales] == [(before, after)]
    reasons = Counter(run.reason for run in runs)
    assert reasons["ScaledUp" if after > before else "ScaledDown"] == 1, reasons
    assert Counter(run.record["action"] for run in runs)["none"] == PROCESSES - 1
    # One that looks while another removes pods holds.
    held = [run.record["replicas"] for run in runs if run.reason == "WorkersBusy"]
    assert held == [before] * len(held) and ("BUSY_FILTER" in settings or not held), reasons
    others = {run.record["replicas"] for run in runs if run.reason != "WorkersBusy"}
    assert others == {after}, reasons
    assert len(world.cluster.events()) == 1 and world.replicas == after
    refused = [call for call in world.cluster.calls(PATCH) if call.status == 409]
    assert len(refused) == PROCESSES - 1, "all others met the winner's version"
    assert "BUSY_FILTER" not in settings or busy not in world.cluster.deleted_pods


@pytest.mark.slow
def test_concurrent_runs_store_a_failing_queue_once(world: World) -> None:
    world.queue.fault("count", Fail(StatusCode.UNKNOWN))
    for reason, replicas in (("QueueUnavailable", 1), ("Fallback", 2)):
        runs = run_together(world, FALLBACK_REPLICAS="2", FALLBACK_AFTER_SECONDS="60")
        assert {(run.exit_code, run.reason) for run in runs} == {(1, reason)}
        assert {run.record["replicas"] for run in runs} == {replicas}
        world.pass_time(300)
    assert len(world.cluster.scales) == len(world.cluster.events()) == 1
    applied = [call for call in world.cluster.calls(PATCH) if call.status == 200]
    assert len(applied) == 2, "one for the time, one for the scale"


def test_after_every_conflict_the_decision_is_made_again(world: World) -> None:
    """The controllers' status writes, which come between the read and the patch."""
    world.queue.fill(5)
    numbers = itertools.count()

    def write(_: Request) -> None:
        world.cluster.annotate("worker", note=str(next(numbers)))

    world.process = False
    world.cluster.hook(PATCH, write, times=2)
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas) == (0, "ScaledUp", 3), run
    assert [call.status for call in world.cluster.calls(PATCH)] == [409, 409, 200]
    assert len(world.cluster.calls(READ)) == 3
