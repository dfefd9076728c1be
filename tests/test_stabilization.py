"""The stabilization windows, held against a model that remembers everything, as the HPA does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import scaler
from scaler import Inputs, QueueLength, Settings, decide
from tests.support.world import START, World

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
    kept forever, an entry counts if it is younger than the window, and the first reconciliation
    records the number of replicas that it finds. Ours takes one that comes after a pause, longer
    than the window and than the looks usually are apart, for a first one, too."""

    up_seconds: int
    down_seconds: int
    recommendations: list[tuple[int, int]] = field(default_factory=list)

    def starts_over(self, window: int, now: int) -> bool:
        times = sorted({at for at, _ in self.recommendations})
        gap = times[-1] - times[-2] if len(times) > 1 else 0
        return window > 0 and now - times[-1] > max(150, 2 * gap, window - 1)

    def inside(self, window: int, now: int, current: int) -> list[int]:
        if self.starts_over(window, now):
            return [current]
        return [n for at, n in self.recommendations if now - at < window]

    def stabilize(self, now: int, current: int, desired: int) -> int:
        if not self.recommendations:
            self.recommendations.append((now, current))
        in_up = self.inside(self.up_seconds, now, current)
        in_down = self.inside(self.down_seconds, now, current)
        if any(self.starts_over(window, now) for window in (self.up_seconds, self.down_seconds)):
            self.recommendations.append((now, current))
        self.recommendations.append((now, desired))
        result = max(current, min([desired, *in_up]))
        return min(result, max([desired, *in_down]))


@dataclass
class Scaler:
    """Ours: what it remembers is the annotation's text and nothing else."""

    settings: Settings
    annotation: str | None = None

    def stabilize(self, now: int, current: int, desired: int) -> int:
        kept = {scaler.RECOMMENDATIONS: self.annotation} if self.annotation else {}
        when = datetime.fromtimestamp(now, UTC)
        state = scaler.parse_state(kept, self.settings, when)
        decision = decide(self.settings, Inputs(when, current, state, QueueLength(desired)))
        self.annotation = decision.annotations[scaler.RECOMMENDATIONS]
        assert decision.replicas is not None
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
    both start over, as a restarted HPA controller would."""
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


@pytest.mark.parametrize("pause", [301, 3600, 86_400])
def test_after_a_pause_longer_than_the_window_it_starts_over(pause: int) -> None:
    ours = Scaler(ANY_NUMBER)
    now = int(START.timestamp())
    for _ in range(3):
        assert ours.stabilize(now, 3, 1) == 3
        now += 60
    now += pause
    assert ours.stabilize(now, 3, 1) == 3
    assert ours.stabilize(now + 299, 3, 1) == 3
    assert ours.stabilize(now + 300, 3, 1) == 1


@pytest.mark.parametrize("gap", [60, 300, 301, 600, 3600])
def test_rare_looks_do_not_hold_forever(gap: int) -> None:
    ours = Scaler(ANY_NUMBER)
    start = int(START.timestamp())
    numbers = [ours.stabilize(start + gap * look, 3, 1) for look in range(6)]
    assert numbers[0] == 3 and numbers[-1] == 1


@pytest.mark.parametrize("age", [299, 300, 301])
def test_an_entry_as_old_as_its_window_is_outside(age: int) -> None:
    now = int(START.timestamp())
    ours = Scaler(ANY_NUMBER, f"{now - age}:5 {now - 60}:1")
    assert ours.stabilize(now, 5, 1) == (5 if age < 300 else 1)


@pytest.mark.parametrize(
    ("gap", "since", "in_a_row"),
    [(60, 150, True), (60, 151, False), (200, 400, True), (200, 401, False)],
)
def test_which_looks_are_in_a_row(gap: int, since: int, in_a_row: bool) -> None:
    """Only where they are does an empty window let the newest recommendation pass."""
    now = int(START.timestamp())
    ours = Scaler(windows_of(0, 50), f"{now - since - gap}:1 {now - since}:1")
    assert ours.stabilize(now, 3, 1) == (1 if in_a_row else 3)


def test_the_history_keeps_the_windows_and_the_look_before() -> None:
    ours, now = Scaler(windows_of(60, 100)), int(START.timestamp())
    texts = []
    for gap, desired in ((0, 1), (40, 2), (60, 1), (99, 0), (600, 0)):
        now += gap
        ours.stabilize(now, 5, desired)
        texts.append(f" {ours.annotation}".replace(" 17672", " "))
    assert texts == [
        " 25600:1 25600:5",
        " 25600:1 25600:5 25640:2",
        " 25640:2 25700:1",
        " 25700:1 25799:0",
        " 25799:0 26399:0 26399:5",
    ]


def test_no_history_is_kept_at_rest_or_without_a_window() -> None:
    now = int(START.timestamp())
    for up, down, desired, kept in ((60, 0, 4, True), (60, 0, 2, False), (0, 60, 4, False)):
        ours = Scaler(replace(windows_of(up, down), scale_up_step="0", scale_down_step="0"))
        ours.stabilize(now, 3, desired)
        assert bool(ours.annotation) is kept
    ours = Scaler(windows_of(60, 300))
    assert ours.stabilize(now, 3, 3) == 3 and ours.annotation is None
    assert ours.stabilize(now + 60, 3, 1) == 3 and ours.annotation
    assert ours.stabilize(now + 119, 3, 3) == 3 and ours.annotation is None


def test_a_paused_direction_keeps_no_history() -> None:
    kept = {}
    for off in ("in", "out"):
        state = scaler.parse_state({f"queue-scaler/paused-scale-{off}": "true"}, ANY_NUMBER, START)
        decision = decide(ANY_NUMBER, Inputs(START, 3, state, QueueLength(1)))
        kept[off] = decision.annotations[scaler.RECOMMENDATIONS]
    assert kept == {"in": None, "out": "1767225600:1 1767225600:3"}


@pytest.mark.parametrize(
    "damaged", ["3", "x:y", "1767225600:3,1767225660:1", '[{"at": 1}]', "1:-1"]
)
def test_a_damaged_history_is_warned_about_and_starts_over(damaged: str, world: World) -> None:
    world.cluster.scale("worker", 3)
    world.cluster.annotate("worker", **{scaler.RECOMMENDATIONS: damaged})
    run = world.run()
    assert (run.reason, world.replicas) == ("ScaleDownStabilized", 3), run
    assert "WARNING" in run.stdout and repr(damaged) in run.stdout, run
    assert (
        "not a history such as '1767225600:3 1767225660:1': the window starts over\n" in run.stdout
    )
    assert "300 s more" in run.record["message"]


def test_a_history_from_a_clock_ahead_holds_no_longer_than_the_window() -> None:
    now = int(START.timestamp())
    ours = Scaler(ANY_NUMBER, f"{now + 10**9}:5")
    assert ours.stabilize(now, 5, 1) == 5
    assert ours.stabilize(now + 299, 5, 1) == 5
    assert ours.stabilize(now + 300, 5, 1) == 1


def held(settings: Settings, current: int, *looks: tuple[int, int]) -> scaler.Decision:
    """The decision for an empty queue after looks so many seconds ago, each with its number."""
    now = int(START.timestamp())
    state = scaler.State(recommendations=tuple((now - ago, number) for ago, number in looks))
    return decide(settings, Inputs(START, current, state, QueueLength(0)))


def test_a_scale_down_to_what_is_wanted_leaves_nothing_to_remember() -> None:
    settings = replace(ANY_NUMBER, min_replicas=1)
    decision = held(settings, 3, (200, 1), (100, 1))
    assert (decision.reason, decision.replicas) == ("ScaledDown", 1)
    assert decision.annotations[scaler.RECOMMENDATIONS] is None


def test_the_usual_gap_is_the_one_between_the_last_two_looks() -> None:
    settings = replace(ANY_NUMBER, min_replicas=1, scale_down_stabilization_seconds=60)
    assert held(settings, 3, (2000, 3), (1900, 3), (300, 1)).reason == "ScaledDown"
    assert held(settings, 3, (2000, 3), (400, 1), (300, 1)).reason == "ScaleDownStabilized"
