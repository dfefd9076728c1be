"""The rules of the contract, a row a rule, and what holds for every decision."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scaler
from scaler import (
    ANNOTATION,
    INT32_MAX,
    Decision,
    Inputs,
    QueueLength,
    Removable,
    Settings,
    State,
    decide,
)
from tests.support.world import BUSY, START, World

SETTINGS = scaler.read_settings({"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs"})
CALM = replace(SETTINGS, scale_down_stabilization_seconds=0)  # no windows
FREE = replace(CALM, scale_up_cooldown_seconds=0, scale_down_cooldown_seconds=0)
WIDE = replace(CALM, max_replicas=9)
TO_ZERO = replace(CALM, min_replicas=0)


def remembered(annotations: dict[str, str]) -> State:
    """What the scaler reads from annotations, named without their prefix and with underscores."""
    full = {ANNOTATION + name.replace("_", "-"): value for name, value in annotations.items()}
    return scaler.parse_state(full, SETTINGS, START)


def observed(
    replicas: int,
    waiting: int = 0,
    busy: int | None = None,
    floor: int | None = None,
    because: str = "",
    own_zero: bool = False,
    **annotations: str,
) -> Inputs:
    state, queue = remembered(annotations), QueueLength(waiting, busy=busy)
    removable = None if floor is None else Removable(max(0, replicas - floor), because)
    return Inputs(START, replicas, state, queue, removable, own_zero)


def ago(seconds: float, direction: str = "up") -> dict[str, Any]:
    """A scale so long ago."""
    when = scaler.write_time(START - timedelta(seconds=seconds))
    return {"last_scale_time": when, "last_scale": f"{direction} 1->2"}


def looks(*entries: tuple[int, int]) -> str:
    """A history of recommendations: how many seconds ago, and how many pods."""
    return " ".join(f"{int(START.timestamp()) - age}:{pods}" for age, pods in entries)


# fmt: off
RULES = {
    "paused wins over a number": (
        SETTINGS, observed(2, paused="true", paused_replicas="9"), 2, "Paused"),
    "paused-replicas is obeyed at once and out of range": (
        SETTINGS, observed(2, paused_replicas="9", **ago(1)), 9, "Paused"),
    "paused-replicas is obeyed even below the busy pods": (
        SETTINGS, observed(3, floor=3, paused_replicas="0"), 0, "Paused"),
    "a paused scale-in": (CALM, observed(3, paused_scale_in="true"), 3, "ScaleDownDisabled"),
    "a paused scale-in leaves scale-out alone": (
        CALM, observed(1, 2, paused_scale_in="true"), 2, "ScaledUp"),
    "a paused scale-in holds above the range": (
        CALM, observed(9, paused_scale_in="true"), 9, "ScaleDownDisabled"),
    "a paused scale-out": (CALM, observed(1, 5, paused_scale_out="true"), 1, "ScaleUpDisabled"),
    "a paused scale-out leaves scale-in alone": (
        CALM, observed(3, paused_scale_out="true"), 1, "ScaledDown"),
    "a paused scale-out holds even below the range": (
        replace(CALM, min_replicas=2), observed(1, paused_scale_out="true"), 1, "ScaleUpDisabled"),
    "0 replicas with a minimum of 0 can start": (TO_ZERO, observed(0, 2), 2, "ScaledUp"),
    "0 replicas of the scaler's own are below the range": (
        SETTINGS, observed(0, 9, own_zero=True), 1, "TooFewReplicas"),
    "0 replicas of the scaler's own, paused again": (
        SETTINGS, observed(0, own_zero=True, paused="true"), 0, "Paused"),
    "below the range, at once": (
        replace(SETTINGS, min_replicas=2), observed(1, **ago(1)), 2, "TooFewReplicas"),
    "above the range, at once": (SETTINGS, observed(9, 9, **ago(1)), 3, "TooManyReplicas"),
    "above the range, busy pods stay": (SETTINGS, observed(9, floor=5), 5, "TooManyReplicas"),
    "above the range, all busy": (SETTINGS, observed(9, floor=9), 9, "WorkersBusy"),
    "steps of 0 do not keep it out of range": (
        replace(SETTINGS, scale_down_step="0"), observed(9), 3, "TooManyReplicas"),
    "no waiting job is one pod": (SETTINGS, observed(1), 1, "AtTarget"),
    "two waiting jobs are two pods": (SETTINGS, observed(1, 2), 2, "ScaledUp"),
    "five waiting jobs are the most": (SETTINGS, observed(1, 5), 3, "ScaledUp"),
    "busy jobs count": (SETTINGS, observed(3, 0, busy=3), 3, "AtTarget"),
    "waiting and busy jobs count together": (SETTINGS, observed(1, 1, busy=2), 3, "ScaledUp"),
    "jobs a pod, rounded up": (replace(SETTINGS, jobs_per_pod=4), observed(1, 5), 2, "ScaledUp"),
    "a step up in pods": (replace(WIDE, scale_up_step="2"), observed(1, 9), 3, "ScaledUp"),
    "a step up goes no higher than wanted": (
        replace(WIDE, scale_up_step="5"), observed(1, 3), 3, "ScaledUp"),
    "a step up in percent is rounded up": (
        replace(WIDE, scale_up_step="50%"), observed(3, 9), 5, "ScaledUp"),
    "a percentage of nothing can still start": (
        replace(TO_ZERO, scale_up_step="100%"), observed(0, 3), 1, "ScaledUp"),
    "a percentage is rounded as the HPA's floating point does it": (
        replace(CALM, max_replicas=200, scale_up_step="10%"), observed(100, 200), 111, "ScaledUp"),
    "a step down in pods": (replace(WIDE, scale_down_step="2"), observed(9), 7, "ScaledDown"),
    "a step down in percent is rounded down": (
        replace(WIDE, scale_down_step="50%"), observed(7), 3, "ScaledDown"),
    "the last pod can leave at 50 percent": (
        replace(TO_ZERO, scale_down_step="50%"), observed(1), 0, "ScaledDown"),
    "a small percentage removes one pod": (
        replace(WIDE, scale_down_step="1%"), observed(9), 8, "ScaledDown"),
    "90 percent of 100 leaves 9, as in the HPA's floating point": (
        replace(CALM, max_replicas=200, scale_down_step="90%"), observed(100), 9, "ScaledDown"),
    "a step over 100 percent goes no lower than wanted": (
        replace(CALM, scale_down_step="150%"), observed(3), 1, "ScaledDown"),
    "a step up of 0 leaves scale-down alone": (
        replace(CALM, scale_up_step="0"), observed(3), 1, "ScaledDown"),
    "a step of 0% switches scale-down off": (
        replace(CALM, scale_down_step="0%"), observed(3), 3, "ScaleDownDisabled"),
    "windows come before steps": (
        replace(SETTINGS, scale_down_step="0"), observed(3), 3, "ScaleDownStabilized"),
    "steps come before busy pods": (
        replace(WIDE, scale_down_step="2"), observed(9, floor=3), 7, "ScaledDown"),
    "busy pods stay": (WIDE, observed(9, floor=4), 4, "ScaledDown"),
    "busy pods come before cooldowns": (CALM, observed(3, floor=3, **ago(1)), 3, "WorkersBusy"),
    "a rollout with busy pods removes nothing": (
        CALM, observed(3, floor=INT32_MAX), 3, "WorkersBusy"),
    "busy pods do not hinder a scale-up": (CALM, observed(2, 3, floor=2), 3, "ScaledUp"),
    "a scale-up waits after a scale-up": (CALM, observed(2, 3, **ago(119)), 2, "ScaleUpCooldown"),
    "and no longer than its cooldown": (CALM, observed(2, 3, **ago(120)), 3, "ScaledUp"),
    "a scale-up does not wait after a scale-down": (
        CALM, observed(2, 3, **ago(1, "down")), 3, "ScaledUp"),
    "a scale-up waits after a scale of unknown direction": (
        CALM, observed(2, 3, **ago(1, "sideways")), 2, "ScaleUpCooldown"),
    "a scale-down waits after a scale-up": (CALM, observed(3, **ago(299)), 3, "ScaleDownCooldown"),
    "a scale-down waits after a scale-down": (
        CALM, observed(3, **ago(299, "down")), 3, "ScaleDownCooldown"),
    "a scale-down waits no longer than its cooldown": (
        CALM, observed(3, **ago(300)), 1, "ScaledDown"),
    "a time ahead extends the cooldown": (CALM, observed(2, 3, **ago(-100)), 2, "ScaleUpCooldown"),
}
# fmt: on


@pytest.mark.parametrize(("settings", "seen", "replicas", "reason"), RULES.values(), ids=RULES)
def test_rule(settings: Settings, seen: Inputs, replicas: int, reason: str) -> None:
    decision = decide(settings, seen)
    assert (decision.replicas, decision.reason) == (replicas, reason), decision.message
    assert (decision.current, decision.queue, decision.warnings) == (seen.current, seen.queue, ())
    assert decision.change == replicas - seen.current and decision.exit_code == 0


# What each outcome says. Of a window or a cooldown: how long it lasts, and which variable sets it.
# fmt: off
SENTENCES = {
    "Paused": (SETTINGS, observed(2, 9, paused="true"), "paused by annotation; stays at 2 pods"),
    "Paused until": (
        SETTINGS, observed(1, paused="true", paused_until="2026-01-01T01:00:00Z"),
        "paused by annotation until 2026-01-01T01:00:00Z; stays at 1 pod"),
    "Paused with a number": (
        SETTINGS, observed(2, paused_replicas="5", paused_until="2026-01-01T01:00:00Z"),
        "queue-scaler/paused-replicas orders 5 pods until 2026-01-01T01:00:00Z; scaled up from 2 "
        "to 5 pods"),
    "ScaleDownDisabled until": (
        CALM, observed(3, paused_scale_in="true", paused_until="2026-01-01T01:00:00Z"),
        "0 jobs waiting: 1 pod wanted, the minimum; stays at 3 pods, as scale-down is switched off "
        "until 2026-01-01T01:00:00Z"),
    "ScaleUpDisabled": (
        replace(CALM, scale_up_step="0"), observed(1, 2),
        "2 jobs waiting: 2 pods wanted; stays at 1 pod, as scale-up is switched off"),
    "ScalingDisabled": (
        replace(SETTINGS, min_replicas=2), observed(0),
        "somebody set 0 replicas although MIN_REPLICAS=2; stays at 0 pods, switched off until "
        "somebody scales it to 1 or more"),
    "TooFewReplicas": (
        replace(SETTINGS, min_replicas=2), observed(1),
        "1 pod where MIN_REPLICAS=2; scaled up from 1 to 2 pods"),
    "TooManyReplicas": (
        SETTINGS, observed(4),
        "4 pods where MAX_REPLICAS=3; scaled down from 4 to 3 pods"),
    "AtTarget": (
        SETTINGS, observed(2, 1, busy=1),
        "1 job waiting, 1 busy: 2 pods wanted; stays at 2 pods"),
    "ScaledUp": (
        SETTINGS, replace(observed(1), queue=QueueLength(1000, capped=True)),
        "1000 or more jobs waiting: 3 pods wanted, the maximum; scaled up from 1 to 3 pods"),
    "ScaledDown": (
        CALM, observed(3),
        "0 jobs waiting: 1 pod wanted, the minimum; scaled down from 3 to 1 pod"),
    "ScaleDownStabilized": (
        SETTINGS, observed(3, 1, recommendations=looks((200, 3), (100, 1))),
        "1 job waiting: 1 pod wanted, the minimum; stays at 3 pods for 100 s more "
        "(SCALE_DOWN_STABILIZATION_SECONDS=300)"),
    "ScaleUpStabilized": (
        replace(SETTINGS, scale_up_stabilization_seconds=60),
        observed(1, 3, recommendations=looks((50, 0), (40, 1), (30, 3))),
        "3 jobs waiting: 3 pods wanted, the maximum; stays at 1 pod for 20 s more "
        "(SCALE_UP_STABILIZATION_SECONDS=60)"),
    "WorkersBusy": (
        CALM, observed(2, floor=2, because=", as removing one would cost a busy one"),
        "0 jobs waiting: 1 pod wanted, the minimum; stays at 2 pods, as removing one would cost a "
        "busy one"),
    "ScaleUpCooldown": (
        CALM, observed(1, 2, **ago(60)),
        "2 jobs waiting: 2 pods wanted; stays at 1 pod for 60 s more "
        "(SCALE_UP_COOLDOWN_SECONDS=120 since 2025-12-31T23:59:00Z)"),
    "ScaleDownCooldown": (
        CALM, observed(3, 2, **ago(100)),
        "2 jobs waiting: 2 pods wanted; stays at 3 pods for 200 s more "
        "(SCALE_DOWN_COOLDOWN_SECONDS=300 since 2025-12-31T23:58:20Z)"),
}
# fmt: on


@pytest.mark.parametrize(("name", "row"), SENTENCES.items(), ids=SENTENCES)
def test_each_outcome_in_words(name: str, row: tuple[Settings, Inputs, str]) -> None:
    settings, seen, sentence = row
    decision = decide(settings, seen)
    assert (decision.reason, decision.message) == (name.split()[0], sentence)


def test_where_a_number_is_not_known_nothing_is_said_to_change() -> None:
    assert Decision(None, "ClusterUnavailable", "", 3).change == 0
    assert Decision(3, "ClusterUnavailable", "").change == 0


def test_with_nothing_busy_all_the_pods_may_go(world: World) -> None:
    none = {"MIN_REPLICAS": "0", "SCALE_DOWN_STABILIZATION_SECONDS": "0"}
    run = world.run(BUSY_FILTER=BUSY, **none)
    assert (run.reason, world.replicas) == ("ScaledDown", 0), run


steps = st.builds("{}{}".format, st.integers(0, 200), st.sampled_from(["", "%"]))
settings_drawn = st.builds(
    lambda low, extra, **more: replace(
        SETTINGS, min_replicas=low, max_replicas=low + extra, **more
    ),
    st.integers(0, 5),
    st.integers(1, 20),
    jobs_per_pod=st.integers(1, 4),
    scale_up_cooldown_seconds=st.integers(0, 200),
    scale_down_cooldown_seconds=st.integers(0, 400),
    scale_up_stabilization_seconds=st.integers(0, 200),
    scale_down_stabilization_seconds=st.integers(0, 400),
    scale_up_step=st.none() | steps,
    scale_down_step=st.none() | steps,
)


def drawn_annotations(
    scaled: int | None, direction: str, entries: list[tuple[int, int]], off: tuple[bool, bool]
) -> dict[str, str]:
    scale_in, scale_out = (str(one).lower() for one in off)
    drawn = {"paused_scale_in": scale_in, "paused_scale_out": scale_out}
    drawn |= {} if scaled is None else ago(scaled, direction)
    return drawn | ({"recommendations": looks(*entries)} if entries else {})


annotations_drawn = st.builds(
    drawn_annotations,
    st.none() | st.integers(-100, 500),
    st.sampled_from(["up", "down", "sideways"]),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 25)), max_size=6),
    st.tuples(st.booleans(), st.booleans()),
)
situations = st.builds(
    Inputs,
    st.just(START),
    st.integers(0, 30),
    annotations_drawn.map(remembered),
    st.builds(QueueLength, st.integers(0, 80), st.booleans(), st.none() | st.integers(0, 20)),
    st.none() | st.integers(0, 40),
)


def replicas_after(settings: Settings, seen: Inputs) -> int:
    replicas = decide(settings, seen).replicas
    assert replicas is not None
    return replicas


@given(settings_drawn, situations)
def test_a_decision_moves_to_the_range_and_stays_in_it(settings: Settings, seen: Inputs) -> None:
    replicas = replicas_after(settings, seen)
    low, high = settings.min_replicas, settings.max_replicas
    if replicas != seen.current:
        kept = min(seen.busy_floor or 0, seen.current)
        assert low <= replicas <= max(high, kept)
    assert seen.current or low == 0 or replicas == 0, "switched off stays off"


@given(settings_drawn, situations)
def test_a_scale_down_never_goes_below_the_busy_pods(settings: Settings, seen: Inputs) -> None:
    replicas = replicas_after(settings, seen)
    assert replicas >= min(seen.busy_floor or 0, seen.current)


@given(settings_drawn, situations, st.integers(1, 50))
def test_more_jobs_never_mean_fewer_pods(settings: Settings, seen: Inputs, more: int) -> None:
    assert seen.queue
    longer = replace(seen, queue=replace(seen.queue, waiting=seen.queue.waiting + more))
    assert replicas_after(settings, longer) >= replicas_after(settings, seen)


@given(settings_drawn, situations, annotations_drawn)
def test_a_second_identical_run_changes_nothing(
    settings: Settings, seen: Inputs, annotations: dict[str, str]
) -> None:
    first = decide(settings, replace(seen, state=remembered(annotations)))
    assert first.replicas is not None
    history = first.annotations.get(scaler.RECOMMENDATIONS)
    kept = {name: value for name, value in annotations.items() if name != "recommendations"}
    kept |= {"recommendations": history} if history else {}
    if first.replicas != seen.current:
        kept |= ago(0, "up" if first.replicas > seen.current else "down")
        if settings.scale_up_cooldown_seconds == 0 or settings.scale_down_cooldown_seconds == 0:
            return  # without a cooldown the next step may follow at once
    second = decide(settings, replace(seen, current=first.replicas, state=remembered(kept)))
    if first.reason not in ("TooFewReplicas", "TooManyReplicas"):
        assert second.replicas == first.replicas, second.message


def failing(seconds: float) -> dict[str, Any]:
    return {"queue_failing_since": scaler.write_time(START - timedelta(seconds=seconds))}


NO_ANSWER = scaler.QueueFailure("QueueUnavailable", "no answer")
FALLBACK = replace(SETTINGS, max_replicas=9, fallback_replicas=5)


@given(situations, st.integers(0, 20), st.integers(0, 400))
def test_an_unread_queue_removes_no_pod(seen: Inputs, fallback: int, failing_seconds: int) -> None:
    settings = replace(SETTINGS, max_replicas=20, fallback_replicas=fallback)
    seen = replace(seen, state=remembered(failing(failing_seconds)))
    decision = scaler.without_queue(settings, seen, NO_ANSWER)
    assert decision.replicas is not None
    assert decision.replicas >= seen.current
    if failing_seconds < 180:
        assert decision.replicas == seen.current


# fmt: off
UNREADABLE = {
    "without a fallback the pods stay": (
        SETTINGS, observed(3, **failing(86_400)), 3,
        "QueueUnavailable: no answer; stays at 3 pods"),
    "the fallback adds pods": (
        FALLBACK, observed(3, **failing(180)), 5,
        "Fallback: no answer; falls back to FALLBACK_REPLICAS=5; scaled up from 3 to 5 pods"),
    "not before its time": (
        FALLBACK, observed(3, **failing(179)), 3,
        "QueueUnavailable: no answer; stays at 3 pods, and falls back to 5 in 1 s"),
    "a person's number is not acted against": (
        FALLBACK, observed(3, paused_replicas="1", **failing(86_400)), 3,
        "QueueUnavailable: no answer; stays at 3 pods, as busy pods cannot be told from idle ones; "
        "queue-scaler/paused-replicas=1 waits"),
    "nor is the range, with pods to spare": (
        replace(FALLBACK, max_replicas=5), observed(7, **failing(86_400)), 7,
        "QueueUnavailable: no answer; stays at 7 pods, as busy pods cannot be told from idle ones"),
    "a step of 0 holds against the fallback": (
        replace(FALLBACK, scale_up_step="0"), observed(3, **failing(86_400)), 3,
        "ScaleUpDisabled: no answer; stays at 3 pods, as scale-up is switched off"),
    "another step does not limit the fallback": (
        replace(FALLBACK, scale_up_step="1"), observed(3, **failing(86_400)), 5,
        "Fallback: no answer; falls back to FALLBACK_REPLICAS=5; scaled up from 3 to 5 pods"),
    "a paused scale-out holds against the fallback": (
        FALLBACK, observed(3, paused_scale_out="true", **failing(86_400)), 3,
        "ScaleUpDisabled: no answer; stays at 3 pods, as scale-up is switched off"),
    "more pods than the fallback stay": (
        FALLBACK, observed(7, paused_scale_out="true", **failing(86_400)), 7,
        "Fallback: no answer; falls back to FALLBACK_REPLICAS=5; stays at 7 pods"),
    "as many pods as the fallback stay": (
        FALLBACK, observed(5, paused_scale_in="true", **failing(86_400)), 5,
        "Fallback: no answer; falls back to FALLBACK_REPLICAS=5; stays at 5 pods"),
}
# fmt: on


@pytest.mark.parametrize(
    ("settings", "seen", "replicas", "line"), UNREADABLE.values(), ids=UNREADABLE
)
def test_without_the_queue(settings: Settings, seen: Inputs, replicas: int, line: str) -> None:
    problem = scaler.QueueFailure("QueueUnavailable", "no answer", exit_code=2)
    decision = scaler.without_queue(settings, seen, problem)
    assert (decision.replicas, f"{decision.reason}: {decision.message}") == (replicas, line)
    assert (decision.current, decision.exit_code) == (seen.current, 2)
    assert (decision.desired, decision.queue, decision.warnings) == (None, None, ())
    assert decision.annotations == {}, "the stamp of the first failure stays"


@pytest.mark.parametrize(
    "seen",
    [
        observed(2, paused="true"),
        observed(2, paused_replicas="2"),
        observed(0),
        observed(9),
        observed(2, 2),
    ],
)
def test_a_look_without_need_of_the_queue_breaks_the_row_of_failures(seen: Inputs) -> None:
    """One blip, a day's pause, another blip: that is no day of failures."""
    assert decide(SETTINGS, seen).annotations[scaler.FAILING_SINCE] is None


def test_the_first_failure_is_stamped_and_an_order_that_waits_stamps_nothing() -> None:
    first = scaler.without_queue(FALLBACK, observed(3), NO_ANSWER)
    assert first.annotations == {scaler.FAILING_SINCE: "2026-01-01T00:00:00Z"}
    assert "falls back to 5 in 180 s" in first.message
    ordered = observed(3, paused_replicas="1")
    assert scaler.without_queue(FALLBACK, ordered, NO_ANSWER).annotations == {}
