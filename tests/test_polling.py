"""Several looks in one run: polling, and the one more that waits for a delay to end."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from grpc import StatusCode  # type: ignore[import-untyped]

from scaler import ANNOTATION, Decision, essence, read_time, write_time
from tests.support.firestore import Fail, Hang
from tests.support.kubernetes import Match
from tests.support.world import START, Run, World

READ, PATCH = Match("get", "deployments"), Match("patch", "deployments")


@pytest.fixture
def polling(world: World) -> World:
    """A look per second on the real clock, three of them."""
    world.now = None
    world.settings = {"POLLING_INTERVAL_SECONDS": "1", "TIMEOUT_SECONDS": "3"}
    world.queue.put("jobs/done", {"status": "done"})  # or a line would say that no job has `status`
    return world


def reasons(run: Run) -> list[str]:
    """Of the lines with a decision."""
    return re.findall(r"^\S+ [A-Z]+ AutoScaler \S+ ([A-Z]\w+): ", run.stdout, re.MULTILINE)


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
    assert reasons(run) == ["AtTarget"], run
    assert len(polling.cluster.requests) == 3, "at rest, one call per look"


def test_without_an_interval_a_run_is_one_look(world: World) -> None:
    run = world.run()
    assert "looks" not in run.record and len(world.cluster.requests) == 1


def test_the_record_and_a_line_report_a_rescale(polling: World) -> None:
    before_look(polling, 2, lambda: polling.queue.fill(2))
    run = polling.run()
    assert reasons(run) == ["AtTarget", "ScaledUp", "AtTarget"], run
    assert (run.record["reason"], run.record["looks"]) == ("ScaledUp", 3), run
    assert (run.record["current"], run.record["replicas"], polling.replicas) == (1, 2, 2)


def test_a_failure_and_a_recovery_have_a_line_each(polling: World) -> None:
    before_look(polling, 2, lambda: polling.queue.fault("count", Fail(StatusCode.UNKNOWN)))
    before_look(polling, 3, polling.queue.heal)
    run = polling.run()
    assert reasons(run) == ["AtTarget", "QueueUnavailable", "AtTarget"], run
    assert (run.exit_code, run.record["reason"]) == (0, "AtTarget"), run
    polling.queue.fill(3)
    before_look(polling, 3, lambda: polling.queue.fault("count", Fail(StatusCode.UNKNOWN)))
    run = polling.run()
    assert (run.exit_code, run.record["reason"]) == (1, "QueueUnavailable"), "the last one failed"
    assert polling.replicas == 3


@pytest.mark.parametrize(
    ("message", "is_news"), [("503 down for 7 s", False), ("401 the token has expired", True)]
)
def test_a_failure_is_logged_again_if_its_cause_changes(message: str, is_news: bool) -> None:
    """Not if only a number in it does."""
    before = Decision(1, "QueueUnavailable", "503 down for 5 s", 1, exit_code=1)
    assert (essence(before) != essence(replace(before, message=message))) is is_news


def test_an_annotation_is_applied_at_the_next_look(polling: World) -> None:
    seven = {ANNOTATION + "paused-replicas": "7"}
    before_look(polling, 2, lambda: polling.cluster.annotate("worker", **seven))
    run = polling.run()
    assert reasons(run) == ["AtTarget", "Paused", "Paused"], "set, and then held"
    assert polling.replicas == 7


def test_nothing_is_kept_between_looks_but_the_annotations(polling: World) -> None:
    """A timestamp that the first look wrote and a user removed does not come back."""
    polling.queue.fill(2)
    removed = {ANNOTATION + "last-scale-time": None}
    before_look(polling, 2, lambda: polling.cluster.annotate("worker", **removed))
    before_look(polling, 2, lambda: polling.queue.fill(3))
    run = polling.run()
    assert reasons(run)[:2] == ["ScaledUp", "ScaledUp"] and polling.replicas == 3, run


@pytest.mark.slow
def test_a_queue_that_hangs_costs_one_look(polling: World) -> None:
    polling.settings["TIMEOUT_SECONDS"] = "12"
    before_look(polling, 1, lambda: polling.queue.fault("count", Hang()))
    before_look(polling, 2, polling.queue.heal)
    polling.queue.fill(2)
    run = polling.run()
    assert reasons(run)[:2] == ["QueueUnavailable", "ScaledUp"], run
    assert 3 <= run.record["looks"] <= 8, "the looks that were late are left out"


@pytest.mark.slow
def test_two_concurrent_polling_runs_scale_once(polling: World) -> None:
    polling.queue.fill(3)
    polling.settings = {"POLLING_INTERVAL_SECONDS": "3", "TIMEOUT_SECONDS": "8"}
    logs = [polling.directory / f"log-{number}" for number in range(2)]
    runs = [polling.start(log=log) for log in logs]
    for log, run in zip(logs, runs, strict=True):
        stdout, _ = run.communicate(timeout=30)
        assert run.returncode == 0 and json.loads(log.read_text())["looks"] >= 2, stdout
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


# ------------------------------------------------------------------------------------- delays

UP = {"SCALE_UP_COOLDOWN_SECONDS": "120"}
DOWN = {"SCALE_DOWN_COOLDOWN_SECONDS": "120", "SCALE_DOWN_STABILIZATION_SECONDS": "0"}
WINDOW_UP = {"SCALE_UP_STABILIZATION_SECONDS": "120"}
WINDOW_DOWN = {"SCALE_DOWN_STABILIZATION_SECONDS": "120", "SCALE_DOWN_COOLDOWN_SECONDS": "0"}
FALLBACK = {"FALLBACK_REPLICAS": "3", "FALLBACK_AFTER_SECONDS": "120"}


def scaled_up(ago: datetime) -> dict[str, str]:
    return {"last-scale-time": write_time(ago), "last-scale": "up 1->2"}


def recommended(replicas: int) -> Callable[[datetime], dict[str, str]]:
    return lambda ago: {"recommendations": f"{int(ago.timestamp())}:{replicas}"}


def failing(ago: datetime) -> dict[str, str]:
    return {"queue-failing-since": write_time(ago)}


# Settings with a delay of 120 s, what it counts from, jobs waiting (None: the queue fails), how
# the look that it holds back ends, and the replicas after it, from 2.
DELAYS = {
    "a cooldown of scale-ups": (UP, scaled_up, 3, "ScaleUpCooldown", 3),
    "a cooldown of scale-downs": (DOWN, scaled_up, 0, "ScaleDownCooldown", 1),
    "a scale-up window": (WINDOW_UP, recommended(2), 3, "ScaleUpStabilized", 3),
    "a scale-down window": (WINDOW_DOWN, recommended(2), 0, "ScaleDownStabilized", 1),
    "the fallback's delay": (FALLBACK, failing, None, "QueueUnavailable", 3),
}


@pytest.mark.parametrize("left", [0.3, 4, 14.9, 15.5, 40])
@pytest.mark.parametrize(
    ("settings", "since", "jobs", "held", "after"), DELAYS.values(), ids=DELAYS
)
def test_a_delay_that_ends_within_15_s_is_waited_for(
    world: World,
    left: float,
    settings: dict[str, str],
    since: Callable[[datetime], dict[str, str]],
    jobs: int | None,
    held: str,
    after: int,
) -> None:
    delay_ends = START + timedelta(seconds=120)
    patched = world_with_delay(world, since(START), jobs)
    world.now = delay_ends - timedelta(seconds=left)
    run = world.run(**settings)
    assert reasons(run)[0] == held, run
    if left > 15:
        assert len(reasons(run)) == 1 and "looks" not in run.record and world.replicas == 2, run
        assert run.seconds < 5 and world.now == delay_ends - timedelta(seconds=left)
    else:
        assert len(reasons(run)) == 2 and run.record["looks"] == 2, run
        assert (run.record["replicas"], world.replicas) == (after, after), run
        assert delay_ends <= patched[-1] < delay_ends + timedelta(seconds=0.1), "not before its end"


def world_with_delay(world: World, annotations: dict[str, str], jobs: int | None) -> list[datetime]:
    """Two pods and a delay; returns the list of the times at which the Deployment is patched."""
    world.cluster.scale("worker", 2)
    own = {ANNOTATION + name: value for name, value in annotations.items()}
    world.cluster.annotate("worker", **own)
    world.queue.fill(jobs or 0)
    if jobs is None:
        world.queue.fault("count", Fail(StatusCode.UNKNOWN))
    patched: list[datetime] = []
    world.cluster.hook(PATCH, lambda _: patched.append(world.now or START), times=None)
    return patched


def test_a_delay_beyond_the_budget_is_not_waited_for(world: World) -> None:
    world_with_delay(world, scaled_up(START - timedelta(seconds=110)), 3)
    run = world.run(TIMEOUT_SECONDS="10", **UP)
    assert reasons(run) == ["ScaleUpCooldown"] and run.seconds < 5, run


def test_only_one_delay_is_waited_for(world: World) -> None:
    """The window ends first; the cooldown, four seconds later, is left to the next run."""
    scaled = scaled_up(START - timedelta(seconds=112))
    world_with_delay(world, scaled | recommended(2)(START - timedelta(seconds=116)), 0)
    run = world.run(**DOWN | {"SCALE_DOWN_STABILIZATION_SECONDS": "120"})
    assert reasons(run) == ["ScaleDownStabilized", "ScaleDownCooldown"], run
    assert (run.exit_code, run.record["looks"], world.replicas) == (0, 2, 2), run


def test_a_delay_that_ends_during_the_look_needs_no_further_run(world: World) -> None:
    """The queue hangs until after the fallback is due."""
    world.now = None
    world.settings = FALLBACK | {"TIMEOUT_SECONDS": "6"}
    world_with_delay(world, failing(datetime.now(START.tzinfo) - timedelta(seconds=118)), 0)
    world.queue.fault("count", Hang())
    run = world.run()
    assert reasons(run) == ["QueueUnavailable", "Fallback"] and world.replicas == 3, run


@pytest.mark.slow
def test_a_delay_is_waited_for_on_the_real_clock(world: World) -> None:
    world.process, world.now = True, None
    scaled = datetime.now(START.tzinfo) - timedelta(seconds=115)
    world_with_delay(world, scaled_up(scaled), 3)
    run = world.run(**UP)
    assert reasons(run) == ["ScaleUpCooldown", "ScaledUp"] and run.record["looks"] == 2, run
    again = read_time(world.annotations["last-scale-time"])
    assert (again - read_time(write_time(scaled))).total_seconds() >= 120
    assert again.timestamp() <= time.time() + 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("direction", ["up", "down"])
def test_whenever_runs_start_each_delay_ends_with_the_run_of_its_minute(
    world: World, direction: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty rescales in a row, with runs that start 0 to 9 s after the minute, on a machine whose
    waits last up to a fifth of a second too long."""
    chance, most, minutes = random.Random(seed), 21, {"up": 2, "down": 5}[direction]
    pass_time = world.pass_time
    monkeypatch.setattr(world, "pass_time", lambda wait: pass_time(wait + chance.uniform(0, 0.2)))
    world.settings = {
        "MAX_REPLICAS": str(most), "SCALE_UP_STEP": "1", "SCALE_DOWN_STEP": "1",
        "SCALE_DOWN_STABILIZATION_SECONDS": "0",
    }  # fmt: skip
    world.cluster.scale("worker", 1 if direction == "up" else most)
    world.cluster.scales.clear()
    world.queue.fill(most if direction == "up" else 0)
    seen: list[int] = []
    for minute in itertools.count():
        world.now = START + timedelta(minutes=minute, seconds=chance.uniform(0, 9))
        world.run()
        seen += [minute] * (len(world.cluster.scales) - len(seen))
        if len(seen) == most - 1 or minute > 200:
            break
    assert seen == list(range(0, minutes * (most - 1), minutes))
