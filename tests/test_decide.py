"""The rules of `decide`, one row per case, and what holds for every decision."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scaler
from scaler import Decision, Inputs, QueueLength, Removable, Settings, decide
from tests.support.inputs import CALM, SETTINGS, ago, failing, history, observed, remembered
from tests.support.world import BUSY, START, World

WIDE = replace(CALM, max_replicas=9)
TO_ZERO = replace(CALM, min_replicas=0)


# fmt: off
RULES = {
    "paused wins over a number": (
        SETTINGS, observed(2, paused="true", paused_replicas="9"), 2, "Paused"),
    "paused-replicas applies immediately, even outside the range": (
        SETTINGS, observed(2, paused_replicas="9", **ago(1)), 9, "Paused"),
    "paused-replicas applies even below the busy pods": (
        SETTINGS, observed(3, removable=0, paused_replicas="0"), 0, "Paused"),
    "paused-replicas removes no more than can be chosen in time": (
        SETTINGS, observed(8, reach=3, paused_replicas="2"), 5, "Paused"),
    "paused-replicas that is within reach": (
        SETTINGS, observed(8, reach=6, paused_replicas="2"), 2, "Paused"),
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
    "below the range, immediately": (
        replace(SETTINGS, min_replicas=2), observed(1, **ago(1)), 2, "TooFewReplicas"),
    "above the range, immediately": (SETTINGS, observed(9, 9, **ago(1)), 3, "TooManyReplicas"),
    "above the range, busy pods stay": (SETTINGS, observed(9, removable=4), 5, "TooManyReplicas"),
    "above the range, all busy": (SETTINGS, observed(9, removable=0), 9, "WorkersBusy"),
    "steps of 0 do not keep it out of range": (
        replace(SETTINGS, scale_down_step="0"), observed(9), 3, "TooManyReplicas"),
    "no waiting job is one pod": (SETTINGS, observed(1), 1, "AtTarget"),
    "two waiting jobs are two pods": (SETTINGS, observed(1, 2), 2, "ScaledUp"),
    "five waiting jobs are the maximum": (SETTINGS, observed(1, 5), 3, "ScaledUp"),
    "busy jobs count": (SETTINGS, observed(3, 0, busy=3), 3, "AtTarget"),
    "waiting and busy jobs count together": (SETTINGS, observed(1, 1, busy=2), 3, "ScaledUp"),
    "jobs per pod, rounded up": (replace(SETTINGS, jobs_per_pod=4), observed(1, 5), 2, "ScaledUp"),
    "a step up in pods": (replace(WIDE, scale_up_step="2"), observed(1, 9), 3, "ScaledUp"),
    "a step up goes no higher than wanted": (
        replace(WIDE, scale_up_step="5"), observed(1, 3), 3, "ScaledUp"),
    "a step up in percent is rounded up": (
        replace(WIDE, scale_up_step="50%"), observed(3, 9), 5, "ScaledUp"),
    "a percentage of nothing can still start": (
        replace(TO_ZERO, scale_up_step="100%"), observed(0, 3), 1, "ScaledUp"),
    "a percentage is rounded in floating point, as in the HPA": (
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
    "a step of 0% disables scale-down": (
        replace(CALM, scale_down_step="0%"), observed(3), 3, "ScaleDownDisabled"),
    "windows come before steps": (
        replace(SETTINGS, scale_down_step="0"), observed(3), 3, "ScaleDownStabilized"),
    "steps come before busy pods": (
        replace(WIDE, scale_down_step="2"), observed(9, removable=6), 7, "ScaledDown"),
    "busy pods stay": (WIDE, observed(9, removable=5), 4, "ScaledDown"),
    "busy pods come before cooldowns": (CALM, observed(3, removable=0, **ago(1)), 3, "WorkersBusy"),
    "a rollout with busy pods removes nothing": (
        CALM, observed(3, removable=0), 3, "WorkersBusy"),
    "busy pods do not hinder a scale-up": (CALM, observed(2, 3, removable=0), 3, "ScaledUp"),
    "a scale-up waits after a scale-up": (CALM, observed(2, 3, **ago(119)), 2, "ScaleUpCooldown"),
    "a scale-up is allowed after its cooldown": (CALM, observed(2, 3, **ago(120)), 3, "ScaledUp"),
    "a scale-up does not wait after a scale-down": (
        CALM, observed(2, 3, **ago(1, "down")), 3, "ScaledUp"),
    "a scale-up waits after a rescale of unknown direction": (
        CALM, observed(2, 3, **ago(1, "sideways")), 2, "ScaleUpCooldown"),
    "a scale-down waits after a scale-up": (CALM, observed(3, **ago(299)), 3, "ScaleDownCooldown"),
    "a scale-down waits after a scale-down": (
        CALM, observed(3, **ago(299, "down")), 3, "ScaleDownCooldown"),
    "a scale-down is allowed after its cooldown": (
        CALM, observed(3, **ago(300)), 1, "ScaledDown"),
    "a time ahead extends the cooldown": (CALM, observed(2, 3, **ago(-100)), 2, "ScaleUpCooldown"),
}
# fmt: on


@pytest.mark.parametrize(("replicas", "expected"), [(3, "up 2->3"), (1, "down 2->1"), (2, None)])
def test_a_rescale_is_noted_with_its_direction(replicas: int, expected: str | None) -> None:
    decision = scaler.Decision(replicas, "ScaledUp", "", 2)
    assert scaler.rescale_annotations(decision, START).get(scaler.LAST_SCALE) == expected


@pytest.mark.parametrize(("settings", "seen", "replicas", "reason"), RULES.values(), ids=RULES)
def test_rule(settings: Settings, seen: Inputs, replicas: int, reason: str) -> None:
    decision = decide(settings, seen)
    assert (decision.replicas, decision.reason) == (replicas, reason), decision.message
    assert (decision.current, decision.queue, decision.warnings) == (seen.current, seen.queue, ())
    assert decision.change == replicas - seen.current and decision.exit_code == 0


# What a look has to wait for, in seconds, and the recommendation within the range.
# fmt: off
WAITS: dict[str, tuple[Settings, Inputs, float | None, int | None]] = {
    "nothing": (SETTINGS, observed(1, 9), None, 3),
    "a cooldown": (CALM, observed(1, 2, **ago(60)), 60, 2),
    "a scale-down's cooldown": (CALM, observed(3, **ago(100)), 200, 1),
    "a window": (SETTINGS, observed(3, recommendations=history((200, 3), (100, 1))), 100, 1),
    "busy pods": (CALM, observed(3, removable=0), None, 1),
    "a pause": (SETTINGS, observed(3, paused="true"), None, None),
    "above the range": (SETTINGS, observed(9), None, None),
}
# fmt: on


@pytest.mark.parametrize(("settings", "seen", "wait", "desired"), WAITS.values(), ids=WAITS)
def test_a_decision_has_its_delay_and_its_recommendation(
    settings: Settings, seen: Inputs, wait: float | None, desired: int | None
) -> None:
    decision = decide(settings, seen)
    assert (decision.wait, decision.desired) == (wait, desired), decision.message


def test_an_unknown_number_is_no_change() -> None:
    assert Decision(None, "ClusterUnavailable", "", 3).change == 0
    assert Decision(3, "ClusterUnavailable", "").change == 0


def test_all_pods_can_go_if_none_is_busy(world: World) -> None:
    to_zero = {"MIN_REPLICAS": "0", "SCALE_DOWN_STABILIZATION_SECONDS": "0"}
    run = world.run(BUSY_FILTER=BUSY, **to_zero)
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
    return drawn | ({"recommendations": history(*entries)} if entries else {})


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
    st.none() | st.builds(Removable, st.integers(-3, 40)),
)


def spared(seen: Inputs) -> int:
    """How many replicas have to stay for the busy pods."""
    return 0 if seen.removable is None else seen.current - max(0, seen.removable.pods)


def replicas_after(settings: Settings, seen: Inputs) -> int:
    replicas = decide(settings, seen).replicas
    assert replicas is not None
    return replicas


@given(settings_drawn, situations)
def test_a_decision_moves_to_the_range_and_stays_in_it(settings: Settings, seen: Inputs) -> None:
    replicas = replicas_after(settings, seen)
    low, high = settings.min_replicas, settings.max_replicas
    if replicas != seen.current:
        assert low <= replicas <= max(high, spared(seen))
    assert seen.current or low == 0 or replicas == 0, "disabled stays disabled"


@given(settings_drawn, situations)
def test_a_scale_down_never_goes_below_the_busy_pods(settings: Settings, seen: Inputs) -> None:
    assert replicas_after(settings, seen) >= min(spared(seen), seen.current)


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
            return  # without a cooldown the next step may follow immediately
    second = decide(settings, replace(seen, current=first.replicas, state=remembered(kept)))
    if first.reason not in ("TooFewReplicas", "TooManyReplicas"):
        assert second.replicas == first.replicas, second.message


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
    "the pods stay without a fallback": (
        SETTINGS, observed(3, **failing(86_400)), 3, "QueueUnavailable"),
    "the fallback adds pods": (FALLBACK, observed(3, **failing(180)), 5, "Fallback"),
    "not before its time": (FALLBACK, observed(3, **failing(179)), 3, "QueueUnavailable"),
    "the fallback does not act against paused-replicas": (
        FALLBACK, observed(3, paused_replicas="1", **failing(86_400)), 3, "QueueUnavailable"),
    "above the range, no pods are removed": (
        replace(FALLBACK, max_replicas=5), observed(7, **failing(86_400)), 7, "QueueUnavailable"),
    "a step of 0 disables the fallback": (
        replace(FALLBACK, scale_up_step="0"), observed(3, **failing(86_400)), 3,
        "ScaleUpDisabled"),
    "another step does not limit the fallback": (
        replace(FALLBACK, scale_up_step="1"), observed(3, **failing(86_400)), 5, "Fallback"),
    "a paused scale-out disables the fallback": (
        FALLBACK, observed(3, paused_scale_out="true", **failing(86_400)), 3, "ScaleUpDisabled"),
    "more pods than the fallback stay": (
        FALLBACK, observed(7, paused_scale_out="true", **failing(86_400)), 7, "Fallback"),
    "as many pods as the fallback stay": (
        replace(FALLBACK, scale_down_step="0"),
        observed(5, paused_scale_in="true", **failing(86_400)), 5, "Fallback"),
}
# fmt: on


@pytest.mark.parametrize(
    ("settings", "seen", "replicas", "reason"), UNREADABLE.values(), ids=UNREADABLE
)
def test_without_the_queue(settings: Settings, seen: Inputs, replicas: int, reason: str) -> None:
    problem = scaler.QueueFailure("QueueUnavailable", "no answer", exit_code=2)
    decision = scaler.without_queue(settings, seen, problem)
    assert (decision.replicas, decision.reason) == (replicas, reason), decision.message
    assert (decision.current, decision.exit_code) == (seen.current, 2)
    assert (decision.desired, decision.queue, decision.warnings) == (None, None, ())
    assert decision.annotations == {}, "the time of the first failure stays"


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
def test_a_look_that_skips_the_queue_resets_the_failure_streak(seen: Inputs) -> None:
    """One failure, a day's pause, another failure: that is no day of failures."""
    assert decide(SETTINGS, seen).annotations[scaler.FAILING_SINCE] is None


def test_the_first_failure_is_stored_but_not_while_an_override_waits() -> None:
    first = scaler.without_queue(FALLBACK, observed(3), NO_ANSWER)
    assert first.annotations == {scaler.FAILING_SINCE: "2026-01-01T00:00:00Z"}
    assert first.wait == 180
    held = observed(3, paused_replicas="1")
    assert scaler.without_queue(FALLBACK, held, NO_ANSWER).annotations == {}
