"""Several looks in one run, with POLLING_INTERVAL_SECONDS."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections.abc import Callable

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

from scaler import ANNOTATION
from tests.support.firestore import Fail, Hang
from tests.support.kubernetes import Match
from tests.support.world import Run, World

READ = Match("get", "deployments")


@pytest.fixture
def polling(world: World) -> World:
    """A look a second, three of them."""
    world.settings = {"POLLING_INTERVAL_SECONDS": "1", "TIMEOUT_SECONDS": "3"}
    return world


def lines(run: Run) -> list[str]:
    return [line.split(":", 3)[2].rsplit(" ", 1)[1] for line in run.stdout.splitlines()]


def before_look(world: World, number: int, act: Callable[[], object]) -> None:
    """Do something just before a look, counted from 1, reads the Deployment."""
    looks = itertools.count(1)
    world.cluster.hook(READ, lambda _: next(looks) == number and act(), times=None)


def test_looks_are_due_at_fixed_times_and_a_quiet_run_has_one_line(polling: World) -> None:
    due: list[float] = []
    polling.cluster.hook(READ, lambda _: due.append(time.monotonic()), times=None)
    run = polling.run()
    assert (run.exit_code, run.record["looks"], len(due)) == (0, 3, 3), run
    gaps = [later - due[0] for later in due]
    assert all(abs(gap - round(gap)) < 0.4 for gap in gaps), gaps
    assert lines(run) == ["AtTarget"], run
    assert len(polling.cluster.requests) == 3, "at rest, one call a look"


def test_without_an_interval_a_run_is_one_look(world: World) -> None:
    run = world.run()
    assert "looks" not in run.record and len(world.cluster.requests) == 1


def test_a_scale_is_told_and_is_what_the_record_says(polling: World) -> None:
    before_look(polling, 2, lambda: polling.queue.fill(2))
    run = polling.run()
    assert lines(run) == ["AtTarget", "ScaledUp", "AtTarget"], run
    assert (run.record["reason"], run.record["looks"]) == ("ScaledUp", 3), run
    assert (run.record["current"], run.record["replicas"], polling.replicas) == (1, 2, 2)


def test_a_failure_and_a_recovery_are_told(polling: World) -> None:
    before_look(polling, 2, lambda: polling.queue.fault("count", Fail(StatusCode.UNKNOWN)))
    before_look(polling, 3, polling.queue.heal)
    run = polling.run()
    assert lines(run) == ["AtTarget", "QueueUnavailable", "AtTarget"], run
    assert (run.exit_code, run.record["reason"]) == (0, "AtTarget"), run
    polling.queue.fill(3)
    before_look(polling, 3, lambda: polling.queue.fault("count", Fail(StatusCode.UNKNOWN)))
    run = polling.run()
    assert (run.exit_code, run.record["reason"]) == (1, "QueueUnavailable"), "the last one failed"
    assert polling.replicas == 3


def test_a_persons_annotation_counts_at_the_next_look(polling: World) -> None:
    order = {ANNOTATION + "paused-replicas": "7"}
    before_look(polling, 2, lambda: polling.cluster.annotate("worker", **order))
    run = polling.run()
    assert lines(run) == ["AtTarget", "Paused", "Paused"], "ordered, and then held"
    assert polling.replicas == 7


def test_nothing_is_kept_between_looks_but_the_annotations(polling: World) -> None:
    """A stamp that the first look wrote and a person removed does not come back."""
    polling.queue.fill(2)
    removed = {ANNOTATION + "last-scale-time": None}
    before_look(polling, 2, lambda: polling.cluster.annotate("worker", **removed))
    before_look(polling, 2, lambda: polling.queue.fill(3))
    run = polling.run()
    assert lines(run)[:2] == ["ScaledUp", "ScaledUp"] and polling.replicas == 3, run


@pytest.mark.slow
def test_a_queue_that_hangs_costs_one_look(polling: World) -> None:
    polling.settings["TIMEOUT_SECONDS"] = "12"
    before_look(polling, 1, lambda: polling.queue.fault("count", Hang()))
    before_look(polling, 2, polling.queue.heal)
    polling.queue.fill(2)
    run = polling.run()
    assert lines(run)[:2] == ["QueueUnavailable", "ScaledUp"], run
    assert 3 <= run.record["looks"] <= 8, "the looks that were late are left out"


@pytest.mark.slow
def test_two_polling_runs_at_once_scale_once(polling: World) -> None:
    polling.queue.fill(3)
    logs = [polling.directory / f"log-{number}" for number in range(2)]
    runs = [polling.start(log=log) for log in logs]
    for log, run in zip(logs, runs, strict=True):
        run.communicate(timeout=30)
        assert run.returncode == 0 and json.loads(log.read_text())["looks"] >= 2
    assert [scale.after for scale in polling.cluster.scales] == [3]


@pytest.mark.slow
def test_sigterm_between_looks_ends_the_run_within_a_second_with_its_record(polling: World) -> None:
    polling.queue.fill(3)
    polling.settings = {"POLLING_INTERVAL_SECONDS": "20", "TIMEOUT_SECONDS": "60"}
    log, patched = polling.directory / "log", threading.Event()
    polling.cluster.hook(Match("create", "events"), lambda _: patched.set(), when="after")
    run = polling.start(log=log)
    assert patched.wait(30)
    time.sleep(0.5)
    begun = time.monotonic()
    run.send_signal(signal.SIGTERM)
    stdout, _ = run.communicate(timeout=10)
    assert time.monotonic() - begun < 1 and run.returncode == 128 + signal.SIGTERM
    record = json.loads(log.read_text())
    assert (record["reason"], record["replicas"], record["looks"]) == ("ScaledUp", 3, 1)
    assert record["message"].endswith("; ended by SIGTERM") and stdout.count("AutoScaler") == 1
