"""The stabilization windows, held against a model that remembers everything, as the HPA does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import scaler
from scaler import Entry, Observed, Queue, Settings, decide
from tests.fakes.firestore import FakeFirestore
from tests.world import START, World

ANY_NUMBER = replace(
    scaler.read_settings({"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs"}),
    min_replicas=0,
    max_replicas=100_000,
    scale_up_cooldown_seconds=0,
    scale_down_cooldown_seconds=0,
)


@dataclass
class Hpa:
    """The HPA controller's stabilization, as its public source has it: every recommendation is
    kept for good, an entry counts if it is younger than the window, and the first reconciliation
    records the number of replicas that it finds."""

    up_seconds: int
    down_seconds: int
    recommendations: list[tuple[int, int]] = field(default_factory=list)

    def stabilize(self, now: int, current: int, desired: int) -> int:
        if not self.recommendations:
            self.recommendations.append((now, current))
        in_up = [n for at, n in self.recommendations if now - at < self.up_seconds]
        in_down = [n for at, n in self.recommendations if now - at < self.down_seconds]
        self.recommendations.append((now, desired))
        result = max(current, min([desired, *in_up]))
        return min(result, max([desired, *in_down]))


@dataclass
class Scaler:
    """Ours: what it remembers is the annotation's text and nothing else."""

    settings: Settings
    annotation: str | None = None

    def stabilize(self, now: int, current: int, desired: int) -> int:
        memory = scaler.Memory(history=scaler.read_history(self.annotation or ""))
        when = datetime.fromtimestamp(now, UTC)
        decision = decide(self.settings, Observed(when, current, memory, Queue(desired)))
        self.annotation = decision.annotations[scaler.RECOMMENDATIONS]
        return decision.replicas


def windows_of(up: int, down: int) -> Settings:
    return replace(
        ANY_NUMBER, scale_up_stabilization_seconds=up, scale_down_stabilization_seconds=down
    )


windows = st.sampled_from([0, 1, 59, 60, 61, 120, 300])
# Gaps that meet the windows' ends exactly, and any others.
gaps = st.sampled_from([0, 1, 59, 60, 60, 60, 61, 120, 299, 300, 301]) | st.integers(0, 400)


@settings(max_examples=500)
@given(
    windows, windows, st.integers(0, 9), st.lists(st.tuples(gaps, st.integers(0, 9)), max_size=40)
)
@example(0, 300, 3, [(0, 1), (300, 1)])
@example(60, 300, 3, [(0, 1), (60, 5), (60, 5), (60, 0)])
def test_any_sequence_gets_the_numbers_that_the_hpa_gives(
    up: int, down: int, first: int, steps: list[tuple[int, int]]
) -> None:
    """Each run starts where the HPA's left the replicas. At rest we keep nothing, so from there
    both start afresh, as a restarted HPA controller would."""
    ours = Scaler(windows_of(up, down))
    hpa = Hpa(up, down)
    now, current = int(START.timestamp()), first
    for gap, desired in steps:
        now += gap
        if ours.annotation is None:
            hpa.recommendations.clear()
        expected = hpa.stabilize(now, current, desired)
        assert ours.stabilize(now, current, desired) == expected, (now, current, desired)
        current = expected


@settings(max_examples=300)
@given(
    windows, windows, st.integers(0, 9), st.lists(st.tuples(gaps, st.integers(0, 9)), max_size=40)
)
def test_without_the_fresh_start_ours_is_never_earlier(
    up: int, down: int, first: int, steps: list[tuple[int, int]]
) -> None:
    """Against an HPA that never forgets: we remove no pod that it would keep."""
    ours = Scaler(windows_of(up, down))
    hpa = Hpa(up, down)
    now, current = int(START.timestamp()), first
    for gap, desired in steps:
        now += gap
        expected, got = hpa.stabilize(now, current, desired), ours.stabilize(now, current, desired)
        if got < current:
            assert expected <= got, (now, current, desired)
        current = got


@given(
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 5000)), min_size=1, max_size=2000),
    st.sampled_from([300, 3600, 86_400]),
    st.sampled_from([0, 3600, 86_400]),
)
@settings(max_examples=30, deadline=None)
def test_the_history_is_bounded_whatever_the_windows(
    steps: list[tuple[int, int]], down: int, up: int
) -> None:
    ours = Scaler(windows_of(up, down))
    now = int(START.timestamp())
    for gap, desired in steps:
        now += gap
        ours.stabilize(now, 2500, desired)
        assert len(ours.annotation or "") < 8000


def test_a_day_of_steady_decline_stays_small_and_gives_back_on_time_within_a_slice() -> None:
    """1,440 different recommendations in a window of a day: the worst case for a history."""
    window = 86_400
    ours = Scaler(replace(ANY_NUMBER, scale_down_stabilization_seconds=window))
    start = int(START.timestamp())
    for minute in range(1440):
        assert ours.stabilize(start + 60 * minute, 2000, 2000 - minute) == 2000
        assert len(ours.annotation or "") < 4000
    slice_seconds = window / scaler.HISTORY_ENTRIES
    for minute in range(1, 1440, 60):
        now = start + window + 60 * minute
        exact = 2000 - minute - 1
        late = 2000 - minute + 1 + int(slice_seconds // 60)
        assert exact <= ours.stabilize(now, 2000, 0) <= late


@pytest.mark.parametrize("age", [299, 300, 301])
def test_an_entry_as_old_as_its_window_lies_outside(age: int) -> None:
    now = int(START.timestamp())
    ours = Scaler(ANY_NUMBER, f"{now - age}:5")
    assert ours.stabilize(now, 5, 1) == (5 if age < 300 else 1)


def test_nothing_is_kept_at_rest() -> None:
    ours = Scaler(replace(ANY_NUMBER, scale_up_stabilization_seconds=60))
    now = int(START.timestamp())
    assert ours.stabilize(now, 3, 3) == 3 and ours.annotation is None
    assert ours.stabilize(now + 60, 3, 1) == 3 and ours.annotation
    assert ours.stabilize(now + 119, 3, 3) == 3 and ours.annotation, "the 1 still holds scale-ups"
    assert ours.stabilize(now + 180, 3, 3) == 3 and ours.annotation is None


def test_an_entry_that_can_no_longer_matter_is_dropped() -> None:
    ours = Scaler(ANY_NUMBER)
    now = int(START.timestamp())
    for minute in range(5):
        ours.stabilize(now + 60 * minute, 9, 4)
    assert scaler.read_history(ours.annotation or "") == (Entry(now, 9), Entry(now + 240, 4))


@pytest.mark.parametrize(
    "damaged", ["3", "x:y", "1767225600:3,1767225660:1", '[{"at": 1}]', "1:-1"]
)
def test_a_damaged_history_is_warned_about_and_starts_afresh(
    damaged: str, world: World, queue: FakeFirestore
) -> None:
    world.cluster.scale("worker", 3)
    world.cluster.annotate("worker", **{scaler.RECOMMENDATIONS: damaged})
    run = world.run()
    assert (run.reason, world.replicas) == ("ScaleDownStabilized", 3), run
    assert "WARNING" in run.stdout and repr(damaged) in run.stdout, run
    assert "300 s more" in run.record["message"]


def test_a_history_from_a_clock_ahead_holds_no_longer_than_the_window() -> None:
    now = int(START.timestamp())
    ours = Scaler(ANY_NUMBER, f"{now + 10**9}:5")
    assert ours.stabilize(now, 5, 1) == 5
    assert ours.stabilize(now + 299, 5, 1) == 5
    assert ours.stabilize(now + 300, 5, 1) == 1


def test_a_queue_empty_for_a_single_run_changes_nothing(world: World, queue: FakeFirestore) -> None:
    world.cluster.scale("worker", 3)
    queue.fill(3)
    assert world.run().reason == "AtTarget"
    queue.clear()
    world.pass_time()
    assert world.run().reason == "ScaleDownStabilized"
    queue.fill(3)
    world.pass_time()
    assert world.run().reason == "AtTarget"
    assert world.replicas == 3 and world.annotations == {}


def test_a_queue_that_stays_empty_gives_the_pods_back_after_300_seconds(
    world: World, queue: FakeFirestore
) -> None:
    world.cluster.scale("worker", 3)
    begun = world.now
    for minute in range(6):
        run = world.run()
        assert world.replicas == (3 if minute < 5 else 1), run
        world.pass_time()
    assert world.now == (begun or START) + timedelta(minutes=6)
    assert set(world.annotations) <= {"last-scale", "last-scale-time", "recommendations"}
    world.run()
    assert set(world.annotations) == {"last-scale", "last-scale-time"}, "at rest again"


def test_a_scale_up_window_waits_for_the_lowest_recommendation_to_pass(
    world: World, queue: FakeFirestore
) -> None:
    world.settings = {"SCALE_UP_STABILIZATION_SECONDS": "60"}
    queue.fill(3)
    assert world.run().reason == "ScaleUpStabilized"
    world.pass_time(59)
    assert world.run().reason == "ScaleUpStabilized"
    world.pass_time(1)
    assert world.run().reason == "ScaledUp"
    assert world.replicas == 3


@pytest.mark.parametrize(
    ("direction", "settings_", "replicas", "reason", "after"),
    [
        ("up", {"SCALE_UP_STEP": "1"}, 1, "ScaledUp", 2),
        ("up", {"SCALE_UP_STEP": "100%", "MAX_REPLICAS": "9"}, 2, "ScaledUp", 4),
        ("up", {"SCALE_UP_STEP": "0"}, 1, "ScaleUpDisabled", 1),
        ("down", {"SCALE_DOWN_STEP": "50%", "MAX_REPLICAS": "9"}, 7, "ScaledDown", 3),
        ("down", {"SCALE_DOWN_STEP": "0"}, 3, "ScaleDownDisabled", 3),
    ],
)
def test_a_step_limits_a_scale(
    direction: str,
    settings_: dict[str, str],
    replicas: int,
    reason: str,
    after: int,
    world: World,
    queue: FakeFirestore,
) -> None:
    world.cluster.scale("worker", replicas)
    queue.fill(9 if direction == "up" else 0)
    run = world.run(SCALE_DOWN_STABILIZATION_SECONDS="0", **settings_)
    assert (run.reason, world.replicas) == (reason, after), run
