"""Hours with a higher minimum, in local time, and pauses that expire."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

import scaler
from scaler import ANNOTATION, Inputs, QueueLength, Settings, State, decide, parse_state
from tests.support.world import START, World

NEEDED = {"DEPLOYMENT": "worker", "QUEUE_COLLECTION": "jobs", "MAX_REPLICAS": "9"}
MINUTE = timedelta(minutes=1)


def scheduled(hours: str, **environ: str) -> Settings:
    return scaler.read_settings({**NEEDED, "SCHEDULED_MIN_REPLICAS": hours, **environ})


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# When the offset from UTC changes in 2026, and the minutes of it before and after, as published.
TRANSITIONS = [
    ("Europe/Berlin", "2026-03-29T01:00", 60, 120),
    ("Europe/Berlin", "2026-10-25T01:00", 120, 60),
    ("America/New_York", "2026-03-08T07:00", -300, -240),
    ("America/New_York", "2026-11-01T06:00", -240, -300),
    ("Australia/Lord_Howe", "2026-04-04T15:00", 660, 630),
    ("Australia/Lord_Howe", "2026-10-03T15:30", 630, 660),
]


@pytest.mark.parametrize(("zone", "change", "before", "after"), TRANSITIONS)
def test_the_hours_follow_local_time(zone: str, change: str, before: int, after: int) -> None:
    """Each minute of two days around it, for hours that begin and end within the change."""
    instant = at(change)
    for hours, begin, end in (("01:30-02:30", 90, 150), ("02:00-03:00", 120, 180)):
        settings = scheduled(f"5 Mon-Sun {hours} {zone}")
        for minute in range(-1440, 1440):
            now = instant + minute * MINUTE
            offset = before if now < instant else after
            local = (now.hour * 60 + now.minute + offset) % 1440
            expected = 5 if begin <= local < end else 1
            assert settings.minimum(now)[0] == expected, (now, local)


def test_every_minute_of_a_year() -> None:
    """Working hours in Berlin, reckoned with the two changes of 2026 and nothing else."""
    settings = scheduled("5 Mon-Fri 07:30-20:00 Europe/Berlin")
    now, summer, winter = at("2026-01-01"), at("2026-03-29T01:00"), at("2026-10-25T01:00")
    held = 0
    while now < at("2027-01-01"):
        local = now + (120 if summer <= now < winter else 60) * MINUTE
        inside = local.isoweekday() <= 5 and 450 <= local.hour * 60 + local.minute < 1200
        assert settings.minimum(now)[0] == (5 if inside else 1), now
        held += inside
        now += MINUTE
    assert held == 261 * 750, "261 working days of twelve and a half hours"


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("Mon 00:00-24:00", "2026-11-23T23:59", "2026-11-24T00:00"),
        ("Mon-Fri 07:30-20:00", "2026-11-23T07:30", "2026-11-23T20:00"),
        ("Mon-Fri 07:30-20:00", "2026-11-27T19:59", "2026-11-28T12:00"),
        ("Fri 22:00-06:00", "2026-11-28T05:59", "2026-11-28T06:00"),
        ("Fri 22:00-06:00", "2026-11-27T22:00", "2026-11-27T05:00"),
        ("Sun 22:00-06:00", "2026-11-23T05:59", "2026-11-22T05:59"),
        ("Fri-Sat 22:00-06:00", "2026-11-28T05:59", "2026-11-28T06:00"),
        ("Fri 22:00-00:00", "2026-11-27T23:59", "2026-11-28T00:00"),
        ("Sat-Mon 10:00-11:00", "2026-11-23T10:30", "2026-11-24T10:30"),
        ("Tue 10:00-11:00", "2026-11-24T10:30", "2026-11-25T10:30"),
        ("Wed 10:00-11:00", "2026-11-25T10:30", "2026-11-26T10:30"),
        ("Thu 10:00-11:00", "2026-11-26T10:30", "2026-11-27T10:30"),
        ("sat 10:00-11:00", "2026-11-21T10:30", "2026-11-22T10:30"),
    ],
)
def test_the_hours_begin_and_end_to_the_minute(hours: str, inside: str, outside: str) -> None:
    settings = scheduled(f"4 {hours} UTC")
    assert settings.minimum(at(inside)) == (4, f"SCHEDULED_MIN_REPLICAS=4 {hours} UTC")
    assert settings.minimum(at(outside)) == (1, "MIN_REPLICAS=1")


def test_the_highest_minimum_that_applies_wins() -> None:
    settings = scheduled(
        "5 Mon 08:00-12:00 UTC; 7 Mon 10:00-11:00 UTC ;2 Mon 00:00-24:00 UTC", MIN_REPLICAS="3"
    )
    hours = {8: 5, 10: 7, 11: 5, 13: 3}
    for hour, pods in hours.items():
        assert settings.minimum(at("2026-11-23") + timedelta(hours=hour))[0] == pods


HOURS = scheduled("5 Thu 09:00-18:00 Asia/Seoul")  # START is a Thursday, 09:00 in Seoul


def test_the_pods_start_immediately_when_the_hours_begin_and_the_line_says_why() -> None:
    early = decide(HOURS, Inputs(START - MINUTE, 1, queue=QueueLength(0)))
    assert (early.replicas, early.reason) == (1, "AtTarget")
    scaled = {scaler.LAST_SCALE_TIME: "2025-12-31T23:59:00Z", scaler.LAST_SCALE: "up 1->2"}
    begun = decide(HOURS, Inputs(START, 1, parse_state(scaled, HOURS, START), QueueLength(0)))
    assert (begun.replicas, begun.reason) == (5, "TooFewReplicas")
    assert "SCHEDULED_MIN_REPLICAS=5 Thu 09:00-18:00 Asia/Seoul" in begun.message


def test_within_the_hours_they_are_the_minimum() -> None:
    decision = decide(HOURS, Inputs(START, 5, queue=QueueLength(0)))
    assert (decision.replicas, decision.reason, decision.desired) == (5, "AtTarget", 5)
    assert "the minimum (SCHEDULED_MIN_REPLICAS=5 Thu" in decision.message


def test_after_the_hours_the_ordinary_rules_remove_the_pods() -> None:
    after = START + timedelta(hours=9)
    decision = decide(HOURS, Inputs(after, 5, queue=QueueLength(0)))
    assert (decision.replicas, decision.reason) == (5, "ScaleDownStabilized")


def test_an_override_and_a_disabled_workload_win_over_the_hours() -> None:
    override = State(paused_replicas=2)
    assert decide(HOURS, Inputs(START, 5, override)).replicas == 2
    assert decide(HOURS, Inputs(START, 0)).reason == "ScalingDisabled"
    to_zero = scheduled("5 Thu 09:00-18:00 Asia/Seoul", MIN_REPLICAS="0")
    assert decide(to_zero, Inputs(START, 0)).replicas == 5, "0 is an ordinary number there"


PAUSES = {"paused": "true", "paused-replicas": "7", "paused-scale-out": "true"}


@pytest.mark.parametrize(("name", "value"), PAUSES.items())
def test_a_pause_expires_to_the_second(name: str, value: str, world: World) -> None:
    world.queue.fill(3)
    annotations = {name: value, "paused-until": "2026-01-01T09:05:00+09:00"}
    world.cluster.annotate("worker", **{ANNOTATION + k: v for k, v in annotations.items()})
    run = world.run()
    assert "until 2026-01-01T00:05:00Z" in run.record["message"], run
    assert world.replicas == (7 if name == "paused-replicas" else 1)
    world.pass_time(299)
    assert "until" in world.run().record["message"]
    world.pass_time(1)
    run = world.run()
    assert (run.exit_code, world.replicas) == (0, 3), run
    assert not annotations.keys() & world.annotations.keys(), "and is removed"


@pytest.mark.parametrize("until", ["tomorrow", "", "20260101T"])
def test_an_unreadable_end_expires_nothing_and_gives_a_warning(until: str) -> None:
    annotations = {scaler.PAUSED: "true", scaler.PAUSED_UNTIL: until}
    state = parse_state(annotations, HOURS, START)
    assert state.paused and state.paused_until is None
    assert scaler.PAUSED_UNTIL in state.warnings[0] and repr(until) in state.warnings[0]


def test_an_end_without_a_pause_changes_nothing() -> None:
    state = parse_state({scaler.PAUSED_UNTIL: "2027-01-01"}, HOURS, START)
    inputs = Inputs(START, 5, queue=QueueLength(0))
    assert decide(HOURS, replace(inputs, state=state)) == decide(HOURS, inputs)
