"""The rules of the contract, a row a rule, and what holds for every decision."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scaler
from scaler import INT32_MAX, Inputs, QueueLength, Settings, State, decide
from tests.support.world import START

SETTINGS = scaler.read_settings({"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs"})
CALM = replace(SETTINGS, scale_down_stabilization_seconds=0)  # no windows
FREE = replace(CALM, scale_up_cooldown_seconds=0, scale_down_cooldown_seconds=0)


NOTHING = State()


def ago(seconds: float, direction: str | None = "up") -> State:
    return State(
        last_scale_time=START - timedelta(seconds=seconds),
        last_scale=direction,
    )


def observed(
    replicas: int,
    waiting: int = 0,
    busy: int | None = None,
    state: State = NOTHING,
    floor: int | None = None,
) -> Inputs:
    return Inputs(START, replicas, state, QueueLength(waiting, busy=busy), floor)


RULES = {
    "paused decides nothing": (SETTINGS, observed(2, 9, state=State(paused=True)), 2, "Paused"),
    "paused wins over a number": (
        SETTINGS,
        observed(2, state=State(paused=True, paused_replicas=9)),
        2,
        "Paused",
    ),
    "paused-replicas is obeyed at once and out of range": (
        SETTINGS,
        observed(2, state=replace(ago(1), paused_replicas=9)),
        9,
        "Paused",
    ),
    "paused-replicas is obeyed even below the busy pods": (
        SETTINGS,
        observed(3, state=State(paused_replicas=0), floor=3),
        0,
        "Paused",
    ),
    "a paused scale-in": (
        CALM,
        observed(3, state=State(paused_scale_in=True)),
        3,
        "ScaleDownDisabled",
    ),
    "a paused scale-in leaves scale-out alone": (
        CALM,
        observed(1, 2, state=State(paused_scale_in=True)),
        2,
        "ScaledUp",
    ),
    "a paused scale-out": (
        CALM,
        observed(1, 5, state=State(paused_scale_out=True)),
        1,
        "ScaleUpDisabled",
    ),
    "a paused scale-out holds even below the range": (
        replace(CALM, min_replicas=2),
        observed(1, state=State(paused_scale_out=True)),
        1,
        "ScaleUpDisabled",
    ),
    "0 replicas with a minimum above is switched off": (
        SETTINGS,
        observed(0, 9),
        0,
        "ScalingDisabled",
    ),
    "0 replicas with a minimum of 0 can start": (
        replace(SETTINGS, min_replicas=0),
        observed(0, 2),
        2,
        "ScaledUp",
    ),
    "0 replicas of the scaler's own are below the range": (
        SETTINGS,
        replace(observed(0, 9), own_zero=True),
        1,
        "TooFewReplicas",
    ),
    "0 replicas of the scaler's own, paused again": (
        SETTINGS,
        replace(observed(0, state=State(paused=True)), own_zero=True),
        0,
        "Paused",
    ),
    "below the range, at once": (
        replace(SETTINGS, min_replicas=2),
        observed(1, state=ago(1)),
        2,
        "TooFewReplicas",
    ),
    "above the range, at once": (SETTINGS, observed(9, 9, state=ago(1)), 3, "TooManyReplicas"),
    "above the range, busy pods stay": (SETTINGS, observed(9, floor=5), 5, "TooManyReplicas"),
    "above the range, all busy": (SETTINGS, observed(9, floor=9), 9, "WorkersBusy"),
    "steps of 0 do not keep it out of range": (
        replace(SETTINGS, scale_down_step="0"),
        observed(9),
        3,
        "TooManyReplicas",
    ),
    "no waiting job is one pod": (SETTINGS, observed(1), 1, "AtTarget"),
    "two waiting jobs are two pods": (SETTINGS, observed(1, 2), 2, "ScaledUp"),
    "five waiting jobs are the most": (SETTINGS, observed(1, 5), 3, "ScaledUp"),
    "busy jobs count": (SETTINGS, observed(3, 0, busy=3), 3, "AtTarget"),
    "jobs a pod, rounded up": (replace(SETTINGS, jobs_per_pod=4), observed(1, 5), 2, "ScaledUp"),
    "the window holds a scale-down": (SETTINGS, observed(3), 3, "ScaleDownStabilized"),
    "the window holds a scale-up": (
        replace(SETTINGS, scale_up_stabilization_seconds=60),
        observed(1, 3),
        1,
        "ScaleUpStabilized",
    ),
    "a step up in pods": (
        replace(CALM, scale_up_step="1"),
        observed(1, 3),
        2,
        "ScaledUp",
    ),
    "a step up in percent is rounded up": (
        replace(CALM, max_replicas=9, scale_up_step="50%"),
        observed(3, 9),
        5,
        "ScaledUp",
    ),
    "a percentage of nothing can still start": (
        replace(CALM, min_replicas=0, scale_up_step="100%"),
        observed(0, 3),
        1,
        "ScaledUp",
    ),
    "a percentage is rounded as the HPA's floating point does it": (
        replace(CALM, max_replicas=200, scale_up_step="10%"),
        observed(100, 200),
        111,
        "ScaledUp",
    ),
    "a step down in pods": (
        replace(CALM, scale_down_step="1"),
        observed(3),
        2,
        "ScaledDown",
    ),
    "a step down in percent is rounded down": (
        replace(CALM, max_replicas=9, scale_down_step="50%"),
        observed(7),
        3,
        "ScaledDown",
    ),
    "the last pod can leave at 50 percent": (
        replace(CALM, min_replicas=0, scale_down_step="50%"),
        observed(1),
        0,
        "ScaledDown",
    ),
    "a small percentage removes one pod": (
        replace(CALM, max_replicas=9, scale_down_step="1%"),
        observed(9),
        8,
        "ScaledDown",
    ),
    "a step over 100 percent goes no lower than wanted": (
        replace(CALM, scale_down_step="150%"),
        observed(3),
        1,
        "ScaledDown",
    ),
    "a step of 0 switches scale-up off": (
        replace(CALM, scale_up_step="0"),
        observed(1, 3),
        1,
        "ScaleUpDisabled",
    ),
    "a step of 0% switches scale-down off": (
        replace(CALM, scale_down_step="0%"),
        observed(3),
        3,
        "ScaleDownDisabled",
    ),
    "windows come before steps": (
        replace(SETTINGS, scale_down_step="0"),
        observed(3),
        3,
        "ScaleDownStabilized",
    ),
    "steps come before busy pods": (
        replace(CALM, max_replicas=9, scale_down_step="2"),
        observed(9, floor=3),
        7,
        "ScaledDown",
    ),
    "busy pods stay": (replace(CALM, max_replicas=9), observed(9, floor=4), 4, "ScaledDown"),
    "busy pods come before cooldowns": (CALM, observed(3, state=ago(1), floor=3), 3, "WorkersBusy"),
    "a rollout with busy pods removes nothing": (
        CALM,
        observed(3, floor=INT32_MAX),
        3,
        "WorkersBusy",
    ),
    "busy pods do not hinder a scale-up": (CALM, observed(2, 3, floor=2), 3, "ScaledUp"),
    "a scale-up waits after a scale-up": (
        CALM,
        observed(2, 3, state=ago(119)),
        2,
        "ScaleUpCooldown",
    ),
    "and no longer than its cooldown": (CALM, observed(2, 3, state=ago(120)), 3, "ScaledUp"),
    "a scale-up does not wait after a scale-down": (
        CALM,
        observed(2, 3, state=ago(1, "down")),
        3,
        "ScaledUp",
    ),
    "a scale-up waits after a scale of unknown direction": (
        CALM,
        observed(2, 3, state=ago(1, None)),
        2,
        "ScaleUpCooldown",
    ),
    "a scale-down waits after a scale-up": (
        CALM,
        observed(3, state=ago(299)),
        3,
        "ScaleDownCooldown",
    ),
    "a scale-down waits after a scale-down": (
        CALM,
        observed(3, state=ago(299, "down")),
        3,
        "ScaleDownCooldown",
    ),
    "a scale-down waits no longer than its cooldown": (
        CALM,
        observed(3, state=ago(300)),
        1,
        "ScaledDown",
    ),
    "a time ahead extends the cooldown": (
        CALM,
        observed(2, 3, state=ago(-100)),
        2,
        "ScaleUpCooldown",
    ),
}


@pytest.mark.parametrize(("settings", "seen", "replicas", "reason"), RULES.values(), ids=RULES)
def test_rule(settings: Settings, seen: Inputs, replicas: int, reason: str) -> None:
    decision = decide(settings, seen)
    assert (decision.replicas, decision.reason) == (replicas, reason), decision.message


WAITS = {
    "ScaleUpCooldown": (CALM, observed(2, 3, state=ago(60)), "60 s more"),
    "ScaleDownCooldown": (CALM, observed(3, state=ago(100)), "200 s more"),
    "ScaleDownStabilized": (SETTINGS, observed(3), "300 s more"),
    "ScaleUpStabilized": (
        replace(SETTINGS, scale_up_stabilization_seconds=60),
        observed(1, 3),
        "60 s more",
    ),
}


@pytest.mark.parametrize(("settings", "seen", "words"), WAITS.values(), ids=WAITS)
def test_a_wait_says_how_long_it_lasts_and_which_variable_sets_it(
    settings: Settings, seen: Inputs, words: str
) -> None:
    message = decide(settings, seen).message
    assert words in message and "_SECONDS=" in message


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
states = st.builds(
    State,
    last_scale_time=st.none() | st.integers(-100, 500).map(lambda s: START - timedelta(seconds=s)),
    last_scale=st.sampled_from(["up", "down", None]),
    recommendations=st.lists(
        st.tuples(st.integers(-500, 0).map(lambda s: int(START.timestamp()) + s),
                  st.integers(0, 25)),
        max_size=6,
    ).map(tuple),
    paused_scale_in=st.booleans(),
    paused_scale_out=st.booleans(),
)  # fmt: skip
situations = st.builds(
    Inputs,
    st.just(START),
    st.integers(0, 30),
    states,
    st.builds(QueueLength, st.integers(0, 80), st.booleans(), st.none() | st.integers(0, 20)),
    st.none() | st.integers(0, 40),
)


def replicas_after(settings: Settings, seen: Inputs) -> int:
    replicas = decide(settings, seen).replicas
    assert replicas is not None
    return replicas


@given(settings_drawn, situations)
def test_a_decision_moves_towards_the_range_and_stays_in_it(
    settings: Settings, seen: Inputs
) -> None:
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
def test_more_waiting_jobs_never_mean_fewer_pods(
    settings: Settings, seen: Inputs, more: int
) -> None:
    assert seen.queue
    longer = replace(seen, queue=replace(seen.queue, waiting=seen.queue.waiting + more))
    assert replicas_after(settings, longer) >= replicas_after(settings, seen)


@given(settings_drawn, situations)
def test_a_second_identical_run_changes_nothing(settings: Settings, seen: Inputs) -> None:
    first = decide(settings, seen)
    assert first.replicas is not None
    history = first.annotations.get(scaler.RECOMMENDATIONS)
    state = replace(seen.state, recommendations=scaler.read_history(history) if history else ())
    if first.replicas != seen.current:
        direction = "up" if first.replicas > seen.current else "down"
        state = replace(state, last_scale_time=START, last_scale=direction)
        if settings.scale_up_cooldown_seconds == 0 or settings.scale_down_cooldown_seconds == 0:
            return  # without a cooldown the next step may follow at once
    second = decide(settings, replace(seen, current=first.replicas, state=state))
    if first.reason not in ("TooFewReplicas", "TooManyReplicas"):
        assert second.replicas == first.replicas, second.message


@given(situations, st.integers(0, 20), st.integers(0, 400))
def test_an_unreadable_queue_never_removes_a_pod(
    seen: Inputs, fallback: int, failing_seconds: int
) -> None:
    settings = replace(SETTINGS, max_replicas=20, fallback_replicas=fallback)
    since = START - timedelta(seconds=failing_seconds)
    seen = replace(seen, state=replace(seen.state, queue_failing_since=since))
    problem = scaler.QueueFailure("QueueUnavailable", "no answer")
    decision = scaler.without_queue(settings, seen, problem)
    assert decision.replicas is not None
    assert decision.replicas >= seen.current
    if failing_seconds < 180:
        assert decision.replicas == seen.current


NO_ANSWER = scaler.QueueFailure("QueueUnavailable", "no answer")
FALLBACK = replace(SETTINGS, max_replicas=9, fallback_replicas=5)
LONG_AGO = State(queue_failing_since=START - timedelta(days=1))
UNREADABLE = {
    "the fallback adds pods": (FALLBACK, observed(3, state=LONG_AGO), 5, "Fallback"),
    "a person's number is not acted against": (
        FALLBACK,
        observed(3, state=replace(LONG_AGO, paused_replicas=1)),
        3,
        "QueueUnavailable",
    ),
    "nor is the range, with pods to spare": (
        replace(FALLBACK, max_replicas=5),
        observed(7, state=LONG_AGO),
        7,
        "QueueUnavailable",
    ),
    "a step of 0 holds against the fallback": (
        replace(FALLBACK, scale_up_step="0"),
        observed(3, state=LONG_AGO),
        3,
        "ScaleUpDisabled",
    ),
    "another step does not limit the fallback": (
        replace(FALLBACK, scale_up_step="1"),
        observed(3, state=LONG_AGO),
        5,
        "Fallback",
    ),
    "a paused scale-out holds against the fallback": (
        FALLBACK,
        observed(3, state=replace(LONG_AGO, paused_scale_out=True)),
        3,
        "ScaleUpDisabled",
    ),
    "more pods than the fallback stay": (FALLBACK, observed(7, state=LONG_AGO), 7, "Fallback"),
    "not before its time": (FALLBACK, observed(3), 3, "QueueUnavailable"),
}


@pytest.mark.parametrize(
    ("settings", "seen", "replicas", "reason"), UNREADABLE.values(), ids=UNREADABLE
)
def test_while_the_queue_cannot_be_read(
    settings: Settings, seen: Inputs, replicas: int, reason: str
) -> None:
    decision = scaler.without_queue(settings, seen, NO_ANSWER)
    assert (decision.replicas, decision.reason) == (replicas, reason), decision.message
    assert "no answer" in decision.message


@pytest.mark.parametrize(
    "seen",
    [
        observed(2, state=State(paused=True)),
        observed(2, state=State(paused_replicas=2)),
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
    ordered = observed(3, state=State(paused_replicas=1))
    assert scaler.without_queue(FALLBACK, ordered, NO_ANSWER).annotations == {}
