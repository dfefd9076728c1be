"""Many runs at the same time, as the schedule's and people's manual ones can be: one scale."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

from tests.support.firestore import Fail, FakeFirestore
from tests.support.kubernetes import FakeKubernetes, Match
from tests.support.world import BUSY, START, Run, World

pytestmark = pytest.mark.slow

PROCESSES = 20
PATCH = Match("patch", "deployments")


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    """Its controllers write the Deployment's status while the scalers are at work."""
    with FakeKubernetes(seed=1, controllers="in background", step_seconds=0.005) as cluster:
        cluster.add_deployment("worker", replicas=1)
        yield cluster


@pytest.fixture
def world(cluster: FakeKubernetes, queue: FakeFirestore, tmp_path: Path) -> World:
    return World(cluster, queue.host, now=START, directory=tmp_path, process=True)


def run_together(world: World, **settings: str) -> list[Run]:
    """That many runs, started at once and all brought to their end."""
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
    done = "ScaledUp" if after > before else "ScaledDown"
    assert reasons[done] == 1, reasons
    assert Counter(run.record["action"] for run in runs)["none"] == PROCESSES - 1
    assert {run.record["replicas"] for run in runs} == {after}, reasons
    assert world.replicas == after


def test_twenty_runs_at_once_scale_once_each_time_the_queue_changes(
    world: World, queue: FakeFirestore
) -> None:
    settings = {
        "MAX_REPLICAS": "5",
        "SCALE_UP_COOLDOWN_SECONDS": "60",
        "SCALE_DOWN_COOLDOWN_SECONDS": "60",
        "SCALE_DOWN_STABILIZATION_SECONDS": "0",
    }
    sizes = [1]
    for jobs in (3, 5, 2, 0):
        queue.clear()
        queue.fill(jobs)
        runs = run_together(world, **settings)
        sizes.append(max(1, jobs))
        check(world, runs, sizes[-2], sizes[-1])
        assert len(world.cluster.scales) == len(world.cluster.events()) == len(sizes) - 1
        world.pass_time(300)
    refused = [call for call in world.cluster.calls(PATCH) if call.status == 409]
    assert refused, "the conflicts that this test is about did not come about"


def test_twenty_runs_at_once_take_one_step_where_a_scale_is_one_step(
    world: World, queue: FakeFirestore
) -> None:
    """Each of them alone would add one pod more: the cooldown holds all but the first back."""
    queue.fill(9)
    for size in (1, 2):
        runs = run_together(world, SCALE_UP_STEP="1", MAX_REPLICAS="9")
        check(world, runs, size, size + 1)
        world.pass_time(300)


def test_twenty_runs_at_once_spare_the_busy_pods(world: World, queue: FakeFirestore) -> None:
    settings = {"BUSY_FILTER": BUSY, "SCALE_DOWN_STABILIZATION_SECONDS": "0"}
    world.cluster.scale("worker", 3)
    while len(world.cluster.pods("worker")) < 3:
        pass
    before = len(world.cluster.scales)
    busy = [pod["metadata"]["name"] for pod in world.cluster.pods("worker")][:1]
    queue.put("jobs/busy", {"status": "processing", "assignedPodId": busy[0]})
    runs = run_together(world, **settings)
    check(world, runs, 3, 1)
    assert len(world.cluster.scales) == before + 1
    world.cluster.settle()
    assert not set(busy) & set(world.cluster.deleted_pods)


def test_twenty_runs_at_once_change_nothing_where_nothing_is_to_be_done(
    world: World, queue: FakeFirestore
) -> None:
    queue.fill(1)
    runs = run_together(world)
    assert {(run.exit_code, run.reason) for run in runs} == {(0, "AtTarget")}
    assert world.cluster.calls(PATCH) == []


def test_twenty_runs_at_once_write_a_failing_queue_down_once(
    world: World, queue: FakeFirestore
) -> None:
    queue.fault("count", Fail(StatusCode.UNKNOWN))
    settings = {"FALLBACK_REPLICAS": "2", "FALLBACK_AFTER_SECONDS": "60"}
    for reason, replicas in (("QueueUnavailable", 1), ("Fallback", 2)):
        runs = run_together(world, **settings)
        assert {(run.exit_code, run.reason) for run in runs} == {(1, reason)}
        assert {run.record["replicas"] for run in runs} == {replicas}
        world.pass_time(300)
    assert len(world.cluster.scales) == len(world.cluster.events()) == 1
    applied = [call for call in world.cluster.calls(PATCH) if call.status == 200]
    assert len(applied) == 2, "one for the time, one for the scale"


def test_a_manual_run_between_two_scheduled_ones_finds_nothing_to_do(
    world: World, queue: FakeFirestore
) -> None:
    queue.fill(5)
    reasons = [world.run().reason for _ in range(3)]
    assert reasons == ["ScaledUp", "AtTarget", "AtTarget"]
    assert len(world.cluster.scales) == 1
