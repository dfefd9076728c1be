"""Many runs at the same time, as the schedule's and people's manual ones can be: one scale."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

from tests.support.firestore import Fail, FakeFirestore
from tests.support.kubernetes import FakeKubernetes, Match, Request
from tests.support.world import BUSY, START, Run, World

PROCESSES = 5
READ, PATCH = Match("get", "deployments"), Match("patch", "deployments")


@pytest.fixture
def world(cluster: FakeKubernetes, queue: FakeFirestore, tmp_path: Path) -> World:
    return World(cluster, queue.host, now=START, directory=tmp_path, process=True)


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


def check(world: World, runs: list[Run], before: int, after: int) -> None:
    """Nobody failed, one of them scaled, and every record says what its own run did."""
    assert [run.exit_code for run in runs] == [0] * PROCESSES, "\n".join(map(str, runs))
    new = world.cluster.scales[-1:]
    assert [(scale.before, scale.after) for scale in new] == [(before, after)]
    reasons = Counter(run.reason for run in runs)
    assert reasons["ScaledUp" if after > before else "ScaledDown"] == 1, reasons
    assert Counter(run.record["action"] for run in runs)["none"] == PROCESSES - 1
    assert {run.record["replicas"] for run in runs} == {after}, reasons
    assert world.replicas == after


@pytest.mark.slow
def test_runs_at_once_scale_once_each_time_the_queue_changes(
    world: World, queue: FakeFirestore
) -> None:
    size = 1
    for turn, jobs in enumerate((3, 0), start=1):
        queue.clear()
        queue.fill(jobs)
        runs = run_together(world, SCALE_DOWN_STABILIZATION_SECONDS="0")
        check(world, runs, size, size := max(1, jobs))
        assert len(world.cluster.scales) == len(world.cluster.events()) == turn
        refused = [call for call in world.cluster.calls(PATCH) if call.status == 409]
        assert len(refused) == turn * (PROCESSES - 1), "all others met the winner's version"
        world.pass_time(300)


@pytest.mark.slow
def test_runs_at_once_take_one_step_where_a_scale_is_one_step(
    world: World, queue: FakeFirestore
) -> None:
    """Each of them alone would add one pod more: the cooldown holds all but the first back."""
    queue.fill(9)
    runs = run_together(world, SCALE_UP_STEP="1", MAX_REPLICAS="9")
    check(world, runs, 1, 2)


@pytest.mark.slow
def test_runs_at_once_spare_the_busy_pods(world: World, queue: FakeFirestore) -> None:
    world.cluster.scale("worker", 3)
    busy = str(world.cluster.pods("worker")[0]["metadata"]["name"])
    queue.put("jobs/busy", {"status": "processing", "assignedPodId": busy})
    runs = run_together(world, BUSY_FILTER=BUSY, SCALE_DOWN_STABILIZATION_SECONDS="0")
    check(world, runs, 3, 1)
    assert busy not in world.cluster.deleted_pods


@pytest.mark.slow
def test_runs_at_once_write_a_failing_queue_down_once(world: World, queue: FakeFirestore) -> None:
    queue.fault("count", Fail(StatusCode.UNKNOWN))
    for reason, replicas in (("QueueUnavailable", 1), ("Fallback", 2)):
        runs = run_together(world, FALLBACK_REPLICAS="2", FALLBACK_AFTER_SECONDS="60")
        assert {(run.exit_code, run.reason) for run in runs} == {(1, reason)}
        assert {run.record["replicas"] for run in runs} == {replicas}
        world.pass_time(300)
    assert len(world.cluster.scales) == len(world.cluster.events()) == 1
    applied = [call for call in world.cluster.calls(PATCH) if call.status == 200]
    assert len(applied) == 2, "one for the time, one for the scale"


def test_every_writer_in_between_is_a_conflict_and_the_decision_is_made_afresh(
    world: World, queue: FakeFirestore
) -> None:
    """The controllers' status writes, which come between the read and the patch."""
    queue.fill(5)
    numbers = itertools.count()

    def write(_: Request) -> None:
        world.cluster.annotate("worker", note=str(next(numbers)))

    world.process = False
    world.cluster.hook(PATCH, write, times=2)
    run = world.run()
    assert (run.exit_code, run.reason, world.replicas) == (0, "ScaledUp", 3), run
    assert [call.status for call in world.cluster.calls(PATCH)] == [409, 409, 200]
    assert len(world.cluster.calls(READ)) == 3
